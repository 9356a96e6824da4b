"""Reverse mode through one update of any optimiser: against differences of the update, and where that has a kink."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from agwm_jax.core.inner import apply_gradient
from agwm_jax.hypergrad import InnerState, cotangent_of, update_vjp

OPTIMIZERS = {
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.3),
    "amsgrad": optax.amsgrad(0.1),
    "nadam": optax.nadam(0.1),
    "rmsprop": optax.rmsprop(0.1, eps_in_sqrt=False),
    "rmsprop, eps in the root": optax.rmsprop(0.1, momentum=0.9),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lamb": optax.lamb(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(0.1, 0.0, 9))),
    "every other step": optax.MultiSteps(optax.adam(0.1), 1).gradient_transformation(),  # a branch
    "momentum": optax.sgd(0.1, momentum=0.9),
}


def gradients(seed, zeros=True):
    rng = np.random.default_rng(seed)
    rows, bias = rng.normal(size=(3, 2)), rng.normal(size=3)
    if zeros:
        rows[1], bias[0] = 0.0, 0.0
    return {"rows": jnp.asarray(rows), "bias": jnp.asarray(bias)}


def adjoint_and_difference(tx, inner, grads):
    """Of ``c . weights after the update`` in the gradient: ours, and by central differences."""
    update, c = partial(apply_gradient, tx), gradients(9, zeros=False)
    found, _ = jax.jit(
        lambda inner, grads: update_vjp(update, inner, grads, cotangent_of(c, update(inner, grads).opt_state))
    )(inner, grads)

    @jax.jit
    def value(flat):
        after = update(inner, unravel(flat)).params
        return sum(jnp.vdot(c[name], after[name]) for name in c)

    flat, unravel = ravel_pytree(grads)
    steps = 1e-6 * jnp.eye(len(flat))
    expected = jnp.stack([(value(flat + step) - value(flat - step)) / 2e-6 for step in steps])
    return found, unravel(expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_update(x64, name):
    """Where a coordinate is exactly 0, at an optimiser that has seen nothing: 0 if it steps by signs."""
    tx, grads = OPTIMIZERS[name], gradients(0)
    params = gradients(1, zeros=False)
    found, expected = adjoint_and_difference(tx, InnerState(params, tx.init(params)), grads)
    chex.assert_tree_all_finite(found)
    moving = jax.tree.map(lambda g: g != 0, grads)
    chex.assert_trees_all_close(
        *[jax.tree.map(lambda x, m: jnp.where(m, x, 0), tree, moving) for tree in (found, expected)],
        atol=1e-6,
        rtol=1e-4,
    )
    at_zero = np.array([*found["rows"][1], found["bias"][0]])
    if name in ("rmsprop, eps in the root", "momentum"):  # smooth there
        np.testing.assert_allclose(at_zero, [*expected["rows"][1], expected["bias"][0]], rtol=1e-4)
        assert np.all(np.abs(at_zero) > 1e-3)
    else:
        np.testing.assert_allclose(at_zero, 0, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_warm_update_is_differentiated_exactly(x64, name):
    """A coordinate that is 0 now and was not before is as smooth as any other."""
    tx = OPTIMIZERS[name]
    params = gradients(1, zeros=False)
    inner = InnerState(params, tx.init(params))
    for seed in (2, 3):
        inner = apply_gradient(tx, inner, gradients(seed, zeros=False))
    found, expected = adjoint_and_difference(tx, inner, gradients(0))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-8)
    assert np.all(np.abs(found["rows"][1]) > 1e-6)


def test_the_cotangents_of_the_state(x64):
    """Two updates in reverse: what flows through the moments, against differences in the first gradient."""
    tx, first, second = optax.adamw(0.1), gradients(2, zeros=False), gradients(3)
    update, c, params = partial(apply_gradient, tx), gradients(9, zeros=False), gradients(1, zeros=False)
    start = InnerState(params, tx.init(params))
    middle = update(start, first)
    end = update(middle, second)
    _, cotangent = update_vjp(update, middle, second, cotangent_of(c, end.opt_state))
    found, of_start = update_vjp(update, start, first, cotangent)

    def value(grads, params):
        after = update(update(InnerState(params, start.opt_state), grads), second).params
        return sum(jnp.vdot(c[name], after[name]) for name in c)

    expected = jax.grad(value, argnums=(0, 1))(first, params)  # no coordinate of the first gradient is 0
    chex.assert_trees_all_close((found, of_start.params), expected, rtol=1e-10, atol=1e-14)
