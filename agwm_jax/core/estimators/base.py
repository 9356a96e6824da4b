"""The interface of every estimator, and their registry."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

from agwm_jax.core.inner import InnerSolve, InnerState
from agwm_jax.core.types import Batch, Info, Problem, Vector
from agwm_jax.registry import Registry


class Estimate(NamedTuple):
    """What an estimator returns."""

    hypergradient: Vector
    """Structure, shapes and dtypes of the outer variable."""
    inner: InnerState
    """After the inner solve."""
    state: PyTree
    """The estimator's own, for the next outer step."""
    info: Info
    """``inner_loss``, ``outer_loss`` and, where a linear system is solved, ``residual``: ``|Bx - v| / |v|`` with B the
    Hessian or its Gauss-Newton part. x = 0 has residual 1: above 1 the solve has made things worse."""


class Estimator(NamedTuple):
    """Pure functions that differentiate an inner solve, made by a factory of `agwm_jax.hypergrad`."""

    init: Callable[[InnerState, Vector], PyTree]
    """``init(inner, outer) -> state``; shares no buffer with its arguments."""
    estimate: Callable[[Problem, InnerSolve, InnerState, Vector, Batch, Batch, Any], Estimate]
    """``estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate``.

    Runs the solve itself (leaves of `inner_batches` carry a leading axis ``[k, ...]``), because reverse mode must see
    every step of it.
    """
    forward_mode: bool
    """Whether it differentiates the losses in forward mode, or twice: then their kernels need rules for that."""
    through_optimizer: bool = False
    """Whether it differentiates the optimiser's own dependence on the outer variable (`InnerSolve.reads_outer`)."""
    retake: Callable[[Problem, InnerSolve, Any, Vector, Batch, Batch], PyTree] | None = None
    """``retake(problem, solve, state, outer, inner_batches, outer_batch) -> state``, for an estimator that carries an
    inner variable of its own: its next state where the inner steps are taken anew at the new outer variable, given the
    state from before the step."""


ESTIMATORS: Registry[Callable[..., Estimator]] = Registry("estimator", "estimators", "agwm_jax.core.estimators")


def stateless(inner: InnerState, outer: Vector) -> tuple[()]:
    """``init`` of an estimator that carries nothing from one outer step to the next."""
    del inner, outer
    return ()
