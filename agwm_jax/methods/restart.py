"""The control for a search: both stages of agwm without a gate."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.several_runs import FirstStage, two_stages


@METHODS.register("restart", cost="1", paper="control for arXiv 2403.12918")
class Restart(MethodSettings):
    """Plain fine-tuning twice: on a random part of the training set, then with a fresh optimiser on all of it.

    What `agwm` does with W when no gate is learnt: the control that tells how much of its score is more training, its
    restart of optimiser and schedule, and the first stage's wider clip. The same split, order of the data and dropout
    as `agwm` with one inner step, whose losses of W and final weights it gives bit for bit where A stays 1
    (``mixup.noise: 0`` and an outer learning rate of practically 0), with rollback and without. `soup` with one split
    is this method.

    Cost 1 fb a step; memory of plain fine-tuning. Source: the two stages of arXiv 2403.12918, algorithm 1.
    """

    name: Literal["restart"] = Field(default="restart", description="fine-tuning method")
    first: FirstStage = Field(default=FirstStage(), description="the stage before finetune")

    @property
    def extra_passes(self) -> int:
        """Those of the first stage."""
        return self.first.epochs

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        return two_stages(setup, self.first, num_splits=1)
