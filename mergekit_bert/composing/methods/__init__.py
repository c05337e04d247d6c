"""The merge methods: one file per method, each a :class:`~mergekit_bert.composing.method.Method`."""
