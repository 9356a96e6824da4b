"""Alpha fitted after W was trained: W on every split, then one alpha through all of these fixed weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from agwm_jax.core import trees
from agwm_jax.core.inner import InnerState, apply_gradient
from agwm_jax.core.mixup import anchor_penalty
from agwm_jax.core.types import Alpha, Scalar
from agwm_jax.methods.interface import Context, Hooks, Info, Phase, Plan, Setup, Variables
from agwm_jax.methods.mixup import ALPHA, Mixture
from agwm_jax.methods.training import TASK, training_phase

SPLITS = "splits"
"""The collection of the weights W of every split, ``[K, ...]`` by path."""


def weights_phase(
    setup: Setup, mixture: Mixture, plan: Plan, *, tx: optax.GradientTransformation, anchor: float
) -> Phase:
    """W of all splits side by side, each trained on its own part from the same start, through the mixture at alpha.

    Args:
        setup: of the method; its techniques act here.
        mixture: whose gate stays where it starts.
        plan: ``{"train": [steps, K, b]}``.
        tx: optimiser of each W.
        anchor: of ``anchor/2 |W - W0|^2`` over the mixed weights.

    Cost: K fb a step. What it leaves is `SPLITS`, beside the start of W.
    """
    count = plan["train"].shape[1]

    def penalty(context: Context, variables: Variables) -> Scalar:
        changes = {path: variables[TASK][path] - context.pretrained[path] for path in mixture.mixed}
        return anchor_penalty(changes, anchor)

    one = training_phase(
        setup,
        name="weights",
        plan={"train": plan["train"][:, 0]},
        tx=tx,
        forward=mixture.forward,
        hooks=(Hooks(penalty=penalty),) if anchor else (),
    )

    def start(context: Context, key: Key[Array, ""]) -> InnerState:
        return several(one.start(context, key), count)

    def step(state: InnerState, context: Context, batches, key, step) -> tuple[InnerState, Info]:
        keys = jax.random.split(key, count)
        state, info = jax.vmap(one.step, in_axes=(0, None, 0, 0, None))(state, context, batches, keys, step)
        return state, jax.tree.map(lambda x: x.mean(axis=0), info)

    def finish(context: Context, state: InnerState) -> Variables:
        return {**{name: context.learnt[name] for name in (TASK, ALPHA)}, SPLITS: state.params[TASK]}

    return one._replace(plan=plan, start=start, step=step, finish=finish)


def alpha_phase(
    setup: Setup,
    mixture: Mixture,
    plan: Plan,
    *,
    tx: optax.GradientTransformation,
    leave: Callable[[Context, Any], Any],
) -> Phase:
    """Alpha on ``mean_k L_k(mix(W0, W_k, alpha))``, the loss of every split's validation part, by its own gradient.

    W_k is fixed, so that alpha acts through the mixture alone and the gradient is exact.

    Args:
        setup: of the method.
        mixture: whose alpha is fitted.
        plan: ``{"outer": [steps, K, b]}``.
        tx: optimiser of alpha.
        leave: ``leave(context, weights of all splits) -> task weights`` that the phase leaves beside alpha.

    Cost: K fb a step at most.
    """
    loss = setup.loss(reverse_only=True)

    def start(context: Context, key: Key[Array, ""]) -> InnerState:
        del key
        return InnerState(context.learnt[ALPHA], tx.init(context.learnt[ALPHA]))

    def step(state: InnerState, context: Context, batches, key, step) -> tuple[InnerState, Info]:
        del step

        def out_of_split(alpha: Alpha) -> Scalar:
            def of_one(task, batch) -> Scalar:
                variables = {TASK: task, ALPHA: alpha}
                return loss(mixture.forward(context.pretrained, variables, key), batch)

            return jax.vmap(of_one)(context.learnt[SPLITS], batches["outer"]).mean()

        value, grads = jax.value_and_grad(out_of_split)(state.params)
        alpha, opt_state = apply_gradient(tx, state, grads)
        info = {"loss": value, "outer_loss": value, "hypergradient_norm": trees.norm(grads)}
        return InnerState(mixture.project(alpha), opt_state), info

    def finish(context: Context, state: InnerState) -> Variables:
        return {TASK: leave(context, context.learnt[SPLITS]), ALPHA: state.params}

    return Phase("search", plan, start, step, finish, monitor=lambda state: mixture.statistics(state.params))


def several(tree: Any, count: int) -> Any:
    """The same arrays for each of `count` splits, along a leading axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), tree)
