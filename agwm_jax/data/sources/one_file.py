"""One labelled file as a source: what is held out is cut from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from agwm_jax.data.sources.base import TASK_SOURCES, TableSource
from agwm_jax.data.tasks import Task
from agwm_jax.section import FilePath, refuse

if TYPE_CHECKING:
    from agwm_jax.data.draws import Rows


@TASK_SOURCES.register("file")
class FileTask(TableSource):
    """One file of one's own, cross-validated: seed s trains on all folds but one, and is scored on that.

    Seeds 0 to folds - 1 hold out every row once; seeds from there on do so by another shuffle. Folds are stratified by
    class; rows with the same text, or of one group where there is a group column, are never parted.
    """

    source: Literal["file"] = Field(default="file", description="where the data comes from")
    name: str = Field(default="file", min_length=1, description="name of the task in tables and folders")
    file: FilePath = Field(description="the labelled file: .jsonl, .csv, .tsv or .parquet")
    test: FilePath | None = Field(default=None, description="test file, null for none")
    test_share: float | None = Field(
        default=None, gt=0, le=0.5, description="share of the file that no seed trains on, as its split test"
    )
    folds: int = Field(default=5, ge=2, description="parts of the file; run.seed says which one is held out")

    @model_validator(mode="after")
    def _fits_together(self):
        has_test = self.test is not None or self.test_share is not None
        files = [Path(file) for file in self.data_files()]
        refuse(
            (self.test is not None and self.test_share is not None, "test_share: there is a test file; remove one"),
            (self.test is not None and files[0].resolve() == files[-1].resolve(), "test: is the training file too"),
            (self.report_split == "test" and not has_test, "report_split: test needs test or test_share"),
            (self.train_size is not None, "train_size: folds say what is trained on; remove it"),
            (
                self.separator != "," and all(file.suffix.lower() != ".csv" for file in files),
                "separator: none of the files is a .csv; remove it",
            ),
        )
        return self

    def load(self) -> Task:
        """The file is read anew at every call and nothing is cached; a share for the test is the same for all seeds."""
        from agwm_jax.data.draws import drawn, fold_rows
        from agwm_jax.data.files import read_table

        named = {"train": self.file, **({"test": self.test} if self.test else {})}
        task = self.task(self.name, {k: read_table(v, separator=self.separator) for k, v in named.items()})
        if self.test_share is None:
            return task
        return drawn(task, fold_rows(task, 0, folds=round(1 / self.test_share), held_out="test"), seed=0)

    def rows(self, task: Task, seed: int) -> "Rows":
        """All folds but one for training, that one as the split validation."""
        from agwm_jax.data.draws import fold_rows

        return fold_rows(task, seed, folds=self.folds)

    def data_files(self) -> tuple[str, ...]:
        return tuple(file for file in (self.file, self.test) if file is not None)
