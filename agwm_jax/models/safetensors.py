"""Safetensors files in and out, by a family's table: every tensor is used, known to be unused, or refused."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.errors import AgwmError
from agwm_jax.models.family import Family, Row, Table
from agwm_jax.models.weights import CLASSES

_WRAPPERS = ("module.", "_orig_mod.")
"""Before every name where a model was saved in the wrapper of data parallelism or of `torch.compile`."""
_SHOWN = 2


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


def canonical(tensors: Mapping[str, np.ndarray], family: Family) -> dict[str, np.ndarray]:
    """The same tensors by the names of the table: without wrappers and prefix, old endings renamed."""
    names = list(tensors)
    while names and (wrapper := next((w for w in _WRAPPERS if all(n.startswith(w) for n in names)), None)):
        names = [name.removeprefix(wrapper) for name in names]
    names = [name.removeprefix(family.prefix) for name in names]
    for old, new in family.renames.items():
        names = [re.sub(rf"\b{re.escape(old)}$", new, name) for name in names]
    return dict(zip(names, tensors.values(), strict=True))


def num_classes(tensors: Mapping[str, np.ndarray], table: Table) -> int | None:
    """Size of the head among `canonical` tensors; None where there is none."""
    sizes = [
        tensors[row.name].shape[0] for row in table.values() if row.weight.axes[-1] == CLASSES and row.name in tensors
    ]
    return int(sizes[0]) if sizes else None


def to_params(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    family: Family,
    table: Table,
    *,
    use_head: bool,
    source: str,
) -> dict[str, np.ndarray]:
    """Turn the tensors of a file into parameters; every tensor must be used, known to be unused, or refused.

    Args:
        tensors: by name, as `canonical` gives them.
        shapes: those of the parameters that the model, as built from config.json, has.
        family: whose files they are.
        table: of the family, for this model.
        use_head: take the head if the file has one of the model's shape.
        source: named in the error.

    Returns:
        Path -> array in the dtype of `shapes`; without the head's paths if it is not taken.

    Raises:
        AgwmError: a summary of all that is missing, unknown, of another shape, or not a floating-point tensor.
    """
    depth = next((shapes[path].shape[0] for path in shapes if table[path].weight.is_stacked), 0)
    head = [path for path in shapes if table[path].weight.role == "head"]
    use_head = use_head and not any(_misfit(tensors, table[path], shapes[path].shape) for path in head)
    wanted = [path for path in shapes if use_head or path not in head]
    params, missing, misfits, used = {}, [], [], set()
    for path in wanted:
        row, shape = table[path], shapes[path].shape
        names, shape = (_names(row, depth), shape[1:]) if row.weight.is_stacked else ([row.name], shape)
        names = names[row.first_layer :]
        used.update(names)
        missing += [name for name in names if name not in tensors]
        wrong = [text for name in names if name in tensors and (text := _misfit(tensors, row, shape, name))]
        misfits += wrong
        if not missing and not misfits:
            i, parts = row.part
            own = [np.split(tensors[name], parts)[i] for name in names]
            values = [row.transform.read(tensor).astype(shapes[path].dtype) for tensor in own]
            values = [np.ones_like(values[0])] * row.first_layer + values
            params[path] = np.stack(values) if row.weight.is_stacked else np.ascontiguousarray(values[0])
    # A head of another task or another size and, with mean pooling, the pooler are no part of this model.
    unused = {row.name for path, row in table.items() if path not in wanted}
    unknown = [n for n in tensors if n not in used and n not in unused and not re.fullmatch(family.ignored, n)]
    faults = [
        _summary("missing from the weights: ", _fold(missing)),
        _summary("not part of the model that config.json describes: ", _fold(unknown)),
        _summary("", _fold(misfits)),
    ]
    if any(faults):
        # Some path that only one way of pooling has.
        poolers = [name for name in missing if name.startswith("pooler.")]
        remedy = "\nA checkpoint without a pooler works with pooling: mean." if poolers else ""
        listed = "".join(f"\n  - {fault}" for fault in faults if fault)
        raise AgwmError(f"The weights in {source} and its config.json disagree:{listed}{remedy}")
    return params


def to_tensors(params: Mapping[str, Any], family: Family, table: Table) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: name in the file, with the family's prefix but for the head -> tensor.

    Tensors are float64 where the parameters are, else float32.
    """
    tensors: dict[str, dict[int, np.ndarray]] = {}
    for path, value in params.items():
        row = table[path]
        prefix = family.prefix if row.prefixed and row.weight.role != "head" else ""
        array = np.asarray(value, np.float64 if value.dtype == np.float64 else np.float32)
        names, parts = (_names(row, len(array)), array) if row.weight.is_stacked else ([row.name], array[None])
        for name, part in list(zip(names, parts, strict=True))[row.first_layer :]:
            tensors.setdefault(prefix + name, {})[row.part[0]] = row.transform.write(part)
    # Safetensors writes memory as it lies.
    return {name: np.ascontiguousarray(np.concatenate([own[i] for i in sorted(own)])) for name, own in tensors.items()}


def _names(row: Row, depth: int) -> list[str]:
    return [row.name.format(i) for i in range(depth)]


def _misfit(tensors: Mapping[str, np.ndarray], row: Row, shape: tuple[int, ...], name: str = "") -> str | None:
    name = name or row.name
    if name not in tensors:
        return f"{name} is missing"
    first, *others = row.transform.write(np.broadcast_to(np.float32(0), shape)).shape
    expected = (first * row.part[1], *others)
    if tensors[name].shape != expected:
        return f"{name} is {list(tensors[name].shape)} in the weights, {list(expected)} by config.json"
    if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
        return f"{name} holds {tensors[name].dtype}, expected floating-point numbers"
    return None


def _summary(what: str, folded: list[str]) -> str:
    if not folded:
        return ""
    more = f" and {len(folded) - _SHOWN} more" if len(folded) > _SHOWN else ""
    return what + ("; " if not what else ", ").join(folded[:_SHOWN]) + more


def _fold(texts: Iterable[str]) -> list[str]:
    """Texts that differ in the layer number alone as one, "encoder.layer.{6..11}.output.dense.bias"."""
    layers: dict[tuple[str, str], list[int]] = {}
    for text in texts:
        found = re.match(r"([a-z_.]*?)\.(\d+)\.(.*)", text)
        before, number, after = found.groups() if found else ("", None, text)
        layers.setdefault((before, after), []).extend([] if number is None else [int(number)])
    folded = []
    for (before, after), numbers in layers.items():
        span = f"{{{min(numbers)}..{max(numbers)}}}" if len(numbers) > 1 else "".join(map(str, numbers))
        folded.append(f"{before}.{span}.{after}" if numbers else after)
    return folded
