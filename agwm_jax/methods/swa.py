"""Stochastic weight averaging: what is kept is the mean of the weights over the last part of training."""

import math
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from pydantic import Field

from agwm_jax.methods.averaging import averaged
from agwm_jax.methods.interface import METHODS, Method, Setup
from agwm_jax.methods.technique import Technique


@METHODS.register("swa", cost="1", paper="arXiv 1803.05407")
class SWA(Technique):
    """Fine-tuning whose result is the plain mean of the weights after each of the last steps.

    The steps are the last `share` of the method's last phase, one at least; the learning rate keeps its schedule (the
    authors hold it high: ``finetune.optimizer.schedule: constant`` does). A share of one step is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and once more the trained weights. Where scores jump from step to step
    near the end. Source: Izmailov et al. 2018 (arXiv 1803.05407), algorithm 1.
    """

    changes: ClassVar = "end"
    name: Literal["swa"] = Field(default="swa", description="fine-tuning method")
    share: float = Field(default=0.5, gt=0, le=1, description="last part of the steps that is averaged")

    def change_method(self, method: Method, setup: Setup) -> Method:
        """With the mean in place of the last weights."""
        del setup
        num_steps = method.phases[-1].num_steps
        first = num_steps - max(1, math.floor(self.share * num_steps))

        def weight(step: Int[Array, ""]) -> Float[Array, ""]:
            count = jnp.maximum(step - first + 1, 1).astype(jnp.float32)
            return 1 - 1 / count  # 0 at the first and before: the mean of one is that one

        return averaged(method, weight)
