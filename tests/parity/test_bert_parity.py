"""BERT against transformers in PyTorch: logits, gradients of every parameter, and exported folders."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from make_golden import GOLDEN, golden
from reference import torch_gradients, torch_inputs, torch_logits, torch_model
from small_models import SMALL, TEXTS, batch_of, build, loss_of, minilm_batch, minilm_head

from agwm_jax.models.bert import ACTIVATIONS
from agwm_jax.models.huggingface import load_pretrained, save_pretrained
from agwm_jax.models.safetensors import to_tensors

CASES = [*SMALL, "minilm"]


@pytest.fixture(scope="module")
def pretrained():
    return load_pretrained("minilm", num_labels=3)


@pytest.fixture(params=CASES)
def case(request, pretrained):
    """Model of ours, its parameters, the same in PyTorch, and a batch."""
    if request.param != "minilm":
        small = SMALL[request.param]
        apply, params = build(small)
        return apply, params, torch_model(small.config, params), batch_of(small)
    params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
    batch = minilm_batch(pretrained.tokenizer) | {"labels": jnp.array([0, 2, 1, 2])}
    return pretrained.apply, params, torch_model(pretrained.config, params), batch


def test_logits(case):
    apply, params, model, batch = case
    expected = torch_logits(model, batch)
    difference = np.abs(np.asarray(jax.jit(apply)(params, batch)) - expected).max()
    print(f"logits up to {np.abs(expected).max():.3g}, difference {difference:.2e}")
    assert difference <= 1e-5


def test_gradients(case):
    apply, params, model, batch = case
    expected = torch_gradients(model, batch)
    ours = to_tensors(jax.jit(jax.grad(loss_of(apply, batch)))(params))
    assert ours.keys() == expected.keys()
    worst = 0.0
    for name, gradient in expected.items():
        # A bias of the keys shifts all scores of a query alike, so its exact gradient is 0; the query's is its scale.
        scale = np.linalg.norm(expected[name.replace("self.key.bias", "self.query.bias")])
        error = np.linalg.norm(ours[name] - gradient)
        worst = max(worst, error / scale if scale else error)
        assert error <= 1e-4 * scale, name
    print(f"worst relative error {worst:.2e}")


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
        np.testing.assert_allclose(stored[name], logits, rtol=0, atol=2e-6)


def test_exported_folder_in_transformers(pretrained, tmp_path):
    params = pretrained.params | minilm_head(3, pretrained.config.hidden_size)
    save_pretrained(tmp_path / "out", params, pretrained, label_names=("bad", "fair", "good"))
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    assert model.config.problem_type == "single_label_classification"
    batch = minilm_batch(pretrained.tokenizer)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for i, (first, second) in enumerate(TEXTS):
        ids = tokenizer(first, second)["input_ids"]
        assert ids == batch["input_ids"][i, : len(ids)].tolist()
    with torch.no_grad():
        logits = model.eval()(**torch_inputs(batch)).logits.numpy()
    ours = np.asarray(jax.jit(pretrained.apply)(params, batch))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)


def test_exported_mean_pooling_is_a_bare_encoder_in_transformers(tmp_path):
    """AutoModel must give the token vectors whose mean our head sits on."""
    pretrained = load_pretrained("minilm", num_labels=2, pooling="mean")
    params = pretrained.params | minilm_head(2, pretrained.config.hidden_size)
    save_pretrained(tmp_path / "out", params, pretrained)
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    batch = minilm_batch(pretrained.tokenizer)
    with torch.no_grad():
        hidden = model(**torch_inputs(batch)).last_hidden_state.numpy()
    mask = np.asarray(batch["attention_mask"])[:, :, None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    logits = pooled @ np.asarray(params["classifier.kernel"]) + np.asarray(params["classifier.bias"])
    ours = np.asarray(jax.jit(pretrained.apply)(params, batch))
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5)
