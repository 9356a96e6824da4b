"""Reverse and forward mode through one update of an optimiser, safe where a root in it has no derivative."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

from agwm_jax.core.inner import InnerState
from agwm_jax.core.types import Vector

_ROOTS = ("sqrt", "rsqrt", "cbrt", "pow")

_STEEP = 1e30
"""A slope above it is none: a square root's is below it at any float32 but 0, that of an inverse root not at the 1e-30
that an Adafactor adds to squares which are 0."""


def update_vjp(
    update: Callable[[InnerState, Vector], InnerState], inner: InnerState, grads: Vector, cotangent: InnerState
) -> tuple[Vector, InnerState]:
    """Transposed Jacobian of an update, of its gradient and its state, times a cotangent of its result.

    ``update(state, grads)`` may take for `grads` any tree of arrays, such as a pair of gradient and outer variable.

    Cotangents of an optimiser's state hold None where it has no floats (a step count): see `float_leaves`. No loss is
    evaluated: what this costs grows with the weights, not with the batch.

    Where a second moment is exactly 0 (a word that no batch has shown yet) the update of an Adam is
    ``0 / (sqrt(0) + eps)``. Plain reverse mode makes NaN of it, and the quotient's own derivative of 1 / eps says
    nothing of gradients that are larger than eps: an update by signs has derivative 0, and so has this one. Elsewhere
    it is the derivative.
    """

    _, vjp = jax.vjp(*_differentiable(update, inner, grads))
    of_grads, of_params, of_opt_state = vjp((cotangent.params, cotangent.opt_state))
    return of_grads, InnerState(of_params, of_opt_state)


def update_jvp(
    update: Callable[[InnerState, Vector], InnerState], inner: InnerState, grads: Vector
) -> Callable[[InnerState, Vector], InnerState]:
    """Jacobian of an update: ``push(tangent of inner, tangent of grads) -> tangent of the result``.

    As `update_vjp`, with the same guard: tangents of an optimiser's state hold None where it has no floats.
    """
    _, push = jax.linearize(*_differentiable(update, inner, grads))

    def pushed(of_inner: InnerState, of_grads: Vector) -> InnerState:
        return InnerState(*push(of_grads, of_inner.params, of_inner.opt_state))

    return pushed


def _differentiable(update, inner: InnerState, grads: Vector) -> tuple[Any, ...]:
    """The update as a function of gradient, weights and the floats of its state, guarded; and these."""

    def after(grads, params, opt_floats):
        result = update(InnerState(params, _with_floats(inner.opt_state, opt_floats)), grads)
        return result.params, float_leaves(result.opt_state)

    return _guarded(after), grads, inner.params, float_leaves(inner.opt_state)


def cotangent_of(params: Vector, opt_state: optax.OptState) -> InnerState:
    """The cotangent of a state of which only the weights are used."""
    return InnerState(params, optax.tree.zeros_like(float_leaves(opt_state)))


def float_leaves(tree: Any) -> Any:
    """The tree with None in place of every leaf that has no derivative."""
    return jax.tree.map(lambda x: x if jnp.issubdtype(jnp.result_type(x), jnp.floating) else None, tree)


def _with_floats(tree: Any, floats: Any) -> Any:
    return jax.tree.map(lambda new, old: old if new is None else new, floats, tree, is_leaf=lambda x: x is None)


def _guarded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` for differentiation alone: a root without a slope is taken for a huge constant, an inverse root for 0.

    What divides by such a root so has derivative 0. Comparisons and step counts see the true values.
    """

    def guarded(*args):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        leaves = jax.tree.leaves(args)
        true = [jax.lax.stop_gradient(leaf) for leaf in leaves]
        _, results = _evaluate(closed.jaxpr, closed.consts, true, leaves)
        return jax.tree.unflatten(jax.tree.structure(out), results)

    return guarded


def _evaluate(jaxpr, consts, true_inputs, inputs) -> tuple[list, list]:
    """Outputs at the true values, and those that are differentiated. Loops inside are left as they are."""
    true: dict[Any, Any] = {}
    guarded: dict[Any, Any] = {}

    def read(env, atom):
        return atom.val if isinstance(atom, Literal) else env[atom]

    true.update(zip(jaxpr.constvars, map(jax.lax.stop_gradient, consts), strict=True))
    guarded.update(zip(jaxpr.constvars, consts, strict=True))
    true.update(zip(jaxpr.invars, true_inputs, strict=True))
    guarded.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        at_true = [read(true, atom) for atom in equation.invars]
        at = [read(guarded, atom) for atom in equation.invars]
        exact, results = _apply(equation, at_true, at)
        for variable, value, result in zip(equation.outvars, exact, results, strict=True):
            true[variable] = value
            guarded[variable] = result if jnp.issubdtype(variable.aval.dtype, jnp.floating) else value
    return [read(true, atom) for atom in jaxpr.outvars], [read(guarded, atom) for atom in jaxpr.outvars]


def _apply(equation, at_true: list, at: list) -> tuple[list, list]:
    kind, params = equation.primitive.name, equation.params
    if kind in ("jit", "pjit", "closed_call", "remat", "checkpoint"):
        inner = params["jaxpr"]
        return _evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), at_true, at)
    if kind == "cond":

        def branch(closed):
            return lambda operands: _evaluate(closed.jaxpr, closed.consts, *operands)

        return jax.lax.switch(at_true[0], [branch(closed) for closed in params["branches"]], (at_true[1:], at[1:]))

    def bind(operands):
        out = equation.primitive.bind(*operands, **equation.primitive.get_bind_params(params))
        return out if equation.primitive.multiple_results else [out]

    exact = bind(at_true)
    if kind not in _ROOTS or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return exact, bind(at)
    _, slope = jax.jvp(lambda x: bind([x, *at_true[1:]])[0], (at_true[0],), (jnp.ones_like(at_true[0]),))
    smooth = jnp.abs(slope) < _STEEP
    huge = float(jnp.finfo(exact[0].dtype).max) ** 0.5
    constant = jnp.where(exact[0] < 1, huge, 0).astype(exact[0].dtype)
    return exact, [jnp.where(smooth, bind([jnp.where(smooth, at[0], 1), *at[1:]])[0], constant)]
