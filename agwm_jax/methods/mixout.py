"""Mixout: in every training step a random part of the weights is put back to where it started."""

from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field, Strict

from agwm_jax.core.types import Params
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.training import TASK, replace_weights, start_at_pretrained, training_phase
from agwm_jax.models.weights import of_role


def mixout(key: Key[Array, ""], task: Array, pretrained: Array, p: float) -> Array:
    """``(m W + (1 - m) W0 - p W0) / (1 - p)`` with an own ``m ~ Bernoulli(1 - p)`` for every entry; its mean is W."""
    kept = jax.random.bernoulli(key, 1 - p, task.shape)
    return jnp.where(kept, (task - p * pretrained) / (1 - p), pretrained)


@METHODS.register("mixout", cost="1", paper="arXiv 1909.11299")
class Mixout(MethodSettings):
    """Fine-tuning with noise on the weights: each entry of W stands at W0 with probability p, in training alone.

    The forward pass takes ``(m W + (1 - m) W0 - p W0) / (1 - p)``, m ~ Bernoulli(1 - p) drawn for every entry at every
    step, whose mean is W; evaluation takes W. (The authors' code draws one m for all weights that leave an input.)
    Dropout of activations stays as the model has it. The head has no pretrained value and no noise. p = 0 is `vanilla`
    bit for bit.

    Cost 1 fb a step, and one random number a weight; memory of plain fine-tuning, of W0 and of the noisy weights.
    Source: Lee et al. 2020 (arXiv 1909.11299), equation 4.
    """

    name: Literal["mixout"] = Field(default="mixout", description="fine-tuning method")
    p: float = Field(default=0.7, ge=0, lt=1, description="probability that an entry stands at its pretrained value")
    roles: Annotated[tuple[Literal["kernel", "bias", "norm", "embedding"], ...], Strict(False)] = Field(
        default=("kernel",), description="which weights get the noise"
    )

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        noisy = [path for path in of_role(setup.model.weights, *self.roles) if path not in setup.frozen]

        def forward(pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Params:
            task = variables[TASK]
            keys = dict(zip(noisy, jax.random.split(key, len(noisy)), strict=True))
            mixed = {path: mixout(keys[path], task[path], pretrained[path], self.p) for path in noisy}
            return replace_weights(pretrained, {TASK: {**task, **mixed}})

        phase = training_phase(setup, forward=forward)
        return Method(start_at_pretrained(setup), ((phase,),), replace_weights)
