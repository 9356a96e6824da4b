"""Attention-guided weights mixup: bi-level searches for alpha, their average, then fine-tuning at that alpha."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import optax

from agwm_jax.core.bilevel import BilevelState, bilevel
from agwm_jax.core.hypergrad import Hypergradient
from agwm_jax.core.mixup import Complement, alpha_statistics, init_alpha, mixup_problem, project_alpha
from agwm_jax.core.types import LossFn, Params
from agwm_jax.methods.finetune import finetune_phase
from agwm_jax.methods.phase import Batches, Method, Phase, Plan, Weights


def agwm(
    loss: LossFn,
    search_plans: Sequence[Plan],
    finetune_plan: Plan,
    *,
    hypergrad: Hypergradient,
    inner_tx: optax.GradientTransformation,
    outer_tx: optax.GradientTransformation,
    finetune_tx: optax.GradientTransformation,
    mixed: tuple[str, ...],
    finetune_loss: LossFn | None = None,
    rank: int | Literal["full"] = 1,
    noise: float = 0.005,
    complement: Complement = "convex",
    anchor: float = 0.0,
    rollback: bool = True,
    average: Literal["all", "alpha"] = "all",
) -> Method:
    """Search alpha on each random split from the pretrained weights, average, then finetune (arXiv 2403.12918).

    Args:
        loss: on the flat mixed weights and a batch.
        search_plans: one a split: ``{"inner": [steps, k, b], "outer": [steps, b]}``, rows of disjoint parts of the
            training set.
        finetune_plan: ``{"train": [steps, b]}``.
        hypergrad: estimator of alpha's hypergradient.
        inner_tx, outer_tx, finetune_tx: optimisers of W in search, of alpha, and of W in finetune.
        mixed: the mixed paths, over which the anchor acts.
        finetune_loss: the same function where finetune, which takes no products with second derivatives, can run a
            faster one; None: `loss`.
        rank, noise: of alpha, see `agwm_jax.init_alpha`.
        complement, anchor: see `agwm_jax.mixup_problem`.
        rollback: see `agwm_jax.bilevel`.
        average: what the searches hand on: ``"all"``, alpha and the task weights, or ``"alpha"`` alone: finetune then
            starts from the pretrained weights.
    """

    def solver(frozen: Params):
        problem = mixup_problem(loss, frozen, mixed=mixed, complement=complement, anchor=anchor)
        return bilevel(
            problem, hypergrad, inner_tx=inner_tx, outer_tx=outer_tx, project=project_alpha, rollback=rollback
        )

    def start(frozen: Params, initial: Weights, carry: Weights) -> BilevelState:
        del carry
        return solver(frozen).init(initial.task, initial.alpha)

    def step(state: BilevelState, frozen: Params, batches: Batches):
        state, info = solver(frozen).step(state, batches["inner"], batches["outer"])
        return state, {"loss": info.pop("inner_loss"), **info}

    def finish(carry: Weights, state: BilevelState, *, index: int) -> Weights:
        # A running mean: after the last search the carry holds the average over all of them.
        found = Weights(state.inner.params if average == "all" else carry.task, state.outer)
        return jax.tree.map(lambda mean, x: x if index == 0 else mean + (x - mean) / (index + 1), carry, found)

    searches = tuple(
        Phase(
            f"search-{index}",
            plan,
            start,
            step,
            partial(finish, index=index),
            monitor=lambda state: alpha_statistics(state.outer),
        )
        for index, plan in enumerate(search_plans)
    )
    finetune = finetune_phase(finetune_loss or loss, finetune_plan, tx=finetune_tx, complement=complement)
    return Method(partial(init_alpha, rank=rank, noise=noise), (searches, (finetune,)))
