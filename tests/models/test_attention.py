"""Fused attention: the same function as plain products, in the programs that may run it and in no other."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SMALL, batch_of, build, loss_of

from agwm_jax.models.attention import fused_attention, fused_refusal

SUITABLE = {"dtype": jnp.bfloat16, "head_width": 64, "length": 128, "dropout": False}
LANES = 2


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """Models of two narrow layers."""


@pytest.fixture
def gpu(monkeypatch):
    """As on an H100, as far as tracing asks: the programs of these tests are traced and lowered, and never run."""
    client = types.SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = types.SimpleNamespace(platform="gpu", client=client, compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    cudnn = types.SimpleNamespace(cudnn_get_version=lambda: 91300)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.cuda_versions", cudnn)
    return device


@pytest.fixture
def fused_on_cpu(gpu, monkeypatch):
    """The call of the fused kernel, but by the plain products of `jax.nn.dot_product_attention`; a list of calls."""
    calls, original = [], jax.nn.dot_product_attention

    def plain(*arguments, implementation, **options):
        calls.append((implementation, options))
        return original(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    return calls


def small(rate: float = 0.0):
    """Heads of width 8; of three texts two are padded."""
    return SMALL["gelu"]._replace(config=SMALL["gelu"].config.with_dropout(rate), lengths=(10, 4, 1))


@pytest.mark.parametrize(
    ("pooling", "dtype", "tolerance"), [("cls", "float32", 1e-5), ("mean", "float32", 1e-5), ("cls", "bfloat16", 0.03)]
)
def test_both_kernels_are_one_function(fused_on_cpu, monkeypatch, pooling, dtype, tolerance):
    monkeypatch.setattr("agwm_jax.models.attention._DTYPES", ("bfloat16", "float32"))
    model, params = build(small(), pooling=pooling, dtype=jnp.dtype(dtype))
    batch = batch_of(small())

    def outputs(**options):
        logits = jax.jit(lambda params: model.apply(params, batch, **options))(params)
        return {"logits": logits, **jax.jit(jax.grad(loss_of(model.apply, batch, **options)))(params)}

    plain = outputs()
    assert fused_on_cpu == []
    fused = outputs(reverse_only=True)
    assert {implementation for implementation, _ in fused_on_cpu} == {"cudnn"}
    largest = max(float(jnp.abs(value).max()) for value in plain.values())
    for name, value in plain.items():
        np.testing.assert_allclose(fused[name], value, rtol=0, atol=tolerance * largest, err_msg=name)


def test_a_row_of_padding_alone_stays_finite_and_disturbs_no_other(fused_on_cpu):
    model, params = build(small(), pooling="mean", dtype=jnp.bfloat16)
    batch = batch_of(small())

    @jax.jit
    def outputs(mask):
        own = batch | {"attention_mask": mask}
        logits = model.apply(params, own, reverse_only=True)
        return logits, jax.grad(loss_of(model.apply, own, reverse_only=True))(params)

    mask = jnp.asarray(batch["attention_mask"])
    (logits, gradient), (whole, _) = outputs(mask.at[1].set(0)), outputs(mask)
    assert jnp.array_equal(logits[::2], whole[::2])
    assert all(bool(jnp.isfinite(value).all()) for value in (logits, *gradient.values()))
    assert fused_on_cpu


def test_no_text_is_empty_to_the_kernel(fused_on_cpu):
    x = jnp.ones((2, 6, 1, 8), jnp.bfloat16)
    fused_attention(x, x, x, jnp.array([4, 0]))
    ((_, options),) = fused_on_cpu
    assert options["key_value_seq_lengths"].tolist() == [4, 1]
    assert options["query_seq_lengths"].tolist() == [6, 6]


def test_lanes_that_share_their_batch(fused_on_cpu):
    """The fused kernel is mapped over lanes with all of its operands, or jax refuses."""
    model, params = build(small(), dtype=jnp.bfloat16)
    batch = batch_of(small())
    many = {path: jnp.stack([value, 0.5 * value]) for path, value in params.items()}

    def logits(params):
        return model.apply(params, batch, reverse_only=True)

    np.testing.assert_allclose(jax.jit(jax.vmap(logits))(many)[0], jax.jit(logits)(params), rtol=0, atol=0.03)
    assert fused_on_cpu


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_gpu_would_run(gpu, shared):
    """Lowered for CUDA: the calls of cuDNN are in the program, mapped over lanes and differentiated."""
    model, params = build(small(), dtype=jnp.bfloat16)
    many = {path: jnp.stack([value] * LANES) for path, value in params.items()}
    batch = batch_of(small())
    batch = batch if shared else jax.tree.map(lambda x: jnp.stack([x] * LANES), batch)

    def text(**options):
        def each(params, batch):
            return jax.grad(lambda params: loss_of(model.apply, batch, **options)(params))(params)

        step = jax.jit(jax.vmap(each, in_axes=(0, None if shared else 0)))
        return step.trace(many, batch).lower(lowering_platforms=("cuda",)).as_text()

    assert "__cudnn" not in text()
    fused = text(reverse_only=True)
    assert "__cudnn$fmhaSoftmax" in fused
    assert "__cudnn$fmhaSoftmaxBackward" in fused


@pytest.mark.parametrize(
    ("device", "call", "words"),
    [
        ({}, {}, None),
        ({}, {"dtype": jnp.float16}, None),
        ({"platform_version": "cpu", "platform": "cpu"}, {}, "no CUDA device but a cpu"),
        ({"platform_version": "ROCm 7"}, {}, "no CUDA device but a gpu"),
        ({"compute_capability": "7.5"}, {}, r"capability 7\.5, expected 8\.0"),
        ({"compute_capability": "10.0"}, {}, None),
        ({}, {"dtype": jnp.float32}, "in float32, expected bfloat16 or float16"),
        ({}, {"head_width": 12}, "12 wide, expected a multiple of 8 up to 128"),
        ({}, {"head_width": 136}, "136 wide"),
        ({}, {"length": 127}, "127 tokens long, expected an even number"),
        ({}, {"dropout": True}, "attention dropout is on"),
    ],
)
def test_why_a_call_is_not_fused(gpu, device, call, words):
    gpu.client.platform_version = device.pop("platform_version", gpu.client.platform_version)
    vars(gpu).update(device)
    reason = fused_refusal(**(SUITABLE | call))
    assert (reason is None) if words is None else re.search(words, reason)


def test_a_mesh_of_several_devices_is_not_fused(gpu, monkeypatch):
    monkeypatch.undo()
    several, one = jax.make_mesh((4, 2), ("data", "model")), jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    with jax.set_mesh(several):
        assert fused_refusal(**SUITABLE) == "the work is cut over 8 devices"
    with jax.set_mesh(one):
        assert fused_refusal(**SUITABLE) is None


def test_a_call_without_a_key_drops_nothing(fused_on_cpu):
    model, params = build(small(rate=0.1), dtype=jnp.bfloat16)
    jax.eval_shape(lambda: model.apply(params, batch_of(small()), key=jax.random.key(0), reverse_only=True))
    assert fused_on_cpu == []
    jax.eval_shape(lambda: model.apply(params, batch_of(small()), reverse_only=True))
    assert fused_on_cpu


def test_it_can_be_turned_off(fused_on_cpu):
    model, params = build(small(), dtype=jnp.bfloat16, fuse_attention=False)
    jax.eval_shape(lambda: model.apply(params, batch_of(small()), reverse_only=True))
    assert fused_on_cpu == []
