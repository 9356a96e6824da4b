"""Exponential moving average: what is kept is a mean of the weights that forgets old ones."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field

from agwm_jax.methods.averaging import averaged
from agwm_jax.methods.interface import METHODS, Method, Setup
from agwm_jax.methods.technique import Technique


@METHODS.register("ema", cost="1", paper="arXiv 1703.01780")
class EMA(Technique):
    """Fine-tuning whose result is ``mean <- decay * mean + (1 - decay) * W`` after each step of the last phase.

    The mean starts at the first step's weights. decay = 0 is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and once more the trained weights. As `swa`, where the last part of
    training need not be chosen. Source: Polyak and Juditsky 1992; for networks Tarvainen and Valpola 2017 (arXiv
    1703.01780).
    """

    changes: ClassVar = "end"
    name: Literal["ema"] = Field(default="ema", description="fine-tuning method")
    decay: float = Field(default=0.99, ge=0, lt=1, description="what is kept of the mean at a step")

    def change_method(self, method: Method, setup: Setup) -> Method:
        """With the mean in place of the last weights."""
        del setup
        return averaged(method, lambda step: jnp.where(step == 0, 0.0, self.decay))
