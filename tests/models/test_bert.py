"""BERT: golden logits, the scan, padding, dropout, dtypes and the derivatives that hypergradients take."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import SMALL, batch_of, build, loss_of, minilm_batch, minilm_head

from agwm_jax.errors import AgwmError
from agwm_jax.models.bert import BertClassifier, BertConfig, BertLayer, dropout
from agwm_jax.models.huggingface import load_pretrained

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SMALL)
def test_golden_logits_of_small_models(name):
    apply, params = build(SMALL[name])
    logits = jax.jit(apply)(params, batch_of(SMALL[name]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, GOLDEN[name], rtol=0, atol=1e-5)


def test_golden_logits_of_minilm():
    pretrained = load_pretrained("minilm", num_labels=3)
    params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
    logits = jax.jit(pretrained.apply)(params, minilm_batch(pretrained.tokenizer))
    np.testing.assert_allclose(logits, GOLDEN["minilm"], rtol=0, atol=1e-5)


def test_mean_pooling_has_no_pooler_and_averages_real_tokens():
    small = SMALL["gelu"]
    apply, params = build(small, pooling="mean")
    assert not any(path.startswith("pooler") for path in params)
    batch = batch_of(small)
    # With one real token the mean is that token's vector: the head on it alone must give the same logits.
    alone = {name: value[2:, :1] for name, value in batch.items() if name != "labels"}
    apply = jax.jit(apply)
    np.testing.assert_allclose(apply(params, batch)[2], apply(params, alone)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_matter(pooling):
    small = SMALL["gelu"]
    apply, params = build(small, pooling=pooling)
    apply = jax.jit(apply)
    batch = batch_of(small)
    logits = apply(params, batch)
    noise = jnp.where(batch["attention_mask"] == 1, batch["input_ids"], 17)
    assert jnp.array_equal(logits, apply(params, batch | {"input_ids": noise}))
    longer = {name: jnp.pad(value, ((0, 0), (0, 5))) for name, value in batch.items() if name != "labels"}
    np.testing.assert_allclose(logits, apply(params, longer), rtol=0, atol=2e-6)


def test_row_of_padding_alone_stays_finite():
    small = SMALL["gelu"]
    apply, params = build(small, pooling="mean")
    batch = batch_of(small)
    batch["attention_mask"] = batch["attention_mask"].at[1].set(0)
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(apply, batch)))(params)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(value).all() for value in gradient.values())


def test_scan_equals_a_python_loop_over_the_layers():
    """With dropout too, so that each layer gets the key that is its own."""
    small, key = SMALL["gelu_new"], jax.random.key(3)
    module = BertClassifier(small.config, num_labels=1, rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 6, small.config.hidden_size))
    bias = jnp.zeros((2, 6))
    scanned = nnx.jit(type(module.encoder).__call__)(module.encoder, x, bias, key=key)
    _, weights = nnx.split(module.encoder.layers)
    graph = nnx.graphdef(BertLayer(small.config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    keys = jax.random.split(key, small.config.num_hidden_layers)
    for i in range(small.config.num_hidden_layers):
        own = jax.tree.map(lambda w, i=i: w[i], weights)
        x = jax.jit(lambda own, x, key: nnx.merge(graph, own)(x, bias, key=key))(own, x, keys[i])
    np.testing.assert_allclose(scanned, x, rtol=0, atol=1e-5)


def test_unrolled_scan_is_the_same_function():
    small = SMALL["gelu_new"]
    apply, params = build(small)
    unrolled, _ = build(small, unroll=3)
    batch, key = batch_of(small), jax.random.key(0)
    first, second = (jax.jit(f)(params, batch, key=key) for f in (apply, unrolled))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5)


def test_layers_start_different():
    kernel = BertClassifier(SMALL["gelu"].config, num_labels=2, rngs=nnx.Rngs(0)).encoder.layers.query.kernel[...]
    assert kernel.shape == (2, 32, 32)
    assert not jnp.array_equal(kernel[0], kernel[1])
    assert 0.015 < kernel.std() < 0.025


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_dropout_is_a_function_of_the_key(impl):
    small = SMALL["gelu"]
    apply, params = build(small)
    apply, batch = jax.jit(apply), batch_of(small)
    first, second = jax.random.key(1, impl=impl), jax.random.key(2, impl=impl)
    assert jnp.array_equal(apply(params, batch, key=first), apply(params, batch, key=first))
    assert not jnp.array_equal(apply(params, batch, key=first), apply(params, batch, key=second))
    assert not jnp.array_equal(apply(params, batch, key=first), apply(params, batch))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_keeps_the_expectation(rate):
    x = jnp.full((500, 801), 3.0)
    y = dropout(x, rate, jax.random.key(0))
    zeros = float((y == 0).mean())
    assert abs(zeros - rate) < 0.003
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=1e-4)
    # Neighbours share a random word; they must not share a fate.
    both = float(((y[:, :-1] == 0) & (y[:, 1:] == 0)).mean())
    assert abs(both - rate**2) < 0.003


def test_every_dropout_rate_is_used():
    """Rate by rate: each alone changes the logits, and all at 0 with a key is no dropout at all."""
    small, key = SMALL["gelu"], jax.random.key(5)
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    batch = batch_of(small)

    def logits(**rates):
        config = dataclasses.replace(small.config, **(dict.fromkeys(names, 0.0) | rates))
        apply, params = build(small._replace(config=config))
        return jax.jit(apply)(params, batch, key=key)

    plain = logits()
    apply, params = build(small)
    assert jnp.array_equal(plain, jax.jit(apply)(params, batch))
    for name in names:
        assert not jnp.array_equal(plain, logits(**{name: 0.5})), name


def test_bfloat16_is_close_and_weights_stay_float32():
    small = SMALL["gelu"]
    apply, params = build(small)
    half, _ = build(small, dtype=jnp.bfloat16)
    module = BertClassifier(small.config, num_labels=3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert all(value.dtype == jnp.float32 for value in jax.tree.leaves(nnx.state(module, nnx.Param)))
    batch = batch_of(small)
    logits = jax.jit(half)(params, batch)
    assert logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits - jax.jit(apply)(params, batch))).max()
    assert 1e-4 < difference < 0.1  # not 0: the computation is in bfloat16
    gradient = jax.jit(jax.grad(loss_of(half, batch, key=jax.random.key(0))))(params)
    assert all(value.dtype == jnp.float32 and jnp.isfinite(value).all() for value in gradient.values())


def test_hessian_vector_products_agree():
    """linearize of the gradient, jvp of the gradient and a finite difference, under one dropout mask."""
    small = SMALL["silu"]
    apply, params = build(small)
    gradient = jax.grad(loss_of(apply, batch_of(small), key=jax.random.key(7)))
    rng = np.random.default_rng(0)
    tangent = {path: jnp.asarray(rng.normal(size=value.shape), jnp.float32) for path, value in params.items()}
    by_linearize = jax.jit(lambda p, v: jax.linearize(gradient, p)[1](v))(params, tangent)
    _, by_jvp = jax.jit(lambda p, v: jax.jvp(gradient, (p,), (v,)))(params, tangent)
    radius = 1e-3
    plus, minus = ({path: params[path] + sign * radius * tangent[path] for path in params} for sign in (1, -1))
    compiled = jax.jit(gradient)
    high, low = compiled(plus), compiled(minus)
    flat = [
        np.concatenate([np.asarray(tree[path]).ravel() for path in params])
        for tree in (by_linearize, by_jvp, {path: (high[path] - low[path]) / (2 * radius) for path in params})
    ]
    np.testing.assert_allclose(flat[0], flat[1], rtol=0, atol=1e-4 * np.abs(flat[1]).max())
    cosine = flat[1] @ flat[2] / np.linalg.norm(flat[1]) / np.linalg.norm(flat[2])
    assert cosine > 0.999


def test_vmap_over_parameters_and_keys():
    small = SMALL["gelu"]
    apply, params = build(small)
    batch, keys = batch_of(small), jax.random.split(jax.random.key(0), 3)
    many = {path: jnp.stack([value, value, 0.5 * value]) for path, value in params.items()}
    logits = jax.jit(jax.vmap(lambda p, k: apply(p, batch, key=k)))(many, keys)
    np.testing.assert_allclose(logits[1], jax.jit(apply)(params, batch, key=keys[1]), rtol=0, atol=1e-5)


def test_more_tokens_than_positions():
    small = SMALL["relu"]
    apply, params = build(small)
    batch = {name: jnp.ones((1, 8), jnp.int32) for name in ("input_ids", "token_type_ids", "attention_mask")}
    with pytest.raises(AgwmError, match=r"8 tokens .* ends at 7; set max_length to 7"):
        jax.jit(apply)(params, batch)


SIZES = {
    "vocab_size": 5,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 3,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_fast"}, "hidden_act is 'gelu_fast', known are gelu"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"num_attention_heads": 3}, "hidden_size 4 is not a multiple of num_attention_heads 3"),
        ({"hidden_size": "4"}, "hidden_size is '4'"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12'"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob is nan"),
        ({"is_decoder": True}, "is_decoder"),
        ({"position_embedding_type": "relative_key"}, "only 'absolute'"),
    ],
)
def test_configuration_faults(change, words):
    with pytest.raises(AgwmError, match=words):
        BertConfig.from_dict(SIZES | change)


def test_configuration_faults_come_in_one_message():
    with pytest.raises(AgwmError, match=r"vocab_size is missing; hidden_size is missing"):
        BertConfig.from_dict({"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1})


def test_unknown_pooling():
    with pytest.raises(AgwmError, match="pooling is 'max', expected 'cls' or 'mean'"):
        BertClassifier(BertConfig.from_dict(SIZES), num_labels=2, pooling="max", rngs=nnx.Rngs(0))
