"""LP-FT: linear probing, then fine-tuning from its head."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.probe import head_phase
from agwm_jax.methods.training import replace_weights, start_at_pretrained, training_phase


@METHODS.register("lp_ft", cost="features: 1/3; finetune: 1", paper="arXiv 2202.10054")
class LPFT(MethodSettings):
    """Plain fine-tuning that starts from the head of `probe` instead of a random one.

    A random head moves the features before it is of use; one that fits them already leaves them where they are good.
    The first stage is that of `probe`, the second `vanilla` bit for bit, from that head.

    Cost 1/3 fb a step of the one pass that reads the features, then 1 fb a step; memory of plain fine-tuning. Where
    texts of another kind than the training texts will be scored. Source: Kumar et al. 2022 (arXiv 2202.10054).
    """

    name: Literal["lp_ft"] = Field(default="lp_ft", description="fine-tuning method")
    folds: int = Field(default=5, ge=2, description="parts of the training set for the choice of the head's C")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        stages = ((head_phase(setup, folds=self.folds),), (training_phase(setup),))
        return Method(start_at_pretrained(setup), stages, replace_weights)
