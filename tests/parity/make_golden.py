"""Writes tests/models/golden.json, the logits that `make test` holds the models to without PyTorch.

After `make parity`, which installs torch, from the repository's root:
    PYTHONPATH=tests/models:.venv/parity .venv/bin/python tests/parity/make_golden.py
"""

import json
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from reference import torch_inputs, torch_logits, torch_model
from small_models import RANDOM, SMALL, Small, batch_of, build, minilm_head, texts_batch

from agwm_jax.models.hub import find_folder
from agwm_jax.models.huggingface import load_pretrained

GOLDEN = Path(__file__).parents[1] / "models" / "golden.json"


def mean_vectors(name: str) -> np.ndarray:
    """Mean over real tokens of transformers' bare encoder."""
    batch = texts_batch(load_pretrained(name, num_labels=2, pooling="mean").tokenizer)
    model = transformers.AutoModel.from_pretrained(find_folder(name)).eval()
    with torch.no_grad():
        hidden = model(**torch_inputs(batch, model)).last_hidden_state.numpy()
    mask = batch["attention_mask"][:, :, None]
    return (hidden * mask).sum(1) / mask.sum(1)


def golden() -> dict[str, list[list[float]]]:
    """Name of the model -> logits [b, c] by transformers in PyTorch: random models in float64, others in float32."""

    def logits(small: Small, dtype: type) -> np.ndarray:
        with jax.enable_x64(dtype == np.float64):
            _, params = build(small, dtype=dtype)
        return torch_logits(torch_model(small.of, small.config, params), batch_of(small))

    single = {name: logits(small, np.float32) for name, small in SMALL.items()}
    minilm = load_pretrained("minilm", num_labels=3, pooling="cls")
    params = minilm.params | minilm_head(3, minilm.config.hidden_size)
    model = torch_model(minilm.family, minilm.config, params)
    single["minilm"] = torch_logits(model, texts_batch(minilm.tokenizer))
    single["bert-tiny"] = mean_vectors("bert-tiny")[:, :8]
    found = {name: [[float(f"{x:.7g}") for x in row] for row in value] for name, value in single.items()}
    return found | {name: logits(small, np.float64).tolist() for name, small in RANDOM.items()}


if __name__ == "__main__":
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(logits)}" for name, logits in golden().items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
