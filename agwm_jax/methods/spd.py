"""Selective projection decay: steps that lead away from W0 against the gradient are taken back in part."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Int
from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.methods.interface import METHODS, Context, Hooks, Setup, Variables
from agwm_jax.methods.technique import Technique
from agwm_jax.methods.training import TASK


@METHODS.register("spd", cost="1", paper="arXiv 2411.01713")
class SPD(Technique):
    """Fine-tuning with a pull to W0 that acts only on tensors whose gradient asks for it: selective projection decay.

    Let V be a weight after the optimiser's step from W. Where ``<g, W - W0> > 0``, that is where descent leads back,
    ``V <- V - strength * r * (V - W0)``; the deviation ratio ``r = max(0, |V - W0| - |W - W0|) / |V - W0|`` is the
    share of the distance that the step has added. With strength 1 the weight is thus projected onto the ball around W0
    that W lies on. Products and norms are of one tensor, of one layer of a stacked weight. g is what the optimiser
    gets, before its clip. The head has no pretrained value and is left alone. The optimiser's own weight decay still
    pulls to 0: the paper has none (``finetune.optimizer.weight_decay: 0``). strength = 0 is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and of W0. In place of `l2_sp` where a pull on all weights costs
    score. Source: Tian et al. 2024 (arXiv 2411.01713), section 3.
    """

    changes: ClassVar = "weights"
    name: Literal["spd"] = Field(default="spd", description="fine-tuning method")
    strength: float = Field(default=1.0, ge=0, description="lambda, share of the added distance that is taken back")

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The pull after the optimiser's step."""
        del num_steps
        if self.strength == 0:  # the same sums in another order would not be the same bits
            return Hooks()
        weights = setup.model.weights

        def projected(update: Array, gradient: Array, moved: Array, stacked: bool) -> Array:
            axes = tuple(range(1 if stacked else 0, update.ndim))

            def total(x: Array) -> Array:
                return jnp.sum(x, axis=axes, keepdims=True)

            after = moved + update
            distance = jnp.sqrt(total(after**2))
            added = jnp.maximum(distance - jnp.sqrt(total(moved**2)), 0)
            pull = jnp.where(total(gradient * moved) > 0, self.strength * added / trees.divisor(distance), 0)
            return update - pull * after

        def update(
            updates: Variables, grads: Variables, context: Context, trained: Variables, step: Int[Array, ""]
        ) -> Variables:
            del step
            task = dict(updates[TASK])
            for path in [path for path in task if weights[path].role != "head"]:
                moved = trained[TASK][path] - context.pretrained[path]
                task[path] = projected(task[path], grads[TASK][path], moved, weights[path].is_stacked)
            return {**updates, TASK: task}

        return Hooks(update=update)
