"""Any data set of the hub, or a folder in its layout, as a source."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from agwm_jax.data.sources.base import TASK_SOURCES, TableSource, files_below
from agwm_jax.data.tasks import Task
from agwm_jax.section import FolderOrName, Section, refuse


class Splits(Section):
    """Which split of the data set is which."""

    train: str = Field(default="train", description="name of the training split in the data set")
    validation: str = Field(default="validation", description="name of the validation split in the data set")
    test: str | None = Field(default=None, description="name of the test split in the data set, null for none")


@TASK_SOURCES.register("hub")
class HubTask(TableSource):
    """Any data set of the hub, by a mapping of its columns."""

    source: Literal["hub"] = Field(default="hub", description="where the data comes from")
    path: FolderOrName = Field(description="hub id of the data set, or a folder in the hub's layout")
    name: str | None = Field(default=None, description="configuration (subset) of the data set")
    revision: str | None = Field(default=None, description="commit, tag or branch on the hub; null: the newest")
    splits: Splits = Field(default=Splits(), description="which split of the data set is which")

    @model_validator(mode="after")
    def _reported_split_exists(self):
        refuse((self.report_split == "test" and self.splits.test is None, "report_split: test needs splits.test"))
        return self

    def load(self) -> Task:
        """Code of a data set is never run."""
        from agwm_jax.data.hub import hub_tables

        columns = (*self.text_columns, self.label_column, *([self.group_column] if self.group_column else []))
        splits = self.splits.model_dump(exclude_none=True)
        tables = hub_tables(self.path, self.name, revision=self.revision, splits=splits, columns=columns)
        return self.task(Path(self.path).name + (f"-{self.name}" if self.name else ""), tables)

    def data_files(self) -> tuple[str, ...]:
        """Those of a folder; a data set of the hub has its revision instead."""
        return files_below(self.path) if Path(self.path).is_dir() else ()
