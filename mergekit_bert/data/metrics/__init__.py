"""The metrics: one file per metric, each a frozen :class:`~mergekit_bert.data.metric.Metric`."""
