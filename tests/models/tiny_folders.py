"""Hugging Face folders of small models, as transformers would lay them out, with tokenizers made here."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from small_models import Small, build

from agwm_jax.models.safetensors import to_tensors

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]


def write_folder(path: Path, small: Small, model_type: str = "bert", **config: Any) -> dict[str, np.ndarray]:
    """A folder of a model with its head and tokenizer; returns the model's parameters."""
    _, params = build(small)
    path.mkdir()
    values = small.config.to_dict() | {"model_type": model_type, "_name_or_path": "somewhere/else"} | config
    (path / "config.json").write_text(json.dumps(values))
    tensors = to_tensors(params, small.of, small.of.table(small.config))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    TOKENIZERS[model_type](path, small.config.vocab_size)
    return params


def _wordpiece(name: str, words: list[str] = WORDS) -> Any:
    def write(path: Path, size: int) -> None:
        (path / "vocab.txt").write_text("\n".join(words[:size]) + "\n")
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))

    return write


def _byte_level(name: str, special: Sequence[str] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")) -> Any:
    """A byte-level BPE of a few bytes and one merge."""

    def write(path: Path, size: int) -> None:
        words = [*special, *"abcdeghiklnorstuwy."[: size - 7], "Ġ", "th"]
        (path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (path / "merges.txt").write_text("#version: 0.2\nt h\n")
        (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))

    return write


def _sentencepiece(name: str, special: Sequence[str] = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")) -> Any:
    def write(path: Path, size: int) -> None:
        import os

        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import transformers

        pieces = [*special[:4], "▁", *"abcdeghiklnorstuwy."[: size - 7], "▁the", special[4]]
        vocab = [(piece, 0.0 if i < 4 else -float(i)) for i, piece in enumerate(pieces)]
        getattr(transformers, name)(vocab=vocab).save_pretrained(str(path))

    return write


def _whole_words(path: Path, size: int) -> None:
    """A tokenizer without a padding token, as decoders have it: the end of the text stands for it."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(40))][:size]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}
    special = [{"id": i, "content": words[i], "special": True} | dict.fromkeys(_FLAGS, False) for i in range(3)]
    file = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model, "added_tokens": special}
    (path / "tokenizer.json").write_text(json.dumps(file))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))


_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
TOKENIZERS = {
    "albert": _sentencepiece("AlbertTokenizer", ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]),
    "bert": _wordpiece("BertTokenizer"),
    "deberta-v2": _sentencepiece("DebertaV2Tokenizer", ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"]),
    "distilbert": _wordpiece("DistilBertTokenizer"),
    "electra": _wordpiece("ElectraTokenizer"),
    "llama": _whole_words,
    "qwen2": _byte_level("Qwen2Tokenizer", ["<|endoftext|>"]),
    "qwen3": _byte_level("Qwen2Tokenizer", ["<|endoftext|>"]),
    "modernbert": _whole_words,
    "mpnet": _wordpiece("MPNetTokenizer", ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *WORDS[5:]]),
    "roberta": _byte_level("RobertaTokenizer"),
    "xlm-roberta": _sentencepiece("XLMRobertaTokenizer"),
    "camembert": _sentencepiece("CamembertTokenizer"),
}
