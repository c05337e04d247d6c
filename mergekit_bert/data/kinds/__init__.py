"""The kinds of task: one file per kind, each a :class:`~mergekit_bert.data.kind.Kind`."""
