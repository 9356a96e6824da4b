"""A scan that keeps of its steps, for a second scan that goes back over them, only what differs from step to step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import PyTree


class Scanned(NamedTuple):
    """What `scan_keeping` returns."""

    carry: PyTree
    """After the last step."""
    ys: PyTree
    """Of every step, leaves ``[k, ...]``."""
    stack: list[Any]
    """What has to be kept of every step, ``[k, ...]`` each."""
    restore: Callable[[list[Any], PyTree], PyTree]
    """``restore(stack, x) -> kept``, of one step: its part of the stack, and of the data."""


def scan_keeping(body: Callable[[Any, Any], tuple[Any, tuple[Any, Any]]], init: PyTree, xs: PyTree) -> Scanned:
    """`lax.scan` of ``body(carry, x) -> (carry, (y, kept))``, for a scan in reverse that needs `kept` again.

    What a step's linearisation keeps is in great part the same for all steps: data that the loss closes over, gates,
    W0. `lax.scan` would stack it once a step. Here what does not depend on the step is computed once, before the
    loop; what is a part of `xs` is read there again; and what is kept twice is stacked once.

    A function that is jitted by itself within `body` counts as one operation: if any of its arguments differs from step
    to step, all that it returns does.
    """
    first = jax.tree.map(lambda x: x[0], xs)
    closed, (_, (y, kept)) = jax.make_jaxpr(body, return_shape=True)(init, first)
    jaxpr = closed.jaxpr
    num_carry, num_kept = len(jax.tree.leaves(init)), len(jax.tree.leaves(kept))
    results, keeps = jaxpr.outvars[: len(jaxpr.outvars) - num_kept], jaxpr.outvars[len(jaxpr.outvars) - num_kept :]

    differs, same = set(jaxpr.invars), []
    for equation in jaxpr.eqns:
        if equation.effects or any(x in differs for x in equation.invars if not isinstance(x, Literal)):
            differs.update(equation.outvars)
        else:
            same.append(equation)
    once = [isinstance(x, Literal) or x not in differs for x in keeps]
    fixed = jaxpr.replace(eqns=same, invars=[], outvars=[x for x, known in zip(keeps, once, strict=True) if known])
    constants = jaxpr_as_fun(ClosedJaxpr(fixed, closed.consts))()
    data = jaxpr.invars[num_carry:]
    varying = dict.fromkeys(x for x, known in zip(keeps, once, strict=True) if not known)
    stacked = [x for x in varying if x not in data]
    run = jaxpr_as_fun(ClosedJaxpr(jaxpr.replace(outvars=[*results, *stacked]), closed.consts))

    def step(carry: list[Any], x: Any) -> tuple[list[Any], tuple[list[Any], list[Any]]]:
        out = run(*carry, *jax.tree.leaves(x))
        return out[:num_carry], (out[num_carry : len(results)], out[len(results) :])

    def restore(stack: list[Any], x: Any) -> Any:
        own = dict(zip([*stacked, *data], [*stack, *jax.tree.leaves(x)], strict=True))
        constant = iter(constants)
        leaves = [next(constant) if known else own[x] for x, known in zip(keeps, once, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(kept), leaves)

    carry, (ys, stack) = jax.lax.scan(step, jax.tree.leaves(init), xs)
    return Scanned(
        jax.tree.unflatten(jax.tree.structure(init), carry),
        jax.tree.unflatten(jax.tree.structure(y), ys),
        stack,
        restore,
    )
