"""Every family against transformers in PyTorch: logits, gradients of every parameter, and exported folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from make_golden import GOLDEN, golden
from reference import torch_gradients, torch_inputs, torch_logits, torch_model
from small_models import FIRST, OF_TYPE, RANDOM, SMALL, TEXTS, batch_of, build, loss_of, minilm_head, texts_batch
from tiny_folders import write_folder

from agwm_jax.models.config import ACTIVATIONS
from agwm_jax.models.family import FAMILIES
from agwm_jax.models.huggingface import load_pretrained, save_pretrained
from agwm_jax.models.safetensors import to_tensors

CASES = [*SMALL, *RANDOM, "minilm"]


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained("minilm", num_labels=3, pooling="cls")


def padded_on_the_left(batch):
    """The same texts, each moved to the end of its row."""
    lengths = batch["attention_mask"].sum(axis=1)
    moved = {
        name: np.stack([np.roll(row, len(row) - n) for row, n in zip(value, lengths, strict=True)])
        for name, value in batch.items()
        if name != "labels"
    }
    return batch | moved


def compare(model, params, family, config, batch, *, logits_error: float, gradient_error: float) -> None:
    """Logits by the largest difference; gradients by their norms, a parameter at a time."""
    reference, apply = torch_model(family, config, params), jax.jit(model.apply)
    expected = torch_logits(reference, batch)
    difference = np.abs(np.asarray(apply(params, batch)) - expected).max()
    print(f"logits up to {np.abs(expected).max():.3g}, difference {difference:.2e}")
    assert difference <= logits_error
    expected = torch_gradients(reference, batch)
    ours = to_tensors(jax.jit(jax.grad(loss_of(model.apply, batch)))(params), family, family.table(config))
    assert ours.keys() == expected.keys()
    worst, rows = 0.0, family.table(config)
    like = {}
    queries = rows.get("encoder.layers.query.bias")
    for part in ("key", "position_key"):
        keys = rows.get(f"encoder.layers.{part}.bias")
        for i in range(config.depth if keys and queries else 0):
            like[family.prefix + keys.name.format(i)] = family.prefix + queries.name.format(i)
    for name, gradient in expected.items():
        # A bias of the keys shifts all scores of a query alike, so its exact gradient is 0; the query's is its scale.
        scale = np.linalg.norm(expected[like.get(name, name)])
        error = np.linalg.norm(ours[name] - gradient)
        worst = max(worst, error / scale if scale else error)
        assert error <= gradient_error * scale, name
    print(f"worst relative error of a gradient {worst:.2e}")


@pytest.mark.parametrize("name", CASES)
def test_float32(name, pretrained):
    if name == "minilm":
        params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
        batch = texts_batch(pretrained.tokenizer) | {"labels": np.array([0, 2, 1, 2])}
        model, family, config = pretrained.model, pretrained.family, pretrained.config
    else:
        small = (SMALL | RANDOM)[name]
        model, params = build(small)
        family, config, batch = small.of, small.config, batch_of(small)
    compare(model, params, family, config, batch, logits_error=1e-5, gradient_error=1e-4)


@pytest.mark.parametrize("name", RANDOM)
def test_float64(name):
    small = RANDOM[name]
    with jax.enable_x64(True):
        model, params = build(small, dtype=np.float64)
        batch = batch_of(small, np.float64)
        compare(model, params, small.of, small.config, batch, logits_error=1e-12, gradient_error=1e-10)


@pytest.mark.parametrize("name", RANDOM)
def test_padding_on_the_left(name):
    """The mean over real tokens, wherever they stand; a decoder's last one too. A first token would be padding."""
    small = RANDOM[name]
    batch = padded_on_the_left(batch_of(small, np.float64))
    with jax.enable_x64(True):
        model, params = build(small, dtype=np.float64, pooling="mean")
        ours = np.asarray(jax.jit(lambda p: model.features(p, model.embed(p, batch), batch))(params))
        whole, all_params = build(small, dtype=np.float64)
        reference = torch_model(small.of, small.config, all_params)
        logits = np.asarray(jax.jit(whole.apply)(all_params, batch)) if "last" in small.of.poolings else None
    reference.load_state_dict(
        {k: torch.tensor(x) for k, x in to_tensors(params, small.of, small.of.table(small.config)).items()},
        strict=False,
    )
    with torch.no_grad():
        states = reference.base_model(**torch_inputs(batch, reference.base_model)).last_hidden_state
        mask = torch.tensor(batch["attention_mask"])[:, :, None]
        mean = (states * mask).sum(1) / mask.sum(1)
        expected = (reference.head(mean) if hasattr(reference, "head") else mean).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    if logits is not None:
        reference = torch_model(small.of, small.config, all_params)
        np.testing.assert_allclose(logits, torch_logits(reference, batch), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    expected = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(np.asarray(ACTIVATIONS[name](jnp.asarray(x))), expected, rtol=1e-5, atol=1e-6)


def test_golden_logits_are_those_of_today():
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    fresh = golden()
    assert stored.keys() == fresh.keys()
    for name, logits in fresh.items():
        tolerance = 1e-12 if name in RANDOM else 1e-5  # float32 differs from CPU to CPU
        np.testing.assert_allclose(stored[name], logits, rtol=0, atol=tolerance)


def check_export(folder, params, pretrained, names, **options) -> None:
    """Plain transformers gives our logits, with our tokens."""
    save_pretrained(folder, params, pretrained, label_names=names, **options)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.id2label == dict(enumerate(names))
    batch = texts_batch(pretrained.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for i, (first, second) in enumerate(TEXTS):
        ids = tokenizer(first, second)["input_ids"]
        assert ids == batch["input_ids"][i, : len(ids)].tolist()
    ours = np.asarray(jax.jit(pretrained.model.apply)(params, batch))
    mean, std = options.get("label_scale", (0, 1))
    np.testing.assert_allclose(mean + std * ours, torch_logits(model.eval(), batch), rtol=0, atol=1e-5)


def test_exported_minilm_in_transformers(pretrained, tmp_path):
    params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
    check_export(tmp_path / "out", params, pretrained, ("bad", "fair", "good"))


MODEL_TYPES = [(family, kind) for family in FAMILIES for kind in FAMILIES[family].value().model_types]


@pytest.mark.parametrize(("family", "model_type"), MODEL_TYPES)
def test_exported_folder_in_transformers(tmp_path, family, model_type):
    small = OF_TYPE[family, model_type]
    names = tuple(f"class {i}" for i in range(small.num_labels))
    write_folder(tmp_path / "model", small, model_type)
    classes = load_pretrained(tmp_path / "model", num_labels=small.num_labels)
    assert not classes.head_initialised
    check_export(tmp_path / "out", classes.params, classes, names)
    if "classifier.bias" not in classes.params:  # the labels' mean has no place there
        return
    scores = load_pretrained(tmp_path / "model", num_labels=1, seed=3)
    check_export(tmp_path / "scores", scores.params, scores, ("score",), label_scale=(2.7, 1.5))


@pytest.mark.parametrize(("kind", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_narrow_weights_as_transformers_writes_them(tmp_path, family, kind, dtype):
    """Several files and an index; read as float32, the logits are those of transformers at the same weights."""
    small = FIRST[family]
    _, params = build(small)
    reference = torch_model(small.of, small.config, params).to(dtype)
    reference.save_pretrained(tmp_path / kind, max_shard_size="5KB")
    assert (tmp_path / kind / "model.safetensors.index.json").is_file()
    found = load_pretrained(tmp_path / kind, num_labels=small.num_labels)
    assert not found.head_initialised
    assert {value.dtype for value in found.params.values()} == {np.dtype(np.float32)}
    batch = batch_of(small)
    ours = np.asarray(jax.jit(found.model.apply)(found.params, batch))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / kind, dtype=torch.float32)
    np.testing.assert_allclose(ours, torch_logits(theirs.eval(), batch), rtol=0, atol=1e-5)


def test_exported_mean_pooling_is_a_bare_encoder_in_transformers(tmp_path):
    """AutoModel must give the token vectors whose mean our head sits on."""
    pretrained = load_pretrained("minilm", num_labels=2, pooling="mean")
    params = pretrained.params | minilm_head(2, pretrained.config.hidden_size)
    save_pretrained(tmp_path / "out", params, pretrained)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    batch = texts_batch(pretrained.tokenizer)
    with torch.no_grad():
        hidden = model(**torch_inputs(batch, model)).last_hidden_state.numpy()
    mask = np.asarray(batch["attention_mask"])[:, :, None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    logits = pooled @ params["classifier.kernel"] + params["classifier.bias"]
    ours = np.asarray(jax.jit(pretrained.model.apply)(params, batch))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)
