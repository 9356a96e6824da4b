"""The interface of every estimator."""

from collections.abc import Callable
from typing import Any, NamedTuple

from agwm_jax.core.inner import InnerState
from agwm_jax.core.types import Scalar


class Estimate(NamedTuple):
    """What an estimator returns."""

    hypergradient: Any
    """Structure, shapes and dtypes of the outer variable."""
    inner: InnerState
    """After the look-ahead."""
    state: Any
    """The estimator's own, for the next outer step."""
    info: dict[str, Scalar]
    """``inner_loss``, ``outer_loss`` and, where a linear system is solved, ``residual``: ``|Bx - v| / |v|`` with B the
    Hessian or its Gauss-Newton part. x = 0 has residual 1: above 1 the solve has made things worse."""


class Hypergradient(NamedTuple):
    """Pure functions, made by the factories of `agwm_jax.hypergrad`."""

    init: Callable[[InnerState, Any], Any]
    """``init(inner, outer) -> state``; shares no buffer with its arguments."""
    estimate: Callable[..., Estimate]
    """``estimate(problem, inner_tx, inner, outer, inner_batches, outer_batch, state) -> Estimate``.

    Takes the look-ahead itself (one update of `inner_tx` a batch of `inner_batches`, whose leaves carry a leading axis
    ``[k, ...]``), because reverse mode must see it.
    """
    rollback: Callable[..., Any] | None = None
    """``rollback(problem, inner_tx, state, outer, inner_batches, outer_batch) -> state``, for an estimator that carries
    an inner variable of its own: its next state where the inner updates are taken anew at the new outer variable, given
    the state from before the step."""


def stateless(inner: InnerState, outer) -> tuple[()]:
    """``init`` of an estimator that carries nothing from one outer step to the next."""
    del inner, outer
    return ()
