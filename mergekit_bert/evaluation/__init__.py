"""Evaluation: scores with intervals, recorded results, the comparison with full fine-tuning, tables, pictures."""
