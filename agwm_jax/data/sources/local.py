"""Files of one's own as a source."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from agwm_jax.data.sources.base import TASK_SOURCES, TableSource
from agwm_jax.data.tasks import Task, drop_leaked
from agwm_jax.section import FilePath, Section, refuse


class Files(Section):
    """The files of the splits."""

    train: FilePath = Field(description="training file: .jsonl, .csv, .tsv or .parquet")
    validation: FilePath = Field(description="validation file")
    test: FilePath | None = Field(default=None, description="test file, null for none")


@TASK_SOURCES.register("local")
class LocalTask(TableSource):
    """Files of one's own. Paths in a config file are relative to that file, on the command line to where one stands."""

    source: Literal["local"] = Field(default="local", description="where the data comes from")
    name: str = Field(default="local", min_length=1, description="name of the task in tables and folders")
    files: Files = Field(description="the data files")
    drop_leaked: bool = Field(default=False, description="drop training texts that occur in validation or test too")

    @model_validator(mode="after")
    def _files_fit(self):
        by_file = {}
        for split, file in self._named().items():
            first = by_file.setdefault(Path(file).resolve(), split)
            refuse((first != split, f"files.{split}: {file} is the {first} file too, scores would mean nothing"))
        separated = [file for file in by_file if file.suffix.lower() == ".csv"]
        refuse(
            (self.report_split == "test" and self.files.test is None, "report_split: test needs files.test"),
            (self.separator != "," and not separated, "separator: none of the files is a .csv; remove it"),
        )
        return self

    def _named(self) -> dict[str, str]:
        return self.files.model_dump(exclude_none=True)

    def load(self) -> Task:
        """The files are read anew at every call and nothing is cached: no edited one is taken for its old self."""
        from agwm_jax.data.files import read_table

        task = self.task(self.name, {k: read_table(v, separator=self.separator) for k, v in self._named().items()})
        return drop_leaked(task) if self.drop_leaked else task

    def data_files(self) -> tuple[str, ...]:
        return tuple(self._named().values())
