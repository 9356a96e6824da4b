"""The PyTorch side: transformers' models with given parameters, their logits and their gradients."""

import inspect
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from agwm_jax.models.family import Family
from agwm_jax.models.safetensors import to_tensors


def torch_model(family: Family, config: Any, params: dict[str, Any]) -> Any:
    """Transformers' classifier with plain attention, holding `params` in their dtype."""
    values = {"pad_token_id": 0, "num_labels": params["classifier.kernel"].shape[1]} | config.to_dict()
    kind = getattr(config, "model_type", next(iter(family.model_types)))
    hf_config = transformers.AutoConfig.for_model(kind, **values)
    hf_config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(hf_config).eval()
    tensors = to_tensors(params, family, family.table(config))
    model = model.to(torch.float64 if params["classifier.kernel"].dtype == np.float64 else torch.float32)
    if model.dtype == torch.float64:
        in_float64(model)
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in tensors.items()}, strict=True)
    return model


def in_float64(model: Any) -> None:
    """Replace what transformers computes in float32 at any dtype: angles, norms, plain softmax, roots."""
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            model.config._attn_implementation = "sdpa"
            sys.modules[type(model).__module__].apply_rotary_pos_emb = exact_turn
            module.forward = partial(exact_angles, model.config)
        if type(module).__name__ == "DisentangledSelfAttention":
            sys.modules[type(module).__module__].scaled_size_sqrt = exact_root
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(exact_norm, module)


def exact_turn(query: Any, keys: Any, cosine: Any, sine: Any, unsqueeze_dim: int = 1) -> Any:
    """Queries and keys turned by the angles, in their dtype."""
    cosine, sine = cosine.unsqueeze(unsqueeze_dim), sine.unsqueeze(unsqueeze_dim)

    def turned(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    return turned(query), turned(keys)


def exact_root(query: Any, factor: int) -> torch.Tensor:
    """By which scores are divided."""
    return torch.sqrt(torch.tensor(query.size(-1) * factor, dtype=torch.float64))


def exact_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """In the dtype of `x`."""
    return module.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + module.variance_epsilon)


def exact_angles(config: Any, x: Any, position_ids: Any, layer_type: str | None = None) -> Any:
    """Cosine and sine of rotary positions in float64."""
    rope = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    if rope["rope_type"] == "linear":
        frequencies /= rope["factor"]
    elif rope["rope_type"] == "llama3":
        turns = rope["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies *= share + (1 - share) / rope["factor"]
    angles = position_ids[..., None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def torch_inputs(batch: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    names = {"input_ids", "token_type_ids", "attention_mask"} & inspect.signature(model.forward).parameters.keys()
    return {name: torch.tensor(np.asarray(batch[name]), dtype=torch.long) for name in names}


def torch_logits(model: Any, batch: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return model(**torch_inputs(batch, model)).logits.numpy()


def torch_gradients(model: Any, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Name in the file -> gradient of the mean loss, taken here: some of transformers' classes do it in float32."""
    labels = torch.tensor(np.asarray(batch["labels"]))
    model.zero_grad()
    logits = model(**torch_inputs(batch, model)).logits
    if labels.is_floating_point():
        torch.nn.functional.mse_loss(logits[:, 0], labels).backward()
    else:
        torch.nn.functional.cross_entropy(logits, labels.long()).backward()
    return {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
