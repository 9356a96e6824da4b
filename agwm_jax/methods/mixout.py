"""Mixout: in every training step a random part of the weights is put back to where it started."""

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field, Strict

from agwm_jax.methods.interface import METHODS, Context, Hooks, Setup, Variables
from agwm_jax.methods.technique import Technique
from agwm_jax.methods.training import TASK
from agwm_jax.models.weights import of_role


def mixout(key: Key[Array, ""], task: Array, pretrained: Array, p: float) -> Array:
    """``(m W + (1 - m) W0 - p W0) / (1 - p)`` with an own ``m ~ Bernoulli(1 - p)`` for every entry; its mean is W."""
    kept = jax.random.bernoulli(key, 1 - p, task.shape)
    return jnp.where(kept, (task - p * pretrained) / (1 - p), pretrained)


@METHODS.register("mixout", cost="1", paper="arXiv 1909.11299")
class Mixout(Technique):
    """Fine-tuning with noise on the weights: each entry of W stands at W0 with probability p, in training alone.

    The forward pass takes ``(m W + (1 - m) W0 - p W0) / (1 - p)``, m ~ Bernoulli(1 - p) drawn for every entry at every
    step, whose mean is W; evaluation takes W. (The authors' code draws one m for all weights that leave an input.)
    Dropout of activations stays as the model has it. The head has no pretrained value and no noise. p = 0 is `vanilla`
    bit for bit.

    Cost 1 fb a step, and one random number a weight; memory of plain fine-tuning, of W0 and of the noisy weights. For
    large models on few examples, whose runs fail now and then. Source: Lee et al. 2020 (arXiv 1909.11299), equation 4.
    """

    changes: ClassVar = "weights"
    name: Literal["mixout"] = Field(default="mixout", description="fine-tuning method")
    p: float = Field(default=0.7, ge=0, lt=1, description="probability that an entry stands at its pretrained value")
    roles: Annotated[tuple[Literal["kernel", "bias", "norm", "embedding"], ...], Strict(False)] = Field(
        default=("kernel",), description="which weights get the noise"
    )

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The noise on W."""
        del num_steps
        noisy = [path for path in of_role(setup.model.weights, *self.roles) if path not in setup.frozen]

        def perturb(context: Context, variables: Variables, key: Key[Array, ""]) -> Variables:
            task = variables[TASK]
            keys = dict(zip(noisy, jax.random.split(key, len(noisy)), strict=True))
            mixed = {path: mixout(keys[path], task[path], context.pretrained[path], self.p) for path in noisy}
            return {**variables, TASK: {**task, **mixed}}

        return Hooks(perturb=perturb)
