"""The PyTorch side: transformers' BERT with given parameters, its logits and its gradients."""

import dataclasses
from typing import Any

import jax
import numpy as np
import torch
import transformers

from agwm_jax.models.bert import BertConfig
from agwm_jax.models.safetensors import to_tensors


def torch_model(config: BertConfig, params: dict[str, jax.Array]) -> Any:
    """BertForSequenceClassification in float32 with plain attention, holding `params`."""
    num_labels = params["classifier.bias"].shape[0]
    hf_config = transformers.BertConfig(
        **dataclasses.asdict(config), num_labels=num_labels, attn_implementation="eager", pad_token_id=0
    )
    model = transformers.BertForSequenceClassification(hf_config).eval()
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in to_tensors(params).items()}, strict=True)
    return model


def torch_inputs(batch: dict[str, jax.Array]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: torch.tensor(np.asarray(batch[name]), dtype=torch.long) for name in names}


def torch_logits(model: Any, batch: dict[str, jax.Array]) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(batch)).logits.numpy()


def torch_gradients(model: Any, batch: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Name in the file -> gradient of transformers' own loss."""
    labels = torch.tensor(np.asarray(batch["labels"]))
    labels = labels if labels.is_floating_point() else labels.long()
    model.zero_grad()
    model(**torch_inputs(batch), labels=labels).loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
