"""The GLUE tasks as a source (arXiv 1804.07461, hub data set nyu-mll/glue)."""

from typing import Literal, NamedTuple

from pydantic import Field

from agwm_jax.data.sources.base import TASK_SOURCES, TableSource, TaskSource
from agwm_jax.data.tasks import Task


class _Glue(NamedTuple):
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]


_GLUE = {
    "cola": _Glue(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": _Glue(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": _Glue(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": _Glue(("sentence1", "sentence2"), (), ("spearman", "pearson")),
    "qqp": _Glue(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": _Glue(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": _Glue(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "rte": _Glue(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": _Glue(("sentence1", "sentence2"), ("not_entailment", "entailment"), ("accuracy",)),
}
GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


@TASK_SOURCES.register("glue")
class GlueTask(TaskSource):
    """A GLUE task by name, from the hub."""

    source: Literal["glue"] = Field(default="glue", description="where the data comes from")
    name: GlueName = Field(description="name of the GLUE task")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")

    def load(self) -> Task:
        """Its validation split is reported, for the labels of its test split are secret.

        MNLI's matched validation split is "validation", the other one "validation_mismatched".
        """
        from agwm_jax.data.hub import hub_tables

        spec = _GLUE[self.name]
        splits = {"train": "train", "validation": "validation"}
        if self.name == "mnli":
            splits |= {"validation": "validation_matched", "validation_mismatched": "validation_mismatched"}
        tables = hub_tables(
            "nyu-mll/glue", self.name, revision=self.revision, splits=splits, columns=(*spec.text_columns, "label")
        )
        layout = TableSource(
            source="glue",
            text_columns=spec.text_columns,
            kind="classification" if spec.label_names else "regression",
            label_names=spec.label_names or None,
            metrics=spec.metrics,
        )
        return layout.task(self.name, tables)

    def columns(self) -> tuple[tuple[str, ...], str]:
        """As they are called on the hub."""
        return _GLUE[self.name].text_columns, "label"
