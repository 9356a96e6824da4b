"""Small BERT models with random weights, the same for the golden logits, the unit tests and the parity tests."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize


class Small(NamedTuple):
    """Sizes of a model and of the batch that is put through it."""

    config: BertConfig
    num_labels: int
    lengths: tuple[int, ...]  # real tokens of each text; the longest is t
    seed: int


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


def build(small: Small, *, pooling: str = "cls", **options: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Apply and parameters; weights large enough that attention is far from even."""

    def module() -> BertClassifier:
        return BertClassifier(small.config, num_labels=small.num_labels, pooling=pooling, rngs=nnx.Rngs(0), **options)

    apply, params = functionalize(nnx.eval_shape(module))
    rng = np.random.default_rng(small.seed)
    values = {}
    for path in sorted(params):
        noise = rng.normal(size=params[path].shape)
        values[path] = jnp.asarray(1 + 0.2 * noise if path.endswith("scale") else 0.3 * noise, jnp.float32)
    return apply, values


def batch_of(small: Small) -> dict[str, jax.Array]:
    """A padded batch with labels; padding is token 0, which no text holds."""
    rng = np.random.default_rng(100 + small.seed)
    shape = len(small.lengths), max(small.lengths)
    mask = np.arange(shape[1])[None] < np.array(small.lengths)[:, None]
    ids = rng.integers(1, small.config.vocab_size, shape) * mask
    types = rng.integers(0, small.config.type_vocab_size, shape) * mask
    regression = small.num_labels == 1
    labels = rng.normal(size=shape[0]) if regression else rng.integers(0, small.num_labels, shape[0])
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "token_type_ids": jnp.asarray(types, jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
        "labels": jnp.asarray(labels, jnp.float32 if regression else jnp.int32),
    }


TEXTS = [
    ("The keys to the old cabinet are on the table.", None),
    ("The keys to the old cabinet is on the table.", None),
    ("A man is playing a guitar.", "Someone makes music on a stringed instrument, slowly and with great care."),
    ("Naïve café façades — 東京!", "unbelievable"),
]


def minilm_head(num_labels: int, width: int) -> dict[str, jax.Array]:
    """A head by formula, so that golden logits of a checkpoint without one can be stored."""
    i, j = np.meshgrid(np.arange(width), np.arange(num_labels), indexing="ij")
    kernel = np.cos(0.7 * i + 1.3 * j).astype(np.float32)
    return {"classifier.kernel": jnp.asarray(kernel), "classifier.bias": jnp.arange(num_labels, dtype=jnp.float32)}


def minilm_batch(tokenizer: Any) -> dict[str, jax.Array]:
    """The four texts, two of them pairs, padded to the longest."""
    first, second = zip(*TEXTS, strict=True)
    rows = [tokenizer(a, b) if b else tokenizer(a) for a, b in zip(first, second, strict=True)]
    length = max(len(row["input_ids"]) for row in rows)
    names = ("input_ids", "token_type_ids", "attention_mask")
    padded = {name: [row[name] + [0] * (length - len(row[name])) for row in rows] for name in names}
    return {name: jnp.asarray(value, jnp.int32) for name, value in padded.items()}


def loss_of(apply: Any, batch: dict[str, jax.Array], **options: Any) -> Any:
    """Mean loss of the batch as a function of the parameters: cross entropy, or squared error for one output."""

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        logits = apply(params, batch, **options)
        if logits.shape[1] == 1:
            return jnp.mean((logits[:, 0] - batch["labels"]) ** 2)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][:, None], axis=1))

    return loss
