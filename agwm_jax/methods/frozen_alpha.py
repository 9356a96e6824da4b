"""The control for a learnt gate: alpha stays at its random start."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.mixup import ALPHA, Mixture, Mixup
from agwm_jax.methods.training import TASK, task_weights, training_phase


@METHODS.register("frozen_alpha", cost="1", paper="arXiv 2403.12918, ablation")
class FrozenAlpha(MethodSettings):
    """Fine-tuning through ``A * W + (1 - A) * W0`` whose gate A is drawn once and never trained.

    The control that tells what the mixture does by itself. With ``mixup.noise: 0``, A is 1 and this is `vanilla` bit
    for bit. Cost 1 fb a step; memory of plain fine-tuning and of W0. Source: ablation of arXiv 2403.12918.
    """

    name: Literal["frozen_alpha"] = Field(default="frozen_alpha", description="fine-tuning method")
    mixup: Mixup = Field(default=Mixup(), description="which weights are mixed, and how")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        mixture = Mixture(self.mixup, setup)

        def init(pretrained, key):
            return {TASK: task_weights(setup, pretrained), ALPHA: mixture.init_alpha(key, pretrained)}

        phase = training_phase(setup, forward=mixture.forward, keeps=(ALPHA,))
        return Method(init, ((phase,),), mixture.merge)
