"""Estimators of the hypergradient: how to differentiate the outer loss through a given inner solve.

Notation: inner variable w, outer variable o, inner loss f, outer loss g, ``v = d_w g``, ``H = d2_ww f``,
``J = d2_ow f``; the hypergradient is ``d_o g - J x`` with ``x ~ H^-1 v``. Costs are in fb, one forward and backward
pass of a batch, with the look-ahead update included.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core.linear_solve import LinearSolver
from agwm_jax.core.types import Batch, Problem, Scalar
from agwm_jax.errors import AgwmError


class InnerState(NamedTuple):
    """The inner variable and its optimiser's state."""

    params: Any
    opt_state: optax.OptState


InnerUpdate = Callable[[InnerState, Any, Batch], tuple[InnerState, Scalar]]
"""``update(inner, outer, batch) -> (inner, loss)``: one step of the inner optimiser."""


class Estimate(NamedTuple):
    """What an estimator returns."""

    hypergradient: Any
    """Structure, shapes and dtypes of the outer variable."""
    inner: InnerState
    """After the look-ahead."""
    state: Any
    """The estimator's own, for the next outer step."""
    info: dict[str, Scalar]
    """``inner_loss``, ``outer_loss`` and, where a linear system is solved, ``residual``: ``|Hx - v| / |v|``."""


class Hypergradient(NamedTuple):
    """A pair of pure functions, made by the factories of this module."""

    init: Callable[[Any, Any], Any]
    """``init(inner_params, outer) -> state``."""
    estimate: Callable[..., Estimate]
    """``estimate(problem, update, inner, outer, inner_batches, outer_batch, state) -> Estimate``.

    Takes the look-ahead itself (one update a batch of `inner_batches`, whose leaves carry a leading axis ``[k, ...]``),
    because reverse mode must see it.
    """


def inner_steps(update: InnerUpdate, inner: InnerState, outer, batches: Batch) -> tuple[InnerState, Any]:
    """One inner update a batch; `batches` carries a leading axis [k, ...]. Returns the state and the losses [k]."""
    return jax.lax.scan(lambda state, batch: update(state, outer, batch), inner, batches)


def first_order() -> Hypergradient:
    """The direct term ``d_o g`` alone, after the look-ahead: x = 0.

    Cost 2 fb; memory of a plain step. Right where the outer variable acts on g mostly directly; blind to the inner
    response. The first-order variant of DARTS (Liu et al. 2019, arXiv 1806.09055).
    """

    def estimate(problem: Problem, update: InnerUpdate, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        inner, losses = inner_steps(update, inner, outer, inner_batches)
        value, hypergradient = jax.value_and_grad(problem.outer_loss, argnums=1)(inner.params, outer, outer_batch)
        return Estimate(hypergradient, inner, state, {"inner_loss": jnp.mean(losses), "outer_loss": value})

    return Hypergradient(_stateless, estimate)


def unrolled(*, num_steps: int | None = None, remat: bool = False) -> Hypergradient:
    """Reverse mode through the last k updates of the look-ahead, the optimiser itself included.

    Cost 3k + 1 fb, and k more with `remat`. Memory grows with k: every step keeps its activations, or with `remat` only
    the weights between steps. Exact for what the look-ahead really does (Franceschi et al. 2017, arXiv 1703.01785;
    truncated: Shaban et al. 2019, arXiv 1810.10667). An Adam needs ``eps_root > 0``: its first step is
    ``sign(g)``, where ``sqrt(0)`` has no derivative.

    Args:
        num_steps: k; all steps of the look-ahead by default.
        remat: recompute each step in the backward pass instead of keeping its activations.

    Raises:
        AgwmError: `num_steps` below 1, or at the first trace more than the look-ahead has.
    """
    if num_steps is not None and num_steps < 1:
        raise AgwmError(f"unrolled(num_steps={num_steps}): expected 1 step or more.")

    def estimate(problem: Problem, update: InnerUpdate, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        total = jax.tree.leaves(inner_batches)[0].shape[0]
        last = total if num_steps is None else num_steps
        if last > total:
            raise AgwmError(f"unrolled(num_steps={last}): the look-ahead has {total} inner steps; lower num_steps.")
        constant = jax.tree.map(lambda x: x[: total - last], inner_batches)
        differentiated = jax.tree.map(lambda x: x[total - last :], inner_batches)
        inner, early_losses = inner_steps(update, inner, outer, constant)
        step = jax.checkpoint(update) if remat else update

        def outer_loss(outer):
            after, losses = inner_steps(step, inner, outer, differentiated)
            return problem.outer_loss(after.params, outer, outer_batch), (after, losses)

        (value, (after, losses)), hypergradient = jax.value_and_grad(outer_loss, has_aux=True)(outer)
        inner_loss = jnp.mean(jnp.concatenate([early_losses, losses]))
        return Estimate(hypergradient, after, state, {"inner_loss": inner_loss, "outer_loss": value})

    return Hypergradient(_stateless, estimate)


def implicit(solver: LinearSolver) -> Hypergradient:
    """Implicit differentiation at the end of the look-ahead: ``d_o g - J x`` with x from `solver`.

    H and J are those of the inner loss on the last inner batch. The joint gradient ``w -> (d_w f, d_o f)`` is
    linearised once; a product with it costs 2 fb, and one application to the solution gives ``J x`` and the residual.
    With ``neumann(num_terms=K)``: 2K + 3 fb, and the activations of one forward and backward pass kept for the products
    (Lorraine et al. 2020, arXiv 1911.02590; Pedregosa 2016, arXiv 1602.02355).

    Args:
        solver: of ``H x = v``: `neumann` or `dense` of `agwm_jax.core.linear_solve`.
    """

    def estimate(problem: Problem, update: InnerUpdate, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        inner, losses = inner_steps(update, inner, outer, inner_batches)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(inner.params, outer, outer_batch)

        batch = jax.tree.map(lambda x: x[-1], inner_batches)
        _, product = jax.linearize(
            lambda w: jax.grad(problem.inner_loss, argnums=(0, 1))(w, outer, batch), inner.params
        )
        x = solver.solve(lambda p: product(p)[0], v)
        hx, jx = product(x)
        v_norm = optax.tree.norm(v)
        # Where the outer loss does not see the inner variable, v = x = 0 solves the system: residual 0, not 0 / 0.
        residual = optax.tree.norm(optax.tree.sub(hx, v)) / jnp.where(v_norm > 0, v_norm, 1)
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value, "residual": residual}
        return Estimate(optax.tree.sub(direct, jx), inner, state, info)

    return Hypergradient(_stateless, estimate)


def _stateless(inner_params, outer) -> tuple[()]:
    del inner_params, outer
    return ()
