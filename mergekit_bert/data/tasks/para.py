"""Quora question pairs: do two questions ask the same?"""

from mergekit_bert.data.task import HubSource, Task

RECORD = Task(
    name="para",
    kind="classify",
    text=("sentence1", "sentence2"),
    labels=("0", "1"),
    label_names=("different", "paraphrase"),
    metrics=("accuracy", "f1"),
    description="paraphrase or not, pairs of questions (Quora)",
    hub=HubSource(
        "nyu-mll/glue",
        "qqp",
        {"question1": "sentence1", "question2": "sentence2"},
        {"train": "train", "dev": "validation"},
    ),
)
