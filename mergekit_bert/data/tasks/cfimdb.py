"""CFIMDB: movie reviews with counterfactual edits, two classes (Kaushik et al. 2020)."""

from mergekit_bert.data.task import Task

RECORD = Task(
    name="cfimdb",
    kind="classify",
    text=("sentence",),
    labels=("0", "1"),
    label_names=("negative", "positive"),
    metrics=("accuracy", "f1"),
    description="sentiment of a long movie review, two classes (CFIMDB)",
)
