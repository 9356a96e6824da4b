"""What a program costs, counted from what it computes and not from what a clock says."""

import math
from collections.abc import Callable

import jax
from jax.extend.core import Literal
from jax.interpreters import partial_eval

from agwm_jax.errors import AgwmError


def matmul_flops(fn: Callable, *args) -> int:
    """Floating-point operations of all matrix products that ``fn(*args)`` really runs.

    Traces and compiles nothing: code whose result is not used is dropped, the body of a loop counts as often as it
    turns, of alternative branches the dearest counts, a sharded body once a shard. Factorisations count nothing.
    Arguments may be `jax.ShapeDtypeStruct`.

    Raises:
        AgwmError: a while loop that does not count from 0 to a fixed number, or a convolution or ragged product.
    """
    return _flops(_used(jax.make_jaxpr(fn)(*args).jaxpr))


def _used(jaxpr):
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)[0]


def _flops(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        if kind == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif kind == "while":
            total += _turns(equation) * _flops(_used(params["body_jaxpr"].jaxpr))
        elif kind in ("conv_general_dilated", "ragged_dot", "ragged_dot_general"):
            raise AgwmError(f"matmul_flops: {kind} is not counted; expected matrix products only.")
        elif kind == "cond":
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = [getattr(value, "jaxpr", value) for value in params.values()]
            times = params.get("length", 1)
            if kind == "shard_map":
                times = math.prod(params["mesh"].shape[axis] for axis in params["manual_axes"])
            total += times * sum(_flops(x) for x in inner if hasattr(x, "eqns"))
    return total


def _turns(equation) -> int:
    """How often a while loop ``(0, ...)``, ``i < n`` turns."""
    condition, start = equation.params["cond_jaxpr"].jaxpr, equation.invars[-len(equation.outvars)]
    if len(condition.eqns) == 1 and condition.eqns[0].primitive.name == "lt":
        counter, end = condition.eqns[0].invars
        counts = counter is condition.invars[-len(equation.outvars)] and isinstance(start, Literal) and start.val == 0
        if counts and isinstance(end, Literal):
            return int(end.val)
    raise AgwmError("matmul_flops: how often a while loop turns is not known; expected scans, or a count to a number.")
