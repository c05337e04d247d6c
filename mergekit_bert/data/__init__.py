"""Text in: tasks, rows, batches, metrics."""
