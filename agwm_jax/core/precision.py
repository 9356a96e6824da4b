"""The precision of what is differenced: full precision of products, and a refusal where there is none to be had."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from agwm_jax.errors import AgwmError


class TooNarrow(AgwmError):
    """A difference is asked of what computes in less than float32."""


class Precise(NamedTuple):
    """A function whose values may be subtracted from each other."""

    call: Callable[..., Any]
    eps: float
    """Of the narrowest float dtype that it computes in."""


def precise(name: str, fn: Callable[..., Any], *args: Any) -> Precise:
    """`fn` with all matrix products at full precision, traced once for arguments like `args`.

    By default a float32 product of a GPU is TF32 and one of a TPU bfloat16; a difference of two gradients, over a step
    as short as a derivative wants it, is then a difference of their roundings.

    Args:
        name: what takes the difference, for the error.
        fn: of pytrees of arrays.
        args: examples of its arguments.

    Raises:
        TooNarrow: it computes in less than float32, where no setting helps.
    """
    with jax.default_matmul_precision("highest"):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    inputs = {jnp.result_type(leaf) for leaf in jax.tree.leaves(args)}
    floats = {dtype for dtype in {*inputs, *_dtypes(closed.jaxpr)} if jnp.issubdtype(dtype, jnp.floating)}
    eps = max(float(jnp.finfo(dtype).eps) for dtype in floats)
    if eps > jnp.finfo(jnp.float32).eps:
        coarse = max(floats, key=lambda dtype: float(jnp.finfo(dtype).eps))
        raise TooNarrow(
            f"{name} subtracts gradients that are almost equal, and the inner loss computes in {coarse}, where what is "
            "left is rounding: keep weights and computation in float32, or choose an estimator without differences "
            "(hvp='linearize' or 'jvp')."
        )

    def call(*args):
        return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(closed)(*jax.tree.leaves(args)))

    return Precise(call, eps)


def _dtypes(jaxpr) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (variable.aval.dtype for variable in equation.outvars if hasattr(variable.aval, "dtype"))
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _dtypes(inner)
