"""Every family: golden logits, table, scan, padding, dropout, dtypes and the derivatives of hypergradients."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import (
    FIRST,
    RANDOM,
    SMALL,
    batch_of,
    build,
    equations,
    loss_of,
    minilm_head,
    num_products,
    texts_batch,
)

from agwm_jax.errors import AgwmError
from agwm_jax.models.bert import BertConfig
from agwm_jax.models.encoder import EncoderLayer
from agwm_jax.models.family import FAMILIES, Options, build_model, fresh_params
from agwm_jax.models.huggingface import load_pretrained
from agwm_jax.models.layers import dropout
from agwm_jax.models.roberta import RobertaConfig
from agwm_jax.models.stack import _period
from agwm_jax.models.weights import LAYERS

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
EVERY_FAMILY = pytest.mark.parametrize("family", FIRST)


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """Models of a few narrow layers."""


@pytest.mark.parametrize("name", SMALL)
def test_golden_logits_of_small_models(name):
    model, params = build(SMALL[name])
    logits = jax.jit(model.apply)(params, batch_of(SMALL[name]))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, GOLDEN[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_golden_logits_in_float64(name):
    with jax.enable_x64(True):
        model, params = build(RANDOM[name], dtype=np.float64)
        logits = jax.jit(model.apply)(params, batch_of(RANDOM[name]))
        assert logits.dtype == jnp.float64
        np.testing.assert_allclose(logits, GOLDEN[name], rtol=0, atol=1e-12)


def test_golden_logits_of_minilm():
    pretrained = load_pretrained("minilm", num_labels=3, pooling="cls")
    params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
    logits = jax.jit(pretrained.model.apply)(params, texts_batch(pretrained.tokenizer))
    np.testing.assert_allclose(logits, GOLDEN["minilm"], rtol=0, atol=1e-5)


def test_golden_vectors_of_bert_tiny():
    """A real checkpoint with the old names of norms, a head of pretraining and no pooler."""
    tiny = load_pretrained("bert-tiny", num_labels=2, pooling="mean")
    batch = texts_batch(tiny.tokenizer)
    found = jax.jit(lambda params: tiny.model.features(params, tiny.model.embed(params, batch), batch))(tiny.params)
    np.testing.assert_allclose(found[:, :8], GOLDEN["bert-tiny"], rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_what_is_known_of_a_weight_fits_its_shape(family):
    model, params = build(FIRST[family])
    sizes = {}
    for path, weight in model.weights.items():
        assert len(weight.axes) == params[path].ndim, path
        for axis, size in zip(weight.axes, params[path].shape, strict=True):
            assert sizes.setdefault("width" if axis == "vector" else axis, size) == size, (path, axis)
        assert (weight.depth is None) == weight.is_stacked, path
    config = FIRST[family].config
    assert (sizes[LAYERS], sizes["vocab"], sizes["mlp"]) == (
        config.depth,
        config.vocab_size,
        config.intermediate_size,
    )
    depths = {weight.role: weight.depth for weight in model.weights.values() if weight.depth is not None}
    assert depths["embedding"] == 0
    assert depths["head"] == config.depth + 1
    assert [*model.weights] == [path for path in FIRST[family].of.table(config) if path in model.weights]


@pytest.mark.parametrize(
    ("kinds", "found"),
    [
        ("FLL" + "GLL" * 6 + "G", (1, 3, 7)),  # ModernBERT-base: seven periods of three after the first layer
        ("FLLGLLG", (1, 3, 2)),
        ("AAAA", (0, 1, 4)),
        ("A", (0, 1, 1)),
        ("ABAC", (0, 2, 1)),
    ],
)
def test_layers_are_scanned_by_the_shortest_period(kinds, found):
    start, period, count = _period(kinds)
    program = len(kinds) - period * (count - 1)  # layers written out
    assert program == len(kinds) - found[1] * (found[2] - 1)
    whole = kinds[start : start + period * count]
    assert whole == whole[:period] * count


@EVERY_FAMILY
def test_a_model_is_the_composition_of_its_functions(family):
    """With dropout too; and `embed` is nothing but a look-up."""
    small, key = FIRST[family], jax.random.key(2)
    model, params = build(small)
    batch = batch_of(small)
    words = model.embed(params, batch)
    np.testing.assert_array_equal(words, params["embeddings.word.embedding"][batch["input_ids"]])

    @jax.jit
    def composed(params, words):
        first, second = jax.random.split(key)
        return model.logits(params, model.features(params, words, batch, key=first), key=second)

    whole = jax.jit(lambda params: model.apply(params, batch, key=key))(params)
    np.testing.assert_allclose(composed(params, words), whole, rtol=0, atol=1e-6)
    assert not np.allclose(composed(params, -words), whole, atol=1e-3)


def test_positions_of_roberta_count_real_tokens():
    """Wherever padding stands, as transformers counts them."""
    small = FIRST["roberta"]
    module = small.of.module(small.config, num_labels=2, pooling="cls", options=Options(), rngs=nnx.Rngs(0))
    ids = jnp.array([[7, 1, 9, 9, 1], [1, 1, 5, 6, 7]])
    assert module.positions(ids).tolist() == [[2, 1, 3, 4, 1], [1, 1, 2, 3, 4]]
    assert small.config.max_length == small.config.max_position_embeddings - 2


def test_a_family_is_named_in_its_own_file_alone():
    """Each was added by one file; what reads and saves folders names no family at all."""
    package = Path(__file__).parents[2] / "agwm_jax"
    texts = {path.name: path.read_text(encoding="utf-8").lower() for path in package.rglob("*.py")}
    for family in FAMILIES:
        if family != "bert":  # the layout that others are told by
            assert [name for name, text in texts.items() if re.search(rf"\b{family}\b", text)] == [f"{family}.py"]
    assert not any(
        re.search(r"\bbert(?!-tiny)", texts[name]) for name in ("huggingface.py", "safetensors.py", "hub.py")
    )


def test_mean_pooling_has_no_pooler_and_averages_real_tokens():
    small = SMALL["gelu"]
    model, params = build(small, pooling="mean")
    assert not any(path.startswith("pooler") for path in params)
    batch = batch_of(small)
    # With one real token the mean is that token's vector: the head on it alone must give the same logits.
    alone = {name: value[2:, :1] for name, value in batch.items() if name != "labels"}
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, batch)[2], apply(params, alone)[0], rtol=0, atol=1e-5)


@EVERY_FAMILY
@pytest.mark.parametrize("number", [0, 1])
def test_padding_does_not_matter(family, number):
    small = FIRST[family]
    model, params = build(small, pooling=small.of.poolings[number])
    apply = jax.jit(model.apply)
    batch = batch_of(small)
    logits = apply(params, batch)
    padding = getattr(small.config, "pad_token_id", 0)
    noise = np.where(batch["attention_mask"] == 1, batch["token_type_ids"], 1)
    assert jnp.array_equal(logits, apply(params, batch | {"token_type_ids": noise}))
    longer = {name: np.pad(value, ((0, 0), (0, 5))) for name, value in batch.items() if name != "labels"}
    longer["input_ids"] = np.pad(batch["input_ids"], ((0, 0), (0, 5)), constant_values=padding)
    np.testing.assert_allclose(logits, apply(params, longer), rtol=0, atol=1e-5)


def test_token_types_may_be_left_out():
    small = FIRST["roberta"]
    model, params = build(small)
    batch = batch_of(small) | {"token_type_ids": np.zeros_like(batch_of(small)["input_ids"])}
    without = {name: value for name, value in batch.items() if name != "token_type_ids"}
    apply = jax.jit(model.apply)
    assert jnp.array_equal(apply(params, batch), apply(params, without))


def test_row_of_padding_alone_stays_finite():
    small = SMALL["gelu"]
    model, params = build(small, pooling="mean")
    batch = batch_of(small)
    batch["attention_mask"][1] = 0
    loss, gradient = jax.jit(jax.value_and_grad(loss_of(model.apply, batch)))(params)
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(value).all() for value in gradient.values())


def test_scan_equals_a_python_loop_over_the_layers():
    """With dropout too, so that each layer gets the key that is its own."""
    small, key = SMALL["gelu_new"], jax.random.key(3)
    module = small.of.module(small.config, num_labels=1, pooling="cls", options=Options(), rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(0), (2, 6, small.config.hidden_size))
    shared = jnp.zeros((2, 1, 1, 6)), jnp.full(2, 6)
    scanned = nnx.jit(type(module.encoder).__call__)(module.encoder, x, *shared, key=key)
    _, weights = nnx.split(module.encoder.layers)
    graph = nnx.graphdef(EncoderLayer(small.config, options=Options(), rngs=nnx.Rngs(0)))
    keys = jax.random.split(key, small.config.num_hidden_layers)
    step = jax.jit(lambda own, x, key: nnx.merge(graph, own)(x, *shared, key=key))
    for i in range(small.config.num_hidden_layers):
        x = step(jax.tree.map(lambda w, i=i: w[i], weights), x, keys[i])
    np.testing.assert_allclose(scanned, x, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def plain():
    """Loss and gradient with dropout of a model of three layers without options."""
    small = SMALL["gelu_new"]
    model, params = build(small)
    loss = loss_of(model.apply, batch_of(small), key=jax.random.key(0))
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("options", [{"unroll": 2, "remat": "dots"}, {"remat": "full"}])
def test_options_do_not_change_the_function(plain, options):
    small = SMALL["gelu_new"]
    model, params = build(small, **options)
    loss, gradient = jax.jit(
        jax.value_and_grad(loss_of(model.apply, batch_of(small), key=jax.random.key(0)))
    )(params)  # fmt: skip
    np.testing.assert_allclose(loss, plain[0], rtol=1e-5)
    for path, value in plain[1].items():
        np.testing.assert_allclose(gradient[path], value, rtol=0, atol=1e-5, err_msg=path)


def test_what_remat_computes_again():
    """Products in the gradient's program: dots computes attention's again, full those with weights too."""

    def products(**options):
        small = SMALL["gelu"]
        model, params = build(small, **options)
        return num_products(jax.make_jaxpr(jax.grad(loss_of(model.apply, batch_of(small))))(params))

    none, dots, full = products(), products(remat="dots"), products(remat="full")
    assert none < dots < full


@EVERY_FAMILY
def test_fresh_weights(family):
    small = FIRST[family]
    model, shapes = build_model(small.of, small.config, num_labels=3)
    params = fresh_params(model.weights, shapes, seed=0, scale=0.02)
    assert {path: (value.shape, value.dtype) for path, value in params.items()} == {
        path: (shape.shape, shape.dtype) for path, shape in shapes.items()
    }
    kernel = params["encoder.layers.query.kernel"]
    assert len(np.unique(kernel[:, 0, 0])) == len(kernel)
    assert 0.015 < params["embeddings.word.embedding"].std() < 0.025
    norms = [path for path in params if model.weights[path].role == "norm" and path.endswith("scale")]
    assert norms
    assert all((params[path] == 1).all() for path in norms)
    assert not any(params[path].any() for path in params if path.endswith("bias"))
    assert jnp.isfinite(jax.jit(model.apply)(params, batch_of(small))).all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_dropout_is_a_function_of_the_key(impl):
    small = SMALL["relu"]
    model, params = build(small)
    apply, batch = jax.jit(model.apply), batch_of(small)
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


@EVERY_FAMILY
def test_every_dropout_rate_is_used(family):
    """Rate by rate: each alone changes the logits, and all at 0 with a key is no dropout at all."""
    small, key = FIRST[family], jax.random.key(5)
    zeros = dataclasses.asdict(small.config.with_dropout(0.0))
    names = [name for name in zeros if "dropout" in name]
    batch = batch_of(small)

    def logits(**rates):
        config = dataclasses.replace(small.config.with_dropout(0.0), **rates)
        model, params = build(small._replace(config=config))
        return jax.jit(lambda params: model.apply(params, batch, key=key))(params)

    plain = logits()
    model, params = build(small)
    np.testing.assert_allclose(plain, jax.jit(model.apply)(params, batch), rtol=0, atol=1e-6)
    for name in names:
        assert not np.allclose(plain, logits(**{name: 0.5}), atol=1e-4), name


def dtypes_of(program, primitive=None):
    """Floating dtypes of all that a program computes, or of what one primitive gives."""
    kinds = {
        variable.aval.dtype
        for equation in equations(program)
        for variable in equation.outvars
        if primitive in (None, equation.primitive.name) and hasattr(variable.aval, "dtype")
    }
    return {str(kind) for kind in kinds if jnp.issubdtype(kind, jnp.floating)}


@EVERY_FAMILY
def test_nothing_is_narrower_than_float64(family):
    with jax.enable_x64(True):
        small = FIRST[family]
        model, params = build(small, dtype=np.float64)
        loss = loss_of(model.apply, batch_of(small), key=jax.random.key(0))
        program = jax.make_jaxpr(jax.grad(loss))(params)
    assert {value.dtype for value in params.values()} == {np.dtype(np.float64)}
    assert dtypes_of(program) == {"float64"}


@EVERY_FAMILY
def test_bfloat16_computes_softmax_and_head_in_float32(family):
    small = FIRST[family]
    (model, params), (half, _) = build(small), build(small, dtype=jnp.bfloat16)
    batch = batch_of(small)
    program = jax.make_jaxpr(lambda params: half.apply(params, batch))(params)
    assert dtypes_of(program, "exp") == {"float32"}
    assert dtypes_of(program, "tanh") <= {"float32"}
    assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}
    logits = jax.jit(half.apply)(params, batch)
    assert logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits - jax.jit(model.apply)(params, batch))).max()
    assert 1e-4 < difference < 0.2  # not 0: the computation is in bfloat16
    gradient = jax.jit(jax.grad(loss_of(half.apply, batch, key=jax.random.key(0))))(params)
    assert all(value.dtype == jnp.float32 and jnp.isfinite(value).all() for value in gradient.values())


def test_float64_needs_the_64_bit_mode():
    with pytest.raises(AgwmError, match=r"64-bit mode: jax\.config\.update"):
        build(SMALL["relu"], dtype=np.float64)


@EVERY_FAMILY
def test_hessian_vector_products_agree(family):
    """linearize of the gradient, jvp of the gradient and a finite difference, under one dropout mask."""
    small = FIRST[family]
    with jax.enable_x64(True):
        model, params = build(small, dtype=np.float64)
        gradient = jax.grad(loss_of(model.apply, batch_of(small, np.float64), key=jax.random.key(7)))
        rng = np.random.default_rng(0)
        tangent = {path: rng.normal(size=value.shape) for path, value in params.items()}
        radius = 1e-5
        points = [{path: params[path] + sign * radius * tangent[path] for path in params} for sign in (1, -1)]

        @jax.jit
        def products(params, tangent, high, low):
            by_linearize = jax.linearize(gradient, params)[1](tangent)
            _, by_jvp = jax.jvp(gradient, (params,), (tangent,))
            difference = jax.tree.map(lambda x, y: (x - y) / (2 * radius), gradient(high), gradient(low))
            return by_linearize, by_jvp, difference

        flat = [
            np.concatenate([np.asarray(tree[path]).ravel() for path in params])
            for tree in products(params, tangent, *points)
        ]
    np.testing.assert_allclose(flat[0], flat[1], rtol=0, atol=1e-10 * np.abs(flat[1]).max())
    cosine = flat[1] @ flat[2] / np.linalg.norm(flat[1]) / np.linalg.norm(flat[2])
    assert cosine > 0.99999


def test_vmap_over_parameters_and_keys():
    small = SMALL["relu"]
    model, params = build(small)
    batch, keys = batch_of(small), jax.random.split(jax.random.key(0), 3)
    many = {path: jnp.stack([value, value, 0.5 * value]) for path, value in params.items()}
    logits = jax.jit(jax.vmap(lambda p, k: model.apply(p, batch, key=k)))(many, keys)
    expected = jax.jit(lambda params, key: model.apply(params, batch, key=key))(params, keys[1])
    np.testing.assert_allclose(logits[1], expected, rtol=0, atol=1e-5)


@EVERY_FAMILY
def test_more_tokens_than_positions(family):
    small = FIRST[family]
    limit = small.config.max_length
    model, params = build(small)

    def traced(length):
        batch = {name: np.ones((1, length), np.int32) for name in ("input_ids", "attention_mask")}
        return jax.eval_shape(lambda params: model.apply(params, batch), params)

    assert traced(limit).shape == (1, small.num_labels)
    with pytest.raises(AgwmError, match=rf"{limit + 1} tokens .* ends at {limit}; set max_length to {limit}"):
        traced(limit + 1)


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
    for config in (BertConfig, RobertaConfig):
        with pytest.raises(AgwmError, match=words):
            config.from_dict(SIZES | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pad_token_id": None}, "pad_token_id is None"),
        ({"pad_token_id": 5}, "vocab_size is 5, expected at least 6 for pad_token_id 5"),
        ({"max_position_embeddings": 2}, "max_position_embeddings is 2, expected at least 3"),
    ],
)
def test_configuration_faults_of_roberta(change, words):
    with pytest.raises(AgwmError, match=words):
        RobertaConfig.from_dict(SIZES | change)


def test_configuration_faults_come_in_one_message():
    with pytest.raises(AgwmError, match=r"vocab_size is missing; hidden_size is missing; hidden_act is 'x'"):
        BertConfig.from_dict(
            {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 1, "hidden_act": "x"}
        )


@EVERY_FAMILY
def test_unknown_pooling(family):
    small = FIRST[family]
    with pytest.raises(AgwmError, match=r"pooling is 'max', expected '(cls|last)' or 'mean'"):
        build_model(FAMILIES[family].value(), small.config, num_labels=2, pooling="max")
