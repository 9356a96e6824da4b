"""The control for an average of searches: the average of several runs, then fine-tuning from there."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.several_runs import FirstStage, two_stages


@METHODS.register("soup", cost="1", paper="arXiv 2203.05482; control for 2403.12918")
class Soup(MethodSettings):
    """K runs on K random parts of the training set, the mean of all their weights, then `finetune` from that mean.

    All runs start at the pretrained weights and the same fresh head, and go side by side. What `agwm` with
    ``search.num_splits: K`` does with W when no gate is learnt: the control that tells how much of its score is the
    average. It gives the bits of that method where A stays 1; with K = 1 it is `restart`.

    Cost 1 fb a step of each run; memory of plain fine-tuning for each run that goes side by side, and the mean. Source:
    Wortsman et al. 2022 (arXiv 2203.05482), the uniform soup; the averages of arXiv 2403.12918.
    """

    name: Literal["soup"] = Field(default="soup", description="fine-tuning method")
    num_splits: int = Field(default=5, ge=1, description="K, runs on random splits that are averaged")
    first: FirstStage = Field(default=FirstStage(), description="how each run trains")

    @property
    def extra_passes(self) -> int:
        """Those of one run."""
        return self.first.epochs

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        return two_stages(setup, self.first, num_splits=self.num_splits)
