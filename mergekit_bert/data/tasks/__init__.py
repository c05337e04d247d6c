"""The built-in tasks: one file per task, each a frozen :class:`~mergekit_bert.data.task.Task`."""
