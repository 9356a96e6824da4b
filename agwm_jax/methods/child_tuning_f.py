"""Child-Tuning-F: in every training step a random part of the weights gets no gradient."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.methods.interface import METHODS, Context, Hooks, Setup, Variables
from agwm_jax.methods.technique import Technique


@METHODS.register("child_tuning_f", cost="1", paper="arXiv 2109.05687")
class ChildTuningF(Technique):
    """Fine-tuning with noise on the gradient: ``g <- g * m / p``, m ~ Bernoulli(p) for every entry at every step.

    All trained weights get it, embeddings, pooler and head too, as in the authors' code (`child_tuning_d` leaves those
    alone, there and here). Gradients are masked before the clip and the moments; weight decay acts on all. (The authors
    clip first, so that there the mask adds to the norm.) p = 1 is `vanilla` bit for bit.

    Cost 1 fb a step, and one random number a weight; memory of plain fine-tuning. For large models on few examples,
    where reading the data for a mask as `child_tuning_d` does is not wanted. Source: Xu et al. 2021 (arXiv 2109.05687),
    the task-free variant.
    """

    changes: ClassVar = "gradient"
    name: Literal["child_tuning_f"] = Field(default="child_tuning_f", description="fine-tuning method")
    p: float = Field(default=0.3, gt=0, le=1, description="probability that an entry has its gradient")

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The mask, drawn anew at every step."""
        del setup, num_steps

        def masked(grads: Variables, context: Context, key: Key[Array, ""]) -> Variables:
            del context
            leaves, structure = jax.tree.flatten(grads)
            keys = jax.random.split(key, len(leaves))
            return jax.tree.unflatten(structure, [self._masked(g, own) for g, own in zip(leaves, keys, strict=True)])

        return Hooks(gradient=masked)

    def _masked(self, gradient: Array, key: Key[Array, ""]) -> Array:
        return jnp.where(jax.random.bernoulli(key, self.p, gradient.shape), gradient / self.p, 0)
