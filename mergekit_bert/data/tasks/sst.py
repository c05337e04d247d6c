"""Stanford Sentiment Treebank, five classes (Socher et al. 2013)."""

from mergekit_bert.data.task import HubSource, Task

RECORD = Task(
    name="sst",
    kind="classify",
    text=("sentence",),
    labels=("0", "1", "2", "3", "4"),
    label_names=("very negative", "negative", "neutral", "positive", "very positive"),
    metrics=("accuracy", "f1"),
    description="sentiment of a sentence, five classes (Stanford Sentiment Treebank)",
    hub=HubSource("SetFit/sst5", None, {"text": "sentence"}, {"train": "train", "dev": "validation"}),
)
