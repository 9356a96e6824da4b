"""The table between the names of BERT's weights in safetensors files and the paths of our parameters."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from agwm_jax.errors import AgwmError

_DENSE = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
_NORM = {"attention_norm": "attention.output.LayerNorm", "output_norm": "output.LayerNorm"}

# Path of ours -> (name in the file, is it stored transposed). "{}" stands for the layer number; PyTorch keeps a dense
# layer's weight as [d_out, d_in]. Names are those of the bare encoder, without the prefix "bert.".
TABLE: dict[str, tuple[str, bool]] = {
    "embeddings.word.embedding": ("embeddings.word_embeddings.weight", False),
    "embeddings.position.embedding": ("embeddings.position_embeddings.weight", False),
    "embeddings.token_type.embedding": ("embeddings.token_type_embeddings.weight", False),
    "embeddings.norm.scale": ("embeddings.LayerNorm.weight", False),
    "embeddings.norm.bias": ("embeddings.LayerNorm.bias", False),
    **{f"encoder.layers.{ours}.kernel": (f"encoder.layer.{{}}.{name}.weight", True) for ours, name in _DENSE.items()},
    **{f"encoder.layers.{ours}.bias": (f"encoder.layer.{{}}.{name}.bias", False) for ours, name in _DENSE.items()},
    **{f"encoder.layers.{ours}.scale": (f"encoder.layer.{{}}.{name}.weight", False) for ours, name in _NORM.items()},
    **{f"encoder.layers.{ours}.bias": (f"encoder.layer.{{}}.{name}.bias", False) for ours, name in _NORM.items()},
    "pooler.kernel": ("pooler.dense.weight", True),
    "pooler.bias": ("pooler.dense.bias", False),
    "classifier.kernel": ("classifier.weight", True),
    "classifier.bias": ("classifier.bias", False),
}
HEAD = ("classifier.kernel", "classifier.bias")

# Left alone without a word: buffers that hold no weight, and the heads of other tasks.
_IGNORED = re.compile(r"embeddings\.(position|token_type)_ids|cls\..*|qa_outputs\..*")
# Names from TensorFlow days, still in the hub's bert-base-uncased.
_LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises:
        AgwmError: there is neither, a file is missing, truncated or not safetensors.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return _read_file(folder / "model.safetensors")
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise AgwmError(f"{index} is not a valid index of safetensors files: {error!r}.") from error
        absent = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
        if absent:
            raise AgwmError(f"{index} lists files that are not in the folder: {', '.join(absent)}; fetch them again.")
        return {name: tensor for shard in shards for name, tensor in _read_file(folder / shard).items()}
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        raise AgwmError(
            f"{folder} has no model.safetensors, only {', '.join(pickles)}: a pickle can run code and is never opened. "
            "Convert it where you trust it, with transformers and PyTorch: "
            "AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise AgwmError(f"{folder} has no model.safetensors (nor model.safetensors.index.json); it holds no weights.")


def _read_file(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, KeyError) as error:
        raise AgwmError(
            f"{path} is truncated or not a safetensors file ({error}); copy or download it again."
        ) from error


def to_params(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, jax.ShapeDtypeStruct], *, use_head: bool, source: str
) -> dict[str, Array]:
    """Parameters out of a file's tensors; strict both ways.

    Args:
        tensors: name in the file -> tensor; with or without the prefix "bert.".
        shapes: path -> shape that the model, built from config.json, has.
        use_head: take the head if the file has one of the model's shape.
        source: named in the error.

    Returns:
        Path -> float32 array; without the head's two paths if it is not taken.

    Raises:
        AgwmError: one list of everything that is missing, unknown, of another shape, or not a floating-point tensor.
    """
    tensors = _canonical(tensors)
    depth = shapes["encoder.layers.query.kernel"].shape[0]
    head = {path: tensors.get(TABLE[path][0]) for path in HEAD}
    use_head = use_head and all(
        tensor is not None and tensor.shape == shapes[path].shape[::-1] for path, tensor in head.items()
    )
    wanted = {path: shape for path, shape in shapes.items() if use_head or path not in HEAD}
    # A head of another task or another size and, with mean pooling, the pooler are no part of this model.
    unused = {TABLE[path][0] for path in TABLE if path not in wanted}
    params, missing, unequal, used = {}, [], [], set()
    for path, expected in wanted.items():
        name, transposed = TABLE[path]
        stacked = "{}" in name
        shape = expected.shape[1:] if stacked else expected.shape
        shape = shape[::-1] if transposed else shape
        names = [name.format(i) for i in range(depth)] if stacked else [name]
        used.update(names)
        missing += [name for name in names if name not in tensors]
        for name in (name for name in names if name in tensors):
            if tensors[name].shape != shape:
                unequal.append(f"{name} is {list(tensors[name].shape)} in the weights, {list(shape)} by config.json")
            elif not jnp.issubdtype(tensors[name].dtype, jnp.floating):
                unequal.append(f"{name} holds {tensors[name].dtype}, expected floating-point numbers")
        if not missing and not unequal:
            values = [(tensors[name].T if transposed else tensors[name]).astype(np.float32) for name in names]
            params[path] = jnp.array(np.stack(values) if stacked else values[0])
    unknown = [name for name in tensors if name not in used and name not in unused and not _IGNORED.fullmatch(name)]
    faults = [f"{name} is missing from the weights" for name in _fold(missing)]
    faults += [f"{name} is not part of the model that config.json describes" for name in _fold(unknown)]
    faults += unequal
    if faults:
        remedy = ""
        if any(name.startswith("pooler.") for name in missing):
            remedy = "\nA checkpoint without a pooler works with pooling: mean."
        listed = "".join(f"\n  - {fault}" for fault in faults)
        raise AgwmError(f"The weights in {source} and its config.json disagree:{listed}{remedy}")
    return params


def to_tensors(params: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: name in the file, with the prefix "bert." but for the head, -> float32 tensor."""
    tensors = {}
    for path, value in params.items():
        name, transposed = TABLE[path]
        name = name if path in HEAD else f"bert.{name}"
        array = np.asarray(value, np.float32)
        for i, tensor in enumerate(array if "{}" in name else array[None]):
            tensors[name.format(i)] = np.ascontiguousarray(tensor.T if transposed else tensor)
    return tensors


def _canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("bert.")
        for old, new in _LEGACY.items():
            name = re.sub(rf"\b{re.escape(old)}$", new, name)
        renamed[name] = tensor
    return renamed


def _fold(names: Iterable[str]) -> list[str]:
    """Names that differ in the layer number alone as one entry, "encoder.layer.{6..11}.output.dense.bias"."""
    layers: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"encoder\.layer\.(\d+)\.", name)
        template = name if found is None else f"encoder.layer.{{}}.{name[found.end() :]}"
        layers.setdefault(template, []).extend([int(found.group(1))] if found else [])
    folded = []
    for template, numbers in layers.items():
        span = f"{{{min(numbers)}..{max(numbers)}}}" if len(numbers) > 1 else "".join(map(str, numbers))
        folded.append(template.replace("{}", span))
    return folded
