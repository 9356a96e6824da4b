"""The parts of an encoder: plain formulas differentiated by JAX are the reference of their values and derivatives."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import equations

from agwm_jax.models.layers import attention, gelu, layer_norm, linear, local_attention, rms_norm, softmax


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _plain_layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3) * scale[None, None] + bias[
        None, None
    ]


def _plain_attention(query, keys, value, bias):
    scores = jnp.einsum("bqhe,bkhe->bhqk", query, keys) / query.shape[-1] ** 0.5 + bias
    return jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(scores), value)


PADDED = jnp.array([[0.0] * 5, [0.0, 0.0, *[jnp.finfo(jnp.float32).min] * 3]])[:, None, None]
LONG = np.arange(17)[None] < np.array([17, 11])[:, None]  # no multiple of the reach, and more than three of it
NEAR = np.abs(np.arange(17)[:, None] - np.arange(17)[None]) <= 3
PARTS = {
    "softmax": (softmax, jax.nn.softmax, (3 * _normal(0, 4, 7),)),
    "gelu": (gelu, partial(jax.nn.gelu, approximate=False), (3 * _normal(1, 5, 6),)),
    "layer_norm": (
        partial(layer_norm, epsilon=1e-3),
        _plain_layer_norm,
        (2 + _normal(2, 3, 2, 8), 1 + _normal(3, 8), _normal(4, 8)),
    ),
    "rms_norm": (
        partial(rms_norm, epsilon=1e-3),
        lambda x, scale: x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * scale[None, None],
        (2 + _normal(2, 3, 2, 8), 1 + _normal(3, 8)),
    ),
    "local_attention": (
        lambda *heads: local_attention(*heads, jnp.asarray(LONG), reach=3, rate=0.0, key=None) * LONG[..., None, None],
        lambda *heads: (
            _plain_attention(*heads, jnp.where(LONG[:, None, None] & NEAR, 0, -1e30)) * LONG[..., None, None]
        ),
        tuple(_normal(seed, 2, 17, 2, 4) for seed in (8, 9, 10)),
    ),
    "linear": (
        linear,
        lambda x, kernel, bias: jnp.einsum("btd,dn->btn", x, kernel) + bias[None, None],
        (_normal(5, 2, 3, 4), _normal(6, 4, 5), _normal(7, 5)),
    ),
    "attention": (
        lambda *heads: attention(*heads, PADDED, rate=0.0, key=None),
        lambda *heads: _plain_attention(*heads, PADDED),
        tuple(_normal(seed, 2, 5, 3, 4) for seed in (8, 9, 10)),
    ),
}


def _derivatives(part, arguments):
    """Value, first derivatives in both modes, and a Hessian-vector product in each order of the modes."""
    weight = _normal(11, *jax.eval_shape(part, *arguments).shape)
    along = tuple(_normal(12 + i, *x.shape) for i, x in enumerate(arguments))

    def loss(*arguments):
        return jnp.vdot(weight, part(*arguments) ** 2)

    def slope(*arguments):
        return jax.jvp(loss, arguments, along)[1]

    grad = jax.grad(loss, tuple(range(len(arguments))))
    return part(*arguments), slope(*arguments), jax.jvp(grad, arguments, along), jax.grad(slope)(*arguments)


@pytest.mark.parametrize("name", PARTS)
def test_values_and_derivatives_to_second_order_are_those_of_the_plain_formula(name):
    part, plain, arguments = PARTS[name]
    found, expected = (jax.jit(partial(_derivatives, each))(arguments) for each in (part, plain))
    chex.assert_trees_all_close(found, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["softmax", "gelu", "layer_norm", "rms_norm"])
def test_the_backward_pass_keeps_no_more_than_the_rule_needs(name):
    part, _, arguments = PARTS[name]
    kept = jax.tree.leaves(jax.vjp(part, *arguments)[1])
    large = [x for x in kept if x.size >= arguments[0].size]
    assert len(large) == 1, [x.shape for x in kept]


@pytest.mark.parametrize("name", ["gelu", "layer_norm", "linear", "attention"])
def test_narrow_arguments_give_narrow_results_rounded_once_from_float32(name):
    part, plain, arguments = PARTS[name]
    narrow = tuple(x.astype(jnp.bfloat16) for x in arguments)
    found = jax.jit(part)(*narrow)
    assert found.dtype == jnp.bfloat16
    expected = jax.jit(plain)(*(x.astype(jnp.float32) for x in narrow))
    tolerance = {"gelu": 2**-8, "layer_norm": 2**-8}.get(name, 2**-6)
    chex.assert_trees_all_close(found.astype(jnp.float32), expected, rtol=tolerance, atol=2 * tolerance)


def test_gelu_in_the_tails():
    far = jnp.array([-40.0, -9.0, 9.0, 40.0])
    value, slope = jax.vmap(jax.value_and_grad(gelu))(far)
    chex.assert_trees_all_close(
        (value, slope), (jnp.array([0.0, 0.0, 9.0, 40.0]), jnp.array([0.0, 0.0, 1.0, 1.0])), atol=1e-15
    )


def test_equal_entries_of_a_row_leave_finite_derivatives():
    part = partial(layer_norm, epsilon=1e-12)
    arguments = jnp.ones((2, 4)), jnp.ones(4), jnp.zeros(4)
    chex.assert_tree_all_finite(jax.jit(partial(_derivatives, part))(arguments))


def test_local_attention_of_a_long_text_has_no_whole_score_matrix():
    heads = [jax.ShapeDtypeStruct((1, 400, 2, 4), jnp.float32)] * 3

    def attended(*heads):
        return local_attention(*heads, jnp.ones((1, 400), bool), reach=8, rate=0.0, key=None)

    sizes = [variable.aval.size for e in equations(jax.make_jaxpr(attended)(*heads)) for variable in e.outvars]
    assert max(sizes) <= 2 * 400 * 3 * 8, "blocks of 8 queries and 24 keys, of two heads"
