"""STS benchmark: how similar are two sentences, 0 to 5 (Cer et al. 2017)?"""

from mergekit_bert.data.task import HubSource, Task

RECORD = Task(
    name="sts",
    kind="regress",
    text=("sentence1", "sentence2"),
    range=(0.0, 5.0),
    metrics=("pearson", "spearman"),
    description="similarity of two sentences, 0 to 5 (SemEval STS benchmark)",
    hub=HubSource("nyu-mll/glue", "stsb", {}, {"train": "train", "dev": "validation"}),
)
