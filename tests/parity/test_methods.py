"""Every method's export in plain transformers, and LoRA's merge against PEFT's."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from reference import torch_inputs, torch_logits, torch_model
from short_settings import section
from small_models import FIRST, batch_of, build
from tiny_folders import write_folder

from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.training import Finetune
from agwm_jax.models.huggingface import load_pretrained, save_pretrained
from agwm_jax.models.loss import batch_loss

SMALL = FIRST["bert"]
EXAMPLES = 40


def setup_of(model, params) -> Setup:
    def loss(*, reverse_only=False):
        return batch_loss(model.apply, "classification", reverse_only=reverse_only)

    return Setup(
        model=model,
        loss=loss,
        criterion=loss().criterion,
        kind="classification",
        shapes={path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in params.items()},
        frozen=(),
        finetune=Finetune(),
        batch_size=8,
        num_examples=EXAMPLES,
        rng=lambda use: np.random.default_rng(zlib.crc32(use.encode())),
        rows={"development": range(EXAMPLES - 8, EXAMPLES)},
        labels=np.arange(EXAMPLES) % SMALL.num_labels,
    )


def learnt_by(method, params):
    """Random variables of the shapes that a run of the method leaves; gates and shares in [0, 1]."""
    rng = np.random.default_rng(3)

    def draw(spec):
        if not jnp.issubdtype(spec.dtype, jnp.floating):
            return jnp.ones(spec.shape, spec.dtype)
        return jnp.asarray(rng.uniform(0.1, 0.9, spec.shape), spec.dtype)

    return jax.tree.map(draw, method.learnt_shapes(params))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "model"
    write_folder(folder, SMALL)
    found = load_pretrained(folder, num_labels=SMALL.num_labels)
    return found._replace(params=jax.tree.map(jnp.asarray, found.params))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "zero_shot"])  # a score of pairs, no classifier
def test_an_export_has_the_logits_of_the_merge_in_plain_transformers(name, pretrained, tmp_path):
    method = METHODS[name].value.model_validate(section(name)).build(setup_of(pretrained.model, pretrained.params))
    merged = method.merge(pretrained.params, learnt_by(method, pretrained.params))
    changed = [path for path, x in merged.items() if np.any(np.asarray(x) != pretrained.params[path])]
    assert changed
    save_pretrained(tmp_path / "export", jax.device_get(merged), pretrained)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    batch = batch_of(SMALL)
    ours = np.asarray((method.model or pretrained.model).apply(merged, batch))
    np.testing.assert_allclose(torch_logits(theirs, batch), ours, atol=1e-5 * max(1, np.abs(ours).max()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize(("r", "alpha"), [(2, 16.0), (4, 3.0)])
def test_lora_is_merged_as_peft_merges_it(r, alpha):
    model, params = build(SMALL)
    params = jax.tree.map(jnp.asarray, params)
    changed = {path for path in params if path.endswith(("query.kernel", "value.kernel"))}
    rng = np.random.default_rng(0)
    method = METHODS["lora"].value(r=r, alpha=alpha).build(setup_of(model, params))
    variables = learnt_by(method, params)
    assert variables["lora"].keys() == changed
    variables["task"] = {path: params[path] for path in variables["task"]}
    variables["lora"] = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), variables["lora"])
    merged = jax.device_get(method.merge(params, variables))

    start = torch_model(SMALL.of, SMALL.config, params)
    adapted = peft.get_peft_model(
        start, peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    state = {}
    for path, own in variables["lora"].items():
        kind = path.split(".")[-2]
        for layer in range(SMALL.config.num_hidden_layers):
            where = f"bert.encoder.layer.{layer}.attention.self.{kind}"
            state[f"{where}.lora_A"] = torch.tensor(np.asarray(own.left[layer]).T.copy())
            state[f"{where}.lora_B"] = torch.tensor(np.asarray(own.right[layer]).T.copy())
    with torch.no_grad():
        loaded = 0
        for name, parameter in adapted.named_parameters():
            for where, value in state.items():
                if f".{where}.default" in name:
                    parameter.copy_(value)
                    loaded += 1
        theirs = adapted.merge_and_unload().eval()
        logits = theirs(**torch_inputs(batch_of(SMALL), theirs)).logits.numpy()
    assert loaded == len(state)
    ours = np.asarray(model.apply(merged, batch_of(SMALL)))
    assert np.abs(ours - np.asarray(model.apply(params, batch_of(SMALL)))).max() > 0.1
    np.testing.assert_allclose(logits, ours, atol=1e-5 * np.abs(ours).max())
