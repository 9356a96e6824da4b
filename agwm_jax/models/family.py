"""What a model family is: its configuration, its module, and one row a weight; a file of its own registers each."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from agwm_jax.errors import AgwmError
from agwm_jax.models.functional import functionalize
from agwm_jax.models.model import Model, Shapes
from agwm_jax.models.weights import CLASSES, LAYERS, Role, Weight, Weights, of_role
from agwm_jax.registry import Registry

Remat = Literal["none", "dots", "full"]


class Options(NamedTuple):
    """How a model computes what it computes; none of these changes the function."""

    dtype: DTypeLike = jnp.float32
    """Of the computation. Weights, softmax, pooling and head are float32, or float64 where this is."""
    unroll: int | None = None
    """Layers in one turn of the scan; None: all of a small encoder, one of a larger."""
    fuse_attention: bool = True
    """Run cuDNN's fused attention in calls that promise `reverse_only`, unless `fused_refusal` has a reason not to."""
    remat: Remat = "none"
    """What the backward pass computes again: nothing, all but products with weights, or whole layers."""

    @property
    def wide(self) -> Any:
        """The dtype of weights, softmax, pooling and head."""
        return jnp.promote_types(self.dtype, jnp.float32)


class Transform(NamedTuple):
    """How one layer's weight lies in the file: `read` gives ours from the file's tensor, `write` is its inverse."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


KEEP = Transform(lambda x: x, lambda x: x)
TRANSPOSE = Transform(np.transpose, np.transpose)
"""Of kernels: PyTorch keeps a dense layer's as ``[d_out, d_in]``."""


class Row(NamedTuple):
    """One weight: what it is and where it lies in a safetensors file."""

    weight: Weight
    name: str
    """In the file, without the family's prefix; ``{}`` stands for the layer number of a stacked weight."""
    transform: Transform = KEEP
    part: tuple[int, int] = (0, 1)
    """(i, n): it is the i-th of n equal parts of the file's tensor along its first axis."""
    first_layer: int = 0
    """The first layer that has it in the file; what earlier layers have of it does nothing."""
    prefixed: bool = True
    """Whether the family's prefix stands before its name (never before those of the head)."""


Table = Mapping[str, Row]
"""Every weight that a family may have, by path. Partitioning metadata stand here rather than in NNX's variables: one
row then says all of a weight, and Flax's own annotations have no role, depth or name in the file."""


class Family(NamedTuple):
    """Models of one layout. `module(config, num_labels=, pooling=, options=, rngs=)` makes an `nnx.Module` with

    - ``embed(batch) -> [b, t, d]``,
    - ``features(embedded, batch, *, key, reverse_only) -> [b, d]``,
    - ``logits(features, *, key) -> [b, c]``,

    as `Model` describes them; every path of its parameters is in the table.
    """

    model_types: Mapping[str, str]
    """Values of config.json's ``model_type`` -> what the names of transformers' classes start with."""
    read_config: Callable[[Mapping[str, Any]], Any]
    """The configuration out of config.json's values; refuses all faults in one `AgwmError`. The library reads its
    `initializer_range` (standard deviation of fresh weights), `max_length` (longest text in tokens), `with_dropout`
    (the same with all rates set; None changes nothing), `with_attention_dropout` where that is asked for, and `to_dict`
    (as config.json has it)."""
    module: Callable[..., nnx.Module]
    table: Callable[[Any], Table]
    """Of a configuration."""
    prefix: str = ""
    """Before the names of all weights but the head's in a saved classifier; bare encoders lack it."""
    ignored: str = r"(?!)"
    """Pattern of names in the file that hold no weight of this model: buffers, heads of other tasks."""
    renames: Mapping[str, str] = {}
    """Endings of names from older checkpoints -> today's."""
    tokenizer_files: tuple[str, ...] = ("tokenizer.json",)
    """At least one of them lies in a folder with a tokenizer."""
    poolings: tuple[str, ...] = ("cls", "mean")
    """What may become of the tokens' vectors; the first is what transformers' classifier does."""
    pooling_key: str = ""
    """The key of config.json that chooses among them, where transformers' classifier knows them all."""


FAMILIES: Registry[Callable[[], Family]] = Registry("model family", "families", "agwm_jax.models")


def model_type_of(values: Mapping[str, Any]) -> Any:
    """`model_type` of config.json; of a file from before there was one, what its `architectures` begin with."""
    if "model_type" in values:
        return values["model_type"]
    stems = {stem: kind for entry in FAMILIES.entries() for kind, stem in entry.value().model_types.items()}
    named = [str(name) for name in values.get("architectures") or ()]
    found = [stem for stem in stems if any(name.startswith(stem) for name in named)]
    return stems[max(found, key=len)] if found else None


def family_of(model_type: Any, where: Any) -> Family:
    """The family that serves a `model_type` of config.json.

    Raises:
        AgwmError: none does; all that are served are listed, the nearest first.
    """
    families = [entry.value() for entry in FAMILIES.entries()]
    for family in families:
        if model_type in family.model_types:
            return family
    served = sorted(name for family in families for name in family.model_types)
    near = difflib.get_close_matches(str(model_type), served, n=1)
    meant = f" (is it {near[0]}?)" if near else ""
    raise AgwmError(
        f"{where} has model_type {model_type!r}{meant}; supported are {', '.join(served)}. Code that comes with a "
        "checkpoint is not run."
    )


def build_model(
    family: Family, config: Any, *, num_labels: int, pooling: str | None = None, options: Options | None = None
) -> tuple[Model, Shapes]:
    """A model without its weights, and their shapes; nothing is computed.

    Args:
        family: such as ``FAMILIES["bert"].value()``.
        config: of that family.
        num_labels: size of the head, c.
        pooling: one of the family's, "cls" (what it makes of the first token) or "mean" (mean over real tokens) as a
            rule; None: the first of them.
        options: how it computes.

    Raises:
        AgwmError: the family does not know the pooling, or float64 is asked for in JAX's 32-bit mode.
    """
    options = Options() if options is None else options
    pooling = family.poolings[0] if pooling is None else pooling
    if pooling not in family.poolings:
        raise AgwmError(f"pooling is {pooling!r}, expected {' or '.join(map(repr, family.poolings))}.")
    if jnp.dtype(options.dtype) != jax.dtypes.canonicalize_dtype(options.dtype):
        raise AgwmError('dtype float64 needs JAX\'s 64-bit mode: jax.config.update("jax_enable_x64", True).')
    module = nnx.eval_shape(
        lambda: family.module(config, num_labels=num_labels, pooling=pooling, options=options, rngs=nnx.Rngs(0))
    )
    table = family.table(config)
    _, shapes = functionalize(module)
    weights = {path: table[path].weight for path in table if path in shapes}
    if weights.keys() != shapes.keys():
        raise AgwmError(f"The family's table lacks {', '.join(sorted(shapes.keys() - weights.keys()))}.")
    scanned = tuple(path for path, weight in weights.items() if weight.is_stacked)
    embed, features, logits = (functionalize(module, name, scanned)[0] for name in ("embed", "features", "logits"))
    num_heads = getattr(config, "num_attention_heads", None)
    return Model(embed, features, logits, weights, num_heads), {path: shapes[path] for path in weights}


def fresh_params(
    weights: Weights, shapes: Mapping[str, Any], *, seed: int, scale: float, paths: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Weights as they are before any training: N(0, scale), biases 0, scales of norms 1.

    By NumPy, so that they are the same bits on every device and version of XLA.

    Args:
        weights: of the model.
        shapes: arrays, or their shapes, by path.
        seed: of the random numbers.
        scale: `initializer_range`.
        paths: of these alone; None: all.
    """
    rng = np.random.default_rng(seed)

    def one(path: str) -> np.ndarray:
        shape, dtype = shapes[path].shape, shapes[path].dtype
        if weights[path].role == "norm":
            return np.full(shape, 1 if path.endswith("scale") else 0, dtype)
        return rng.normal(0, scale, shape).astype(dtype) if weights[path].is_matrix else np.zeros(shape, dtype)

    return {path: one(path) for path in (weights if paths is None else paths)}


def head_paths(weights: Weights) -> tuple[str, ...]:
    """Of the classifier, from its input to its output."""
    return of_role(weights, "head")


def output_paths(weights: Weights) -> tuple[str, ...]:
    """Of the last layer of the classifier, whose last axis counts classes."""
    return tuple(path for path, weight in weights.items() if weight.axes[-1] == CLASSES)


def dense_rows(
    path: str,
    name: str,
    axes: tuple[str, str],
    *,
    depth: int | None = None,
    role: Role = "kernel",
    bias: bool = True,
) -> dict[str, Row]:
    """The rows of a dense layer, stacked over layers where `depth` is None; one alone where it has no bias."""
    stack = (LAYERS,) if depth is None else ()
    rows = {f"{path}.kernel": Row(Weight(role, (*stack, *axes), depth), f"{name}.weight", TRANSPOSE)}
    if bias:
        axis = "vector" if axes[1] == "width" else axes[1]
        bias_role: Role = "head" if role == "head" else "bias"
        rows[f"{path}.bias"] = Row(Weight(bias_role, (*stack, axis), depth), f"{name}.bias")
    return rows


def scale_row(path: str, name: str, *, depth: int | None = None, axis: str = "vector") -> dict[str, Row]:
    """The row of a norm without a bias, stacked over layers where `depth` is None."""
    axes = (LAYERS, axis) if depth is None else (axis,)
    return {f"{path}.scale": Row(Weight("norm", axes, depth), f"{name}.weight")}


def check_length(length: int, limit: int) -> None:
    """Refuse texts beyond the model's positions.

    Raises:
        AgwmError: they are longer than `limit`.
    """
    if length > limit:
        raise AgwmError(
            f"The texts are {length} tokens long but the model's position table ends at {limit}; set max_length to "
            f"{limit} or less."
        )


def norm_rows(path: str, name: str, *, depth: int | None = None, axis: str = "vector") -> dict[str, Row]:
    """The two rows of a layer norm, stacked over layers where `depth` is None."""
    axes = (LAYERS, axis) if depth is None else (axis,)
    return {
        **scale_row(path, name, depth=depth, axis=axis),
        f"{path}.bias": Row(Weight("norm", axes, depth), f"{name}.bias"),
    }
