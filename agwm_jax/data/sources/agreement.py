"""The generated acceptability task as a source."""

from typing import Literal

from pydantic import Field

from agwm_jax.data.sources.base import TASK_SOURCES, TaskSource
from agwm_jax.data.tasks import Task


@TASK_SOURCES.register("agreement")
class AgreementTask(TaskSource):
    """The generated acceptability task; needs no download."""

    source: Literal["agreement"] = Field(default="agreement", description="where the data comes from")
    seed: int = Field(default=0, ge=0, description="seed of the generator; the same seed gives the same bytes")
    pool_size: int = Field(
        default=1200, ge=8, description="training examples to generate, before train_size draws from them"
    )
    validation_size: int = Field(default=400, ge=8, description="validation examples to generate")
    test_size: int = Field(default=800, ge=8, description="test examples to generate")

    def load(self) -> Task:
        from agwm_jax.data.agreement import agreement_task

        return agreement_task(
            seed=self.seed,
            train_size=self.pool_size,
            validation_size=self.validation_size,
            test_size=self.test_size,
        )
