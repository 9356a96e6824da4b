"""What a CPU cannot tell: `make device` on a machine with a GPU or TPU, whose own CPU is the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from small_models import FIRST, batch_of, build, loss_of
from tiny import SETTINGS, words, write_checkpoint

from agwm_jax import partition
from agwm_jax.models.attention import fused_attention, fused_refusal
from tests.core.conformance import hypergradient, make_step
from tests.core.problems import ALL, Network, network

SECONDS = 600


@pytest.fixture(scope="module", autouse=True)
def _accelerator():
    assert jax.default_backend() != "cpu", "make device is for a GPU or TPU, and JAX finds none"


@pytest.fixture(scope="module")
def cpu():
    return jax.devices("cpu")[0]


def relative(found, expected) -> float:
    """Norm of the difference over the norm, of all leaves together, in float64."""
    pairs = [[np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)] for tree in (found, expected)]
    found, expected = map(np.concatenate, pairs)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_is_softmax_attention(causal):
    assert fused_refusal(dtype=jnp.bfloat16, head_width=64, length=128, dropout=False) is None
    rng = np.random.default_rng(0)
    shape, lengths = (4, 128, 3, 64), np.array([128, 77, 1, 40])
    query, keys, value, cotangent = (rng.normal(size=shape) for _ in range(4))
    inside = np.arange(128)[None] < lengths[:, None]
    real = inside[:, :, None, None]  # rows of padding mean nothing
    allowed = inside[:, None, None] & (np.tri(128, dtype=bool)[None, None] if causal else np.True_)

    def exact(query, keys, value):
        scores = jnp.einsum("bthe,bshe->bhts", query, keys, precision="highest") / 8
        weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
        return jnp.einsum("bhts,bshe->bthe", weights, value, precision="highest")

    def fused(*operands):
        return fused_attention(*(x.astype(jnp.bfloat16) for x in operands), jnp.asarray(lengths), causal=causal)

    def both(fn, *operands):
        out, pull = jax.vjp(fn, *operands)
        gradients = pull((cotangent * real).astype(out.dtype))
        return out * real, *gradients

    operands = [jnp.asarray(x, jnp.float32) for x in (query, keys, value)]
    found = jax.jit(lambda *x: both(fused, *x))(*operands)
    expected = jax.jit(lambda *x: both(exact, *x))(*operands)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 2e-2  # bfloat16 has 8 bits


@pytest.mark.parametrize("family", FIRST)
def test_every_family_as_on_a_cpu(cpu, family):
    """Logits and gradients in float64; in float32 with exact products."""
    small = FIRST[family]

    def outputs(params, batch):
        loss = loss_of(model.apply, batch)
        return model.apply(params, batch), jax.grad(loss)(params)

    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-4)):
        with jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest"):
            model, params = build(small, dtype=jnp.dtype(dtype))
            params = {path: x.astype(dtype) for path, x in params.items()}
            found, expected = (
                jax.jit(outputs)(*jax.device_put((params, batch_of(small, dtype)), device))
                for device in (jax.devices()[0], cpu)
            )
        assert relative(found, expected) < tolerance


class InFloat64(Network):
    """The network of the conformance suite, whose loss is taken in float32 there."""

    def cross_entropy(self, logits, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


@pytest.mark.parametrize("name", ALL)
def test_every_estimator_as_on_a_cpu(cpu, name):
    """One step of a bi-level search in float64: weights, alpha, and the hypergradient that led to them."""
    found = []
    for device in (jax.devices()[0], cpu):
        with jax.enable_x64(True), jax.default_device(device):
            params = {path: jnp.asarray(x, jnp.float64) for path, x in network().params.items()}
            net = InFloat64(params, partition(params, mixed=r".*kernel"))
            init, step = make_step(net, ALL[name])
            state = jax.jit(step)(params, init(0), net.batches(0, 2), net.batches(1000))[0]
            found.append((state.inner.params, state.outer, hypergradient(state)))
    # A finite difference in float64 divides rounding by its step.
    assert relative(*found) < 1e-6


def test_many_lanes_learn_what_one_learns(tmp_path):
    """A seed beside two others and alone: the same scores, and weights to rounding of the device's products."""
    folder = write_checkpoint(_made(tmp_path / "model"))
    train(folder, tmp_path / "three", {"run.seeds": "[0, 1, 2]", "run.vectorize": "seeds"})
    train(folder, tmp_path / "one", {"run.seed": 1})
    three, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("three/seed-1", "one"))
    assert abs(three["score"] - one["score"]) <= 2 / 40  # of 40 texts one or two may lie at the border


def test_a_deterministic_run_has_the_same_bits_again(tmp_path):
    folder = write_checkpoint(_made(tmp_path / "model"))
    settings = {"run.deterministic": "true"}
    first, second = (train(folder, tmp_path / name, settings) for name in ("first", "second"))
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()
    ours, theirs = (load_file(folder / "variables.safetensors") for folder in (first, second))
    assert [name for name in ours | theirs if ours[name].tobytes() != theirs[name].tobytes()] == []


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def train(model: Path, output: Path, settings: dict) -> Path:
    typed = words({**SETTINGS, "model": model, "output": output, **settings})
    command = [sys.executable, "-m", "agwm_jax", "train", *typed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return output
