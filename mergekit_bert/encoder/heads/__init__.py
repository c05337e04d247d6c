"""The heads: one file per head, each a :class:`~mergekit_bert.encoder.head.Head`."""
