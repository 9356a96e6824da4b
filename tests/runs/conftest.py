"""A tiny checkpoint and tiny settings, so that whole runs take seconds."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest
from flax import nnx
from safetensors.numpy import save_file

from agwm_jax.data.agreement import agreement_task
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.models.safetensors import HEAD, to_tensors
from agwm_jax.settings.config import Config, load_config

QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""Environment of a process whose model is tiny: its time would go into compiling."""


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """The same for what runs in this process."""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A Hugging Face folder: random BERT of two layers with pooler, and a word tokenizer for the agreement task."""
    folder = tmp_path_factory.mktemp("tiny")
    words = {
        w for split in agreement_task().splits.values() for text in split["text"] for w in re.findall(r"\w+", text)
    }
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?'", *sorted({w.lower() for w in words})]
    config = BertConfig(len(vocabulary), 16, 2, 2, 32, max_position_embeddings=40)
    _, params = functionalize(BertClassifier(config, num_labels=2, rngs=nnx.Rngs(0)))
    encoder = {path: 10 * x if path.endswith("kernel") else x for path, x in params.items() if path not in HEAD}
    save_file(to_tensors(encoder), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config) | {"model_type": "bert"}))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


@pytest.fixture(scope="session")
def settings(tiny_checkpoint) -> list[str]:
    """Overrides of a run of a few seconds: 12 search steps and 10 finetune steps of 8 examples."""
    values = {
        "model": tiny_checkpoint,
        "task.train_size": 40,
        "task.validation_size": 40,
        "task.test_size": 40,
        "data.batch_size": 8,
        "data.max_length": 40,
        "search.epochs": 3,
        "finetune.epochs": 2,
        "search.inner.learning_rate": 1e-3,
        "search.outer.learning_rate": 1e-2,
        "finetune.optimizer.learning_rate": 1e-3,
        "run.chunk_steps": 3,
        "run.checkpoint_steps": 4,
        "run.compilation_cache": "null",
        "run.tensorboard": "false",
        "run.vectorize": "none",
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def configure(settings, tmp_path):
    """``configure("--method", "vanilla", output="a") -> Config``; the run folder lies in the test's own folder."""

    def make(*overrides: str, output: str = "run") -> Config:
        return load_config(None, [*settings, "--output", str(tmp_path / output), *overrides])

    return make


def same_bits(a, b) -> bool:
    """Whether two pytrees have one structure and equal bits everywhere."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(bool((x == y).all()) for x, y in leaves)
