"""Meshes of devices, and where on one every array of a run lies."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey

from agwm_jax.errors import AgwmError

SEED, DATA, MODEL = AXES = ("seed", "data", "model")
"""Axes of every mesh: independent runs, examples of a batch, and the parts of a kernel."""

_WHOLE, _SHARD = None, "shard"
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Column by column, then row by row (Megatron-LM, arXiv 1909.08053): the two products of attention, and of the
    # feed-forward part, need one sum over `model` in the forward pass and one in the backward pass.
    (r".*\.layers\.(query|key|value|intermediate)\.kernel", (_WHOLE, _SHARD, MODEL)),
    (r".*\.layers\.(query|key|value|intermediate)\.bias", (_WHOLE, MODEL)),
    (r".*\.layers\.(attention_output|output)\.kernel", (_WHOLE, MODEL, _SHARD)),
    (r"pooler\.kernel", (_SHARD, _WHOLE)),
    # By width and not by word: a vocabulary has any number of words, and a lookup then stays where it is.
    (r"embeddings\.\w+\.embedding", (_WHOLE, _SHARD)),
)
"""Where the axes of a weight lie, first match first; ``shard``: over `data` where weights are fully sharded. A weight
without a rule (other biases, layer norms, the head) lies on every device whole."""


class Placement(NamedTuple):
    """A mesh, and how weights lie on it."""

    mesh: Mesh
    fully_sharded: bool = False
    """Cut weights and optimiser states over `data` too; gathered layer by layer, where they are used."""

    @property
    def replicated(self) -> NamedSharding:
        """On every device whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of_weight(self, path: str, shape: Sequence[int]) -> tuple[str | None, ...]:
        """The mesh axis that each axis of a weight is cut along."""
        for pattern, rule in RULES:
            if re.fullmatch(pattern, path) and len(rule) == len(shape):
                return tuple(self._axis(name, size) for name, size in zip(rule, shape, strict=True))
        return (None,) * len(shape)

    def _axis(self, name: str | None, size: int) -> str | None:
        # Cutting over `data` only saves memory: what it does not divide stays whole. `check_model` sees to `model`.
        axis = (DATA if self.fully_sharded else None) if name == _SHARD else name
        return axis if axis is not None and size % self.mesh.shape[axis] == 0 else None

    def of_tree(self, tree, weights: Mapping[str, Sequence[int]], lanes=False):
        """A sharding for every leaf of a training state, of weights, of gates or of what an optimiser makes of them.

        A leaf belongs to the weight whose path is the innermost dictionary key on the way to it; the factors of a gate
        lie as the axes of their kernel do; what belongs to no weight (counts, schedules) lies whole on every device.

        Args:
            tree: arrays, or their shapes.
            weights: shape of every weight by path, without an axis of lanes.
            lanes: whether leaves have a leading axis of runs, cut along `seed`: one bool, or a tree of them.
        """
        lanes = jax.tree.map(lambda _: lanes, tree) if isinstance(lanes, bool) else lanes

        def sharding(path, leaf, lane: bool) -> NamedSharding:
            own = leaf.shape[1:] if lane else leaf.shape
            spec = self._of_leaf(path, own, weights)
            return NamedSharding(self.mesh, PartitionSpec(*((SEED,) if lane else ()), *spec))

        return jax.tree_util.tree_map_with_path(sharding, tree, lanes)

    def _of_leaf(self, path, shape: Sequence[int], weights: Mapping[str, Sequence[int]]) -> tuple[str | None, ...]:
        keys = [entry.key for entry in path if isinstance(entry, DictKey) and entry.key in weights]
        if not keys:
            return (None,) * len(shape)
        spec = self.of_weight(keys[-1], weights[keys[-1]])
        factor = path[-1].name if isinstance(path[-1], GetAttrKey) else ""
        if factor == "left":
            spec = (*spec[:-1], None)
        elif factor == "right":
            spec = (*spec[:-2], None, spec[-1])
        return spec if len(spec) == len(shape) else (None,) * len(shape)

    def of_rows(self, ndim: int) -> NamedSharding:
        """Rows of batches ``[lanes, steps, ..., b]``: every device reads the examples of its own part of a batch."""
        return NamedSharding(self.mesh, PartitionSpec(SEED, *[None] * (ndim - 2), DATA))

    def of_batch(self, shape: Sequence[int]) -> NamedSharding:
        """One batch ``[b, ...]``: cut over `data` where that divides it."""
        divides = shape[0] % self.mesh.shape[DATA] == 0
        return NamedSharding(self.mesh, PartitionSpec(DATA if divides else None))

    def describe(self) -> str:
        """Such as ``data 4 x model 2, fully sharded``; empty for one device."""
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        return axes + (", fully sharded" if axes and self.fully_sharded else "")


def make_placement(*, seed: int, data: int | str, model: int, fully_sharded: bool) -> Placement:
    """The mesh ``seed x data x model`` over the devices of all processes; `data` may be ``"all"``: those that are left.

    Raises:
        AgwmError: more devices than there are, a number that does not divide them, or processes without a device.
    """
    devices = jax.devices()
    if data == "all":
        data, rest = divmod(len(devices), seed * model)
        if rest or not data:
            raise AgwmError(
                f"mesh: seed {seed} x model {model} does not divide the {_devices(len(devices))} here; choose numbers "
                f"whose product divides {len(devices)}."
            )
    shape = (seed, int(data), model)
    wanted = int(np.prod(shape))
    named = f"mesh: seed {seed} x data {data} x model {model}"
    if wanted > len(devices):
        raise AgwmError(
            f"{named} needs {_devices(wanted)}, {len(devices)} here: lower one, or say mesh.data all; on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted} makes as many out of one."
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise AgwmError(
            f"{named} takes {_devices(wanted)} of the {len(devices)} of {jax.process_count()} processes: a run over "
            "several processes takes all; say mesh.data all."
        )
    return Placement(Mesh(np.array(devices[:wanted]).reshape(shape), AXES), fully_sharded)


def _devices(number: int) -> str:
    return f"{number} device" + ("" if number == 1 else "s")


def check_model(placement: Placement, *, num_heads: int, intermediate_size: int, batch_size: int) -> None:
    """Refuse a model or a batch that the mesh does not divide.

    Raises:
        AgwmError: heads or feed-forward width and `model`, or batch size and `data`.
    """
    model, data = placement.mesh.shape[MODEL], placement.mesh.shape[DATA]
    for what, size in (("attention heads", num_heads), ("units of the feed-forward part", intermediate_size)):
        if size % model:
            raise AgwmError(
                f"mesh.model {model} does not divide the model's {size} {what}: choose one of "
                f"{', '.join(str(n) for n in range(1, size + 1) if not num_heads % n and not intermediate_size % n)}."
            )
    if batch_size % data:
        raise AgwmError(
            f"mesh.data {data} does not divide data.batch_size {batch_size}: choose a batch of "
            f"{-(-batch_size // data) * data}, or a mesh.data that divides {batch_size}."
        )


def place(tree, shardings):
    """Arrays of the host on the devices; a process hands over only what its own devices hold.

    Every process must give the same values.
    """

    def one(x, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree, shardings)


def gather_to_main(tree, placement: Placement):
    """The arrays on the host: in the main process whole, in the others nothing (None); all must call it."""

    whole = jax.jit(lambda x: x, out_shardings=placement.replicated)

    def one(x: jax.Array) -> np.ndarray | None:
        if not x.is_fully_addressable:  # leaf by leaf: not all weights are on a device whole at once
            x = whole(x)
        return np.asarray(x) if jax.process_index() == 0 else None

    gathered = jax.tree.map(one, tree)
    return gathered if jax.process_index() == 0 else None


def bytes_per_device(tree, shardings: Any | None = None) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with their shardings."""
    shardings = jax.tree.map(lambda x: x.sharding, tree) if shardings is None else shardings
    sizes = jax.tree.map(
        lambda x, sharding: int(np.prod(sharding.shard_shape(x.shape))) * np.dtype(x.dtype).itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
