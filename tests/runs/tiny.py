"""A tiny checkpoint of any family and tiny settings, so that whole runs take seconds."""

import json
import re
from pathlib import Path

from safetensors.numpy import save_file

from agwm_jax.data.agreement import agreement_task
from agwm_jax.models.family import FAMILIES, build_model, fresh_params, head_paths
from agwm_jax.models.safetensors import to_tensors

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}


def write_checkpoint(folder: Path) -> Path:
    """A Hugging Face folder: random BERT of two layers with pooler, and a word tokenizer for the agreement task."""
    words = {
        w for split in agreement_task().splits.values() for text in split["text"] for w in re.findall(r"\w+", text)
    }
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *".,?'", *sorted({w.lower() for w in words})]
    family = FAMILIES["bert"].value()
    values = {"model_type": "bert", "vocab_size": len(vocabulary), **SIZES}
    config = family.read_config(values)
    model, shapes = build_model(family, config, num_labels=2)
    params = fresh_params(model.weights, shapes, seed=0, scale=config.initializer_range)
    encoder = {path: x for path, x in params.items() if path not in head_paths(model.weights)}
    save_file(
        to_tensors(encoder, family, family.table(config)), folder / "model.safetensors", metadata={"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return folder


QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
"""Environment of a process whose model is tiny: its time would go into compiling."""

SETTINGS = {
    "task.train_size": 40,
    "task.validation_size": 40,
    "task.test_size": 40,
    "task.pool_size": 200,
    "model.unroll_layers": 1,
    "data.batch_size": 8,
    "data.max_length": 40,
    "method.search.epochs": 3,
    "finetune.epochs": 2,
    "method.search.inner.learning_rate": 1e-3,
    "method.search.outer.learning_rate": 1e-2,
    "finetune.optimizer.learning_rate": 1e-3,
    "run.chunk_steps": 3,
    "run.checkpoint_minutes": 0.002,
    "run.compilation_cache": "null",
    "run.tensorboard": "false",
    "run.vectorize": "none",
}
"""Of a run of a few seconds: 12 search steps and 10 finetune steps of 8 examples."""


def words(settings: dict, method: str = "agwm") -> list[str]:
    """Settings as typed; those of a search are left out where the method has none."""
    kept = {name: x for name, x in settings.items() if method == "agwm" or not name.startswith("method.search")}
    return ["--method", method, *(word for name, value in kept.items() for word in (f"--{name}", str(value)))]
