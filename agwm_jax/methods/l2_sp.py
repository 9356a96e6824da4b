"""L2-SP: a penalty that pulls the weights to where they started."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Int
from pydantic import Field

from agwm_jax.core.types import Scalar
from agwm_jax.methods.interface import METHODS, Context, Hooks, Setup, Variables
from agwm_jax.methods.optimizers import schedule
from agwm_jax.methods.technique import Technique
from agwm_jax.methods.training import TASK


@METHODS.register("l2_sp", cost="1", paper="arXiv 1802.01483")
class L2SP(Technique):
    """Plain fine-tuning with the starting point as the reference: ``loss + b/2 |W - W0|^2 + c/2 |head|^2``.

    W are all trained weights with a pretrained value: biases, norms and embeddings too. Decoupled, the pull goes past
    Adam's scaling, as AdamW's weight decay does: ``W <- W - lr * b * (W - W0)`` beside Adam's step. The optimiser's own
    weight decay still pulls to 0: ``finetune.optimizer.weight_decay: 0`` is the paper's objective. With both strengths
    0 this is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and of W0. For tasks near to what the model was pretrained on. Source:
    Li et al. 2018 (arXiv 1802.01483), equation 3.
    """

    changes: ClassVar = "weights"
    name: Literal["l2_sp"] = Field(default="l2_sp", description="fine-tuning method")
    strength: float = Field(default=1e-2, ge=0, description="b, of the pull of pretrained weights to their start")
    head_strength: float = Field(default=1e-2, ge=0, description="c, of the pull of the head to 0")
    decoupled: bool = Field(default=False, description="pull past the optimiser's moments, by the learning rate alone")

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The penalty, or decoupled the pull beside the optimiser's step."""
        weights = setup.model.weights
        pulled = {
            path: self.head_strength if weights[path].role == "head" else self.strength for path in setup.trainable
        }
        pulled = {path: strength for path, strength in pulled.items() if strength > 0}
        rate = schedule(setup.finetune.optimizer, num_steps=num_steps)

        def change(context: Context, variables: Variables, path: str) -> Array:
            weight = variables[TASK][path]
            return weight if weights[path].role == "head" else weight - context.pretrained[path]

        def penalty(context: Context, variables: Variables) -> Scalar:
            squares = (
                strength / 2 * jnp.sum(change(context, variables, path) ** 2) for path, strength in pulled.items()
            )
            return sum(squares, start=jnp.zeros(()))

        def pull(
            updates: Variables, grads: Variables, context: Context, trained: Variables, step: Int[Array, ""]
        ) -> Variables:
            del grads
            task = dict(updates[TASK])
            for path, strength in pulled.items():
                task[path] -= rate(step) * strength * change(context, trained, path)
            return {**updates, TASK: task}

        return Hooks(update=pull) if self.decoupled else Hooks(penalty=penalty)
