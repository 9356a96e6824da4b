"""What a function reads of its arguments, and which of its results are an argument as it came."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun
from jax.interpreters import partial_eval


class Dependence(NamedTuple):
    """How a function's results depend on its arguments, leaf by leaf."""

    reads: tuple[bool, ...]
    """One a leaf of the arguments: whether a result depends on it."""
    passes: tuple[int | None, ...]
    """One a leaf of the result: the argument that it is, or None where it is computed."""
    result: Any
    """Shapes of the result."""
    traced: ClosedJaxpr

    def __call__(self, *args: Any) -> Any:
        """The function, not traced anew, for arguments of the same shapes."""
        return jax.tree.unflatten(jax.tree.structure(self.result), jaxpr_as_fun(self.traced)(*jax.tree.leaves(args)))


def dependence(fn: Callable[..., Any], *args: Any, by_name: bool = False) -> Dependence:
    """Trace `fn` for arguments of these shapes; with `by_name`, to pass an argument on as it came does not read it.

    What only dead code reads is not read, also within a function that is jitted by itself, or in a loop.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((2,), jnp.float32)
    >>> dependence(lambda a, b, c: (a + b, c, (b * c, a)[1]), x, x, x, by_name=True)[:2]
    ((True, True, False), (None, 2, 0))
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    places = {var: place for place, var in enumerate(jaxpr.invars)}
    passes = tuple(places.get(var) if isinstance(var, Var) else None for var in jaxpr.outvars)
    _, reads = partial_eval.dce_jaxpr(jaxpr, [place is None or not by_name for place in passes])
    return Dependence(tuple(reads), passes, result, closed)
