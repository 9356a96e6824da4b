"""Small models with random weights, the same for the golden logits, the unit tests and the parity tests."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.models.bert import BertConfig
from agwm_jax.models.family import FAMILIES, Family, Options, build_model
from agwm_jax.models.model import Model


class Small(NamedTuple):
    """Sizes of a model and of the batch that is put through it."""

    config: Any
    num_labels: int
    lengths: tuple[int, ...]  # real tokens of each text; the longest is t
    seed: int
    family: str = "bert"

    @property
    def of(self) -> Family:
        return FAMILIES[self.family].value()


SMALL = {
    "gelu": Small(BertConfig(50, 32, 2, 4, 64, "gelu", max_position_embeddings=16), 3, (9, 4, 1), 1),
    "gelu_new": Small(
        BertConfig(61, 24, 3, 3, 40, "gelu_new", max_position_embeddings=16, type_vocab_size=1), 1, (16, 11), 2
    ),
    "relu": Small(
        BertConfig(33, 16, 1, 1, 20, "relu", max_position_embeddings=7, type_vocab_size=5, layer_norm_eps=1e-5),
        2,
        (5, 5, 3, 2),
        3,
    ),
    "silu": Small(BertConfig(40, 20, 2, 2, 24, "silu", max_position_embeddings=12), 5, (12, 7, 6), 4),
}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OWN_KEYS = {
    "albert": lambda seed, width: {"embedding_size": (8, 6, width)[seed], "inner_group_num": 1 + seed % 2},
    "llama": lambda seed, width: (
        {"model_type": "llama", "num_key_value_heads": 1, "rope_scaling": LLAMA3, "attention_bias": True},
        {"model_type": "qwen2", "rope_theta": 100.0, "num_key_value_heads": 1},
        {
            "model_type": "qwen3",
            "head_dim": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "linear", "factor": 3.0},
        },
    )[seed],
    "modernbert": lambda seed, width: (
        {"local_attention": 8, "classifier_pooling": "mean", "norm_bias": True},
        {"local_attention": 5, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
        {"local_attention": 6, "num_hidden_layers": 6, "global_attn_every_n_layers": 2, "local_rope_theta": 50.0},
    )[seed],
    "deberta_v2": lambda seed, width: {
        "relative_attention": True,
        "pos_att_type": (["p2c", "c2p"], "c2p|p2c", ["c2p"])[seed],
        "share_att_key": seed == 0,
        "position_buckets": (8, 6, -1)[seed],
        "max_relative_positions": (-1, 24, -1)[seed],
        "norm_rel_ebd": ("layer_norm", "layer_norm", "none")[seed],
        "position_biased_input": seed == 2,
        "type_vocab_size": (0, 2, 0)[seed],
        "embedding_size": (None, 5, None)[seed],
    },
    "electra": lambda seed, width: {"embedding_size": (6, 10, width)[seed]},
}
"""Of config.json by family, of the number of the configuration and its width."""
LENGTHS = {
    ("mpnet", 2): (150, 3, 61),
    ("deberta_v2", 0): (40, 7),
    ("deberta_v2", 1): (33, 12),
    ("modernbert", 0): (29, 4),
    ("modernbert", 2): (17, 31, 9),
}
"""Of texts, where they matter: beyond the farthest bucket, and the blocks of local attention."""


def random_small(family: str, seed: int) -> Small:
    """A random configuration of a family, of config.json's common keys and its own."""
    rng = np.random.default_rng(1000 + seed)
    heads, texts = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    lengths = LENGTHS.get((family, seed)) or tuple(int(n) for n in rng.integers(1, 12, texts))
    read_config = FAMILIES[family].value().read_config
    values = {
        "vocab_size": int(rng.integers(50, 90)),
        "hidden_size": 4 * heads * int(rng.integers(1, 3)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(5, 40)),
        "hidden_act": ("gelu", "relu", "gelu_new")[seed % 3],
        "max_position_embeddings": int(rng.integers(160, 180)),
        "type_vocab_size": 1 + seed % 3,
        "layer_norm_eps": 1e-5,
    }
    values |= OWN_KEYS[family](seed, values["hidden_size"]) if family in OWN_KEYS else {}
    names = getattr(read_config.__self__, "file_names", {})
    config = read_config({names.get(name, name): value for name, value in values.items()})
    return Small(config, (1, 2, 4)[seed % 3], lengths, 50 + seed, family)


RANDOM = {f"{family}-{seed}": random_small(family, seed) for family in FAMILIES for seed in range(3)}
"""Every family that the package knows, three times."""

OF_TYPE = {
    (family, kind): next(
        (small for small in RANDOM.values() if getattr(small.config, "model_type", None) == kind),
        RANDOM[f"{family}-1"],
    )
    for family in FAMILIES
    for kind in FAMILIES[family].value().model_types
}
"""A classifier for every model type."""

FIRST = {family: RANDOM[f"{family}-1"] for family in FAMILIES}
"""One classifier a family."""


def build(small: Small, *, pooling: str | None = None, **options: Any) -> tuple[Model, dict[str, np.ndarray]]:
    """Model and parameters; weights large enough that attention is far from even. Layers are scanned one by one unless
    options say otherwise, for the program then compiles in half the time."""
    options = {"unroll": 1, **options}
    model, shapes = build_model(
        small.of, small.config, num_labels=small.num_labels, pooling=pooling, options=Options(**options)
    )
    rng = np.random.default_rng(small.seed)
    values = {}
    for path in sorted(shapes):
        noise = rng.normal(size=shapes[path].shape)
        values[path] = (1 + 0.2 * noise if path.endswith("scale") else 0.3 * noise).astype(shapes[path].dtype)
    for path, row in small.of.table(small.config).items():
        if row.first_layer:
            values[path][: row.first_layer] = 1  # as it is read: the file has nothing there
    return model, values


def batch_of(small: Small, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A padded batch with labels; no text holds the padding token."""
    rng = np.random.default_rng(100 + small.seed)
    shape = len(small.lengths), max(small.lengths)
    mask = np.arange(shape[1])[None] < np.array(small.lengths)[:, None]
    padding = getattr(small.config, "pad_token_id", 0)
    ids = rng.integers(1, small.config.vocab_size, shape)
    ids = np.where(mask, np.where(ids == padding, 0, ids), padding)
    types = rng.integers(0, max(1, getattr(small.config, "type_vocab_size", 0)), shape) * mask
    regression = small.num_labels == 1
    labels = rng.normal(size=shape[0]) if regression else rng.integers(0, small.num_labels, shape[0])
    return {
        "input_ids": ids.astype(np.int32),
        "token_type_ids": types.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": labels.astype(dtype if regression else np.int32),
    }


TEXTS = [
    ("The keys to the old cabinet are on the table.", None),
    ("The keys to the old cabinet is on the table.", None),
    ("A man is playing a guitar.", "Someone makes music on a stringed instrument, slowly and with great care."),
    ("Naïve café façades — 東京!", "unbelievable"),
]


def minilm_head(num_labels: int, width: int) -> dict[str, np.ndarray]:
    """A head by formula, so that golden logits of a checkpoint without one can be stored."""
    i, j = np.meshgrid(np.arange(width), np.arange(num_labels), indexing="ij")
    kernel = np.cos(0.7 * i + 1.3 * j).astype(np.float32)
    return {"classifier.kernel": kernel, "classifier.bias": np.arange(num_labels, dtype=np.float32)}


def texts_batch(tokenizer: Any) -> dict[str, np.ndarray]:
    """The four texts, two of them pairs, padded to the longest; types 0 where the tokenizer has none."""
    rows = [tokenizer(a, b) if b else tokenizer(a) for a, b in TEXTS]
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    found = {}
    for name, padding in fill.items():
        columns = [row[name] if name in row else [0] * len(row["input_ids"]) for row in rows]
        found[name] = np.array([column + [padding] * (length - len(column)) for column in columns], np.int32)
    return found


def equations(program: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of the jaxprs within it too."""
    for equation in getattr(program, "jaxpr", program).eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(value)


def num_products(program: Any) -> int:
    """Matrix products in a jaxpr."""
    return sum(equation.primitive.name == "dot_general" for equation in equations(program))


def loss_of(apply: Any, batch: dict[str, Any], **options: Any) -> Any:
    """Mean loss of the batch as a function of the parameters: cross entropy, or squared error for one output."""

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        logits = apply(params, batch, **options)
        if logits.shape[1] == 1:
            return jnp.mean((logits[:, 0] - batch["labels"]) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1))

    return loss
