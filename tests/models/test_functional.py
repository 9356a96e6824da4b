"""Functional form of a module: paths, purity, and refusal of foreign parameters."""

import doctest

import jax
import jax.numpy as jnp
import pytest
from small_models import SMALL, batch_of, build

import agwm_jax.models.functional
from agwm_jax.errors import AgwmError

PATHS = {
    "embeddings.word.embedding": (50, 32),
    "embeddings.position.embedding": (16, 32),
    "embeddings.token_type.embedding": (2, 32),
    "embeddings.norm.scale": (32,),
    "embeddings.norm.bias": (32,),
    **{f"encoder.layers.{n}.kernel": (2, 32, 32) for n in ("query", "key", "value", "attention_output")},
    **{f"encoder.layers.{n}.bias": (2, 32) for n in ("query", "key", "value", "attention_output", "output")},
    "encoder.layers.intermediate.kernel": (2, 32, 64),
    "encoder.layers.intermediate.bias": (2, 64),
    "encoder.layers.output.kernel": (2, 64, 32),
    **{f"encoder.layers.{n}.{v}": (2, 32) for n in ("attention_norm", "output_norm") for v in ("scale", "bias")},
    "pooler.kernel": (32, 32),
    "pooler.bias": (32,),
    "classifier.kernel": (32, 3),
    "classifier.bias": (3,),
}


def test_paths_and_shapes():
    _, params = build(SMALL["gelu"])
    assert {path: value.shape for path, value in params.items()} == PATHS


def test_logits_depend_on_the_parameters_given():
    """Not on those the module was built with: every path has a gradient, and a call leaves nothing behind."""
    small = SMALL["gelu"]
    model, params = build(small)
    batch = batch_of(small)
    apply = jax.jit(model.apply)
    gradient = jax.grad(lambda p: (apply(p, batch) ** 2).sum())(params)
    assert all(jnp.abs(value).max() > 0 for value in gradient.values())
    first = apply(params, batch)
    other = apply({path: 2 * value for path, value in params.items()}, batch)
    assert not jnp.array_equal(first, other)
    assert jnp.array_equal(first, apply(params, batch))


def test_foreign_parameters_are_refused():
    small = SMALL["gelu"]
    model, params = build(small)
    del params["pooler.bias"]
    with pytest.raises(AgwmError, match=r"missing pooler.bias, unknown pooler.offset"):
        model.apply(params | {"pooler.offset": jnp.zeros(32)}, batch_of(small))


def test_example_in_the_docstring():
    results = doctest.testmod(agwm_jax.models.functional)
    assert results.attempted > 0
    assert results.failed == 0
