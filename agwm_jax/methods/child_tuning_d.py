"""Child-Tuning-D: only the weights with the largest Fisher information for the task are trained."""

from functools import partial
from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.subnetwork import UNDER_THE_MASK, score_phase, top_share
from agwm_jax.methods.training import replace_weights, start_at_pretrained, training_phase


@METHODS.register("child_tuning_d", cost="fisher: 1; finetune: 1", paper="arXiv 2109.05687")
class ChildTuningD(MethodSettings):
    """Fine-tuning of a sub-network that is chosen once, by the data: ``g <- g * mask``.

    A first pass over the training set, at the pretrained weights and with dropout as in training, takes the mean over
    batches of the squared gradient: the diagonal of the empirical Fisher information. The mask keeps what is at or
    above its (1 - p) quantile over all weights of the encoder's layers; embeddings, pooler and head always train.
    Gradients are masked before the clip and the moments; weight decay acts on all. (The authors' code also clips each
    tensor's gradient before it is squared.) p = 1 is `vanilla` bit for bit.

    Cost 1 fb a step, of the Fisher pass too; memory of plain fine-tuning and a byte a weight. Source: Xu et al. 2021
    (arXiv 2109.05687), section 3.3.
    """

    name: Literal["child_tuning_d"] = Field(default="child_tuning_d", description="fine-tuning method")
    p: float = Field(default=0.3, gt=0, le=1, description="share of the encoder's weights that is trained")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        fisher = score_phase(setup, name="fisher", score=lambda w, g: g**2, choose=partial(top_share, p=self.p))
        finetune = training_phase(setup, hooks=(UNDER_THE_MASK,))
        return Method(start_at_pretrained(setup), ((fisher,), (finetune,)), replace_weights)
