"""The PyTorch side: transformers' models with given parameters, their logits and their gradients."""

import inspect
from typing import Any

import numpy as np
import torch
import transformers

from agwm_jax.models.family import Family
from agwm_jax.models.safetensors import to_tensors


def torch_model(family: Family, config: Any, params: dict[str, Any]) -> Any:
    """Transformers' classifier with plain attention, holding `params` in their dtype."""
    values = {"pad_token_id": 0, "num_labels": params["classifier.bias"].shape[0]} | config.to_dict()
    hf_config = transformers.AutoConfig.for_model(next(iter(family.model_types)), **values)
    hf_config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(hf_config).eval()
    tensors = to_tensors(params, family, family.table(config))
    model = model.to(torch.float64 if params["classifier.bias"].dtype == np.float64 else torch.float32)
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    return model


def torch_inputs(batch: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    names = {"input_ids", "token_type_ids", "attention_mask"} & inspect.signature(model.forward).parameters.keys()
    return {name: torch.tensor(np.asarray(batch[name]), dtype=torch.long) for name in names}


def torch_logits(model: Any, batch: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(batch, model)).logits.numpy()


def torch_gradients(model: Any, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name in the file -> gradient of transformers' own loss."""
    labels = torch.tensor(np.asarray(batch["labels"]))
    labels = labels if labels.is_floating_point() else labels.long()
    model.zero_grad()
    model(**torch_inputs(batch, model), labels=labels).loss.backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
