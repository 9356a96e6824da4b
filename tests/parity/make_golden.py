"""Writes tests/models/golden.json, the logits that `make test` holds the model to without PyTorch.

After `make parity`, which installs torch, from the repository's root:
    PYTHONPATH=tests/models:.venv/parity .venv/bin/python tests/parity/make_golden.py
"""

import json
from pathlib import Path

from reference import torch_logits, torch_model
from small_models import SMALL, batch_of, build, minilm_batch, minilm_head

from agwm_jax.models.huggingface import load_pretrained

GOLDEN = Path(__file__).parents[1] / "models" / "golden.json"


def golden() -> dict[str, list[list[float]]]:
    """Name of the model -> logits [b, c] by transformers in PyTorch, float32."""
    logits = {}
    for name, small in SMALL.items():
        _, params = build(small)
        logits[name] = torch_logits(torch_model(small.config, params), batch_of(small))
    minilm = load_pretrained("minilm", num_labels=3)
    params = minilm.params | minilm_head(3, minilm.config.hidden_size)
    logits["minilm"] = torch_logits(torch_model(minilm.config, params), minilm_batch(minilm.tokenizer))
    return {name: [[float(f"{x:.7g}") for x in row] for row in value] for name, value in logits.items()}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
