"""What a function reads of its arguments, and which of its results are an argument as it came."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun


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

    What only dead code reads is not read, also within a function that is jitted by itself; of a loop or a branch all
    that goes in is.

    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((2,), jnp.float32)
    >>> dependence(lambda a, b, c: (a + b, c, (b * c, a)[1]), x, x, x, by_name=True)[:2]
    ((True, True, False), (None, 2, 0))
    """
    closed, result = jax.make_jaxpr(fn, return_shape=True)(*args)
    jaxpr = closed.jaxpr
    places = {var: place for place, var in enumerate(jaxpr.invars)}
    passes = tuple(places.get(var) if isinstance(var, Var) else None for var in jaxpr.outvars)
    return Dependence(_read(jaxpr, [place is None or not by_name for place in passes]), passes, result, closed)


def _read(jaxpr: Jaxpr, wanted: Sequence[bool]) -> tuple[bool, ...]:
    live = {var for var, is_wanted in zip(jaxpr.outvars, wanted, strict=True) if is_wanted and isinstance(var, Var)}
    for eqn in reversed(jaxpr.eqns):
        made = [var in live for var in eqn.outvars]
        if not any(made) and not eqn.effects:
            continue
        inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "pjit") else None
        used = [True] * len(eqn.invars) if inner is None else _read(inner.jaxpr, made)
        live |= {var for var, is_used in zip(eqn.invars, used, strict=True) if is_used and isinstance(var, Var)}
    return tuple(var in live for var in jaxpr.invars)
