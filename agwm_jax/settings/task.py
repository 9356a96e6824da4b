"""What to learn: the generated task, one of GLUE, any of the hub, or local files."""

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from agwm_jax.section import Names, Section, default_tag, refuse

Metric = Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"]
Metrics = Annotated[tuple[Metric, ...], Strict(False), Field(min_length=1)]
GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


class TaskSection(Section):
    train_size: int | None = Field(
        default=None,
        ge=2,
        description="low-resource draw: this many training examples by run.seed, null for all of them",
    )


class AgreementTask(TaskSection):
    """The generated acceptability task; needs no download."""

    source: Literal["agreement"] = Field(default="agreement", description="where the data comes from")
    seed: int = Field(default=0, ge=0, description="seed of the generator; the same seed gives the same bytes")
    pool_size: int = Field(
        default=1200, ge=8, description="training examples to generate, before train_size draws from them"
    )
    validation_size: int = Field(default=400, ge=8, description="validation examples to generate")
    test_size: int = Field(default=800, ge=8, description="test examples to generate")


class GlueTask(TaskSection):
    """A GLUE task by name, from the hub."""

    source: Literal["glue"] = Field(description="where the data comes from")
    name: GlueName = Field(description="name of the GLUE task")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")


class TableTask(TaskSection):
    """What hub and local data have in common: which column is what."""

    text_columns: Names = Field(
        default=("text",), min_length=1, max_length=2, description="the text column, or two for pairs"
    )
    label_column: str = Field(default="label", min_length=1, description="column of the class or the score")
    kind: Literal["classification", "regression"] = Field(default="classification", description="what the label is")
    label_names: Names | None = Field(
        default=None, min_length=2, description="class names in order; null: as the data says"
    )
    group_column: str | None = Field(default=None, description="column to break the scores down by")
    metrics: Metrics | None = Field(
        default=None, description="scores, main one first; null: accuracy and macro_f1, or spearman and pearson"
    )
    report_split: Literal["validation", "test"] = Field(
        default="validation", description="split whose score is the result"
    )

    @model_validator(mode="after")
    def _kind_fits(self):
        regression = self.kind == "regression"
        fitting = {"pearson", "spearman"} if regression else {"accuracy", "f1", "macro_f1", "matthews"}
        wrong = [metric for metric in self.metrics or () if metric not in fitting]
        allowed = ", ".join(sorted(fitting))
        refuse(
            (bool(wrong), f"metrics: {', '.join(wrong)} cannot score a {self.kind}; allowed: {allowed}"),
            (regression and self.label_names is not None, "label_names: a regression has no classes; remove it"),
        )
        return self


class Splits(Section):
    train: str = Field(default="train", description="name of the training split in the data set")
    validation: str = Field(default="validation", description="name of the validation split in the data set")
    test: str | None = Field(default=None, description="name of the test split in the data set, null for none")


class HubTask(TableTask):
    """Any data set of the hub, by a mapping of its columns."""

    source: Literal["hub"] = Field(description="where the data comes from")
    path: str = Field(min_length=1, description="hub id of the data set")
    name: str | None = Field(default=None, description="configuration (subset) of the data set")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")
    splits: Splits = Field(default=Splits(), description="which split of the data set is which")

    @model_validator(mode="after")
    def _reported_split_exists(self):
        refuse((self.report_split == "test" and self.splits.test is None, "report_split: test needs splits.test"))
        return self


class Files(Section):
    train: str = Field(min_length=1, description="training file: .jsonl, .csv, .tsv or .parquet")
    validation: str = Field(min_length=1, description="validation file")
    test: str | None = Field(default=None, min_length=1, description="test file, null for none")


class LocalTask(TableTask):
    """Files of one's own. Paths in a config file are relative to that file, on the command line to where one stands."""

    source: Literal["local"] = Field(description="where the data comes from")
    name: str = Field(default="local", min_length=1, description="name of the task in tables and folders")
    files: Files = Field(description="the data files")
    drop_leaked: bool = Field(default=False, description="drop training texts that occur in validation or test too")

    @model_validator(mode="after")
    def _reported_split_exists(self):
        refuse((self.report_split == "test" and self.files.test is None, "report_split: test needs files.test"))
        return self


Task = Annotated[
    AgreementTask | GlueTask | HubTask | LocalTask, Field(discriminator="source"), default_tag("source", "agreement")
]
