"""The families of adapters: one file per family, each a :class:`~mergekit_bert.adapters.family.Family`."""
