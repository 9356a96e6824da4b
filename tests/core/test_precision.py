"""Differences of gradients where products are rounded, and the refusal where nothing is left of them."""

import contextlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, hypergrad, hypergradient, init_alpha
from agwm_jax.core import precision
from agwm_jax.hypergrad import precise
from tests.core.problems import network, neumann
from tests.core.tf32 import in_tf32

SHORT = {
    "finite_difference": hypergrad.finite_difference(radius=2e-3),
    "unrolled": hypergrad.unrolled(hvp="finite_difference"),
    "neumann": neumann(2, 0.5, hvp="finite_difference"),
}
"""Differences over steps that are short beside the weights."""


def responses(estimators):
    """What each adds to the direct term, in float32 and in TF32."""
    net = network()
    alpha = init_alpha(jax.random.key(0), net.partition, noise=0.1)
    moved = {path: w + 0.1 for path, w in net.params.items()}
    inner_batches, outer_batch = net.batches(0, 1), net.batches(9)

    def all_of_them():
        found = [
            hypergradient(
                net.problem(net.params), e, moved, alpha, inner_batches, outer_batch, inner_tx=optax.sgd(0.5)
            ).hypergradient
            for e in (hypergrad.first_order(), *estimators)
        ]
        direct, *rest = [jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)]) for tree in found]
        return [x - direct for x in rest]

    return jax.jit(all_of_them)(), jax.jit(in_tf32(all_of_them))()


def test_differences_keep_full_precision_where_products_are_tf32(monkeypatch):
    def errors():
        pairs = zip(*responses(SHORT.values()), strict=True)
        return {
            name: float(np.linalg.norm(x - y) / np.linalg.norm(x)) for name, (x, y) in zip(SHORT, pairs, strict=True)
        }

    kept = errors()
    assert max(kept.values()) < 0.02, kept
    monkeypatch.setattr(precision.jax, "default_matmul_precision", lambda name: contextlib.nullcontext())
    lost = errors()
    assert all(lost[name] > 5 * kept[name] for name in SHORT), (kept, lost)  # else this test shows nothing


def test_precise_traces_once_and_knows_its_dtype(x64):
    calls = []

    def fn(x, y):
        calls.append(None)
        return {"z": jnp.sin(x) @ y}

    x = jnp.ones((2, 2), jnp.float32)
    found = precise("a difference", fn, x, x)
    chex.assert_trees_all_close(found.call(x, 2 * x), fn(x, 2 * x))
    assert len(calls) == 2  # the second is this test's own
    assert found.eps == np.finfo(np.float32).eps
    assert precise("a difference", fn, x.astype("float64"), x.astype("float64")).eps == np.finfo(np.float64).eps
    assert "HIGHEST" in str(jax.make_jaxpr(found.call)(x, x))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.sum(x.astype("bfloat16") ** 2).astype("float32"),
        lambda x: jax.lax.scan(lambda c, _: (c.astype("float16").astype("float32"), None), x, length=2)[0],
        jax.jit(lambda x: (x.astype("bfloat16") @ x.astype("bfloat16")).astype("float32")),
    ],
    ids=["leaves", "loop", "product"],
)
def test_what_computes_in_less_than_float32_is_refused(fn):
    with pytest.raises(AgwmError, match=r"penalty subtracts gradients .* computes in b?float16, .* keep weights"):
        precise("penalty", fn, jnp.ones((2, 2)))
