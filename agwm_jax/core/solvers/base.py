"""The interface of every solver of a linear system, and their registry."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PyTree

from agwm_jax.core.types import Info, Vector
from agwm_jax.registry import Registry

Matvec = Callable[[Vector, Any], Vector]
"""``matvec(p, i) -> B p``; i numbers the products of a solve, for a matrix that is drawn anew for each of them."""


class Solution(NamedTuple):
    """What a solver returns."""

    x: Vector
    """Structure, shapes and dtypes of b."""
    state: PyTree
    """The solver's own, for the next outer step."""
    info: Info
    """Diagnostics, such as a step size that was found."""


class LinearSolver(NamedTuple):
    """A pair of pure functions on pytrees, made by a factory of `agwm_jax.linear_solve`."""

    init: Callable[[Vector], PyTree]
    """``init(like_b) -> state``; shares no buffer with its argument."""
    solve: Callable[[Matvec, Vector, Any], Solution]
    """``solve(matvec, b, state) -> Solution``."""
    resamples: bool = False
    """Whether the matrix may differ from product to product."""


SOLVERS: Registry[Callable[..., LinearSolver]] = Registry("solver", "solvers", "agwm_jax.core.solvers")


def stateless(like: Vector) -> tuple[()]:
    """``init`` of a solver that carries nothing from one solve to the next."""
    del like
    return ()
