"""What a GPU does to float32 matrix products by default, on any device: TF32, operands of 10 bits of mantissa."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun


def in_tf32(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with the operands of every float32 product rounded, but for those that ask for the highest precision."""

    def emulated(*args):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(_rounded(closed))(*jax.tree.leaves(args)))

    return emulated


def _rounded(closed: ClosedJaxpr) -> ClosedJaxpr:
    def evaluate(*args):
        env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        env.update(zip(closed.jaxpr.invars, args, strict=True))
        for equation in closed.jaxpr.eqns:
            operands = [atom.val if isinstance(atom, Literal) else env[atom] for atom in equation.invars]
            if equation.primitive.name == "dot_general" and not _asks_for_all(equation.params["precision"]):
                operands = [jax.lax.reduce_precision(x, 8, 10) if x.dtype == "float32" else x for x in operands]
            env.update(zip(equation.outvars, _apply(equation, operands), strict=True))
        return [atom.val if isinstance(atom, Literal) else env[atom] for atom in closed.jaxpr.outvars]

    return jax.make_jaxpr(evaluate)(*[jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in closed.jaxpr.invars])


def _apply(equation, operands):
    equation = equation.replace(params={name: _inside(value) for name, value in equation.params.items()})
    out = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))
    return out if equation.primitive.multiple_results else [out]


def _inside(value):
    if isinstance(value, ClosedJaxpr):
        return _rounded(value)
    if isinstance(value, Jaxpr):
        return _rounded(ClosedJaxpr(value, ())).jaxpr
    return tuple(map(_inside, value)) if type(value) is tuple else value  # a NamedTuple holds no program


def _asks_for_all(precision) -> bool:
    return precision is not None and all(p == jax.lax.Precision.HIGHEST for p in precision)
