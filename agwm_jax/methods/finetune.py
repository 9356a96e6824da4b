"""The phase that every method ends with: train the task weights, alpha held fixed."""

from typing import NamedTuple

import optax

from agwm_jax.core.inner import InnerState, gradient_step
from agwm_jax.core.mixup import Complement, mix
from agwm_jax.core.types import Alpha, Batch, LossFn, Params
from agwm_jax.methods.phase import Batches, Phase, Plan, Weights


class FinetuneState(NamedTuple):
    """Task weights with their optimiser, and the alpha they are mixed with."""

    inner: InnerState
    alpha: Alpha


def finetune_phase(
    loss: LossFn, plan: Plan, *, tx: optax.GradientTransformation, complement: Complement = "convex"
) -> Phase:
    """Minimise ``loss(mix(W0, W, alpha))`` over W with a fresh optimiser, from the weights that earlier phases left.

    Args:
        loss: on the flat mixed weights and a batch.
        plan: ``{"train": [steps, b]}``.
        tx: optimiser of the task weights.
        complement: see `agwm_jax.mix`.
    """

    def start(frozen: Params, initial: Weights, carry: Weights) -> FinetuneState:
        del frozen, initial
        return FinetuneState(InnerState(carry.task, tx.init(carry.task)), carry.alpha)

    def step(state: FinetuneState, frozen: Params, batches: Batches):
        def mixed_loss(task: Params, alpha: Alpha, batch: Batch):
            return loss(mix(frozen, task, alpha, complement=complement), batch)

        inner, value = gradient_step(mixed_loss, tx, state.inner, state.alpha, batches["train"])
        return FinetuneState(inner, state.alpha), {"loss": value}

    def finish(carry: Weights, state: FinetuneState) -> Weights:
        del carry
        return Weights(state.inner.params, state.alpha)

    return Phase("finetune", plan, start, step, finish, monitor=lambda state: {})
