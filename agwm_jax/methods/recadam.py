"""RecAdam: training starts as a pull to W0 and turns into fine-tuning."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from pydantic import Field

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Context, Hooks, Setup, Variables
from agwm_jax.methods.optimizers import schedule
from agwm_jax.methods.technique import Technique
from agwm_jax.methods.training import TASK


@METHODS.register("recadam", cost="1", paper="arXiv 2004.12651")
class RecAdam(Technique):
    """Fine-tuning that is faded in: ``W <- W - c(t) * step - lr * (1 - c(t)) * gamma * (W - W0)``.

    `step` is the optimiser's, with its weight decay (the authors' code does not fade that); ``c(t) = sigmoid(k * (t -
    t0))`` of the updates t, counted from 1. As long as t is well below t0 the weights stay where they start, so t0 must
    lie well within the run. The head has no pretrained value: it takes the optimiser's steps as they are. Where c(t) is
    1 at every t this is `vanilla`: bit for bit for a t0 so far below 0 that ``k * (1 - t0)`` is 17 or more, where c(1)
    is 1 in 32 bits.

    Cost 1 fb a step; memory of plain fine-tuning and of W0. Where what the model knew must not be lost on the way.
    Source: Chen et al. 2020 (arXiv 2004.12651), section 3.
    """

    changes: ClassVar = "weights"
    name: Literal["recadam"] = Field(default="recadam", description="fine-tuning method")
    gamma: float = Field(default=5000.0, ge=0, description="strength of the pull to the pretrained weights")
    k: float = Field(default=0.1, gt=0, description="steepness of the change from the pull to fine-tuning")
    t0: float = Field(default=250.0, description="number of the update at which both weigh the same")

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The faded step and the pull.

        Raises:
            AgwmError: the pull is so strong that it leads beyond W0.
        """
        weights, optimizer = setup.model.weights, setup.finetune.optimizer
        if self.gamma * optimizer.learning_rate > 1:
            raise AgwmError(
                f"recadam.gamma: got {self.gamma:g} at a learning rate of {optimizer.learning_rate:g}, which pulls "
                f"beyond the pretrained weights; expected at most 1 / rate = {1 / optimizer.learning_rate:g}: lower "
                "one of them."
            )
        if self.k * (1 - self.t0) >= 17:  # nothing is ever pulled, and the same sums in another order are other bits
            return Hooks()
        rate = schedule(optimizer, num_steps=num_steps)

        def update(
            updates: Variables, grads: Variables, context: Context, trained: Variables, step: Int[Array, ""]
        ) -> Variables:
            del grads
            faded = jax.nn.sigmoid(self.k * (step.astype(jnp.float32) + 1 - self.t0))
            pull = rate(step) * (1 - faded) * self.gamma
            task = dict(updates[TASK])
            for path in [path for path in task if weights[path].role != "head"]:
                moved = trained[TASK][path] - context.pretrained[path]
                task[path] = (faded * task[path] - pull * moved).astype(task[path].dtype)
            return {**updates, TASK: task}

        return Hooks(update=update)
