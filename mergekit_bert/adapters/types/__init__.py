"""The adapter types: one file per type, each an :class:`~mergekit_bert.adapters.adapter.AdapterType`."""
