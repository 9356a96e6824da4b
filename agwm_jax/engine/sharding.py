"""Meshes of devices, and where on one every array of a run lies."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from agwm_jax.errors import AgwmError
from agwm_jax.models.weights import Weights

SEED, DATA, MODEL = AXES = ("seed", "data", "model")
"""Axes of every mesh: independent runs, examples of a batch, and the parts of a kernel."""

_SHARD = "shard"
RULES: dict[str, str] = {
    # Column by column, then row by row (Megatron-LM, arXiv 1909.08053): the two products of attention, and of the
    # feed-forward part, need one sum over `model` in the forward pass and one in the backward pass.
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    # By width and not by word: a vocabulary has any number of words, and a lookup then stays where it is.
    "width": _SHARD,
}
"""The mesh axis of a weight's logical axis; ``shard``: `data` where weights are fully sharded. Axes without a rule
(layers, vocabulary, vectors, classes) are not cut."""

Shapes = Mapping[str, tuple[int, ...]]
"""Of every weight by path."""


class Placement(NamedTuple):
    """A mesh, and how weights lie on it."""

    mesh: Mesh
    fully_sharded: bool = False
    """Cut weights and optimiser states over `data` too; gathered layer by layer, where they are used."""

    @property
    def replicated(self) -> NamedSharding:
        """On every device whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of_weight(self, axes: Sequence[str], shape: Sequence[int]) -> tuple[str | None, ...]:
        """The mesh axis that each axis of a weight is cut along, no mesh axis twice."""
        found: list[str | None] = []
        for name, size in zip(axes, shape, strict=True):
            axis = RULES.get(name)
            if axis == _SHARD:
                axis = DATA if self.fully_sharded else None
            # What a mesh axis does not divide stays whole. `check_model` sees to `model`.
            fits = axis is not None and axis not in found and size % self.mesh.shape[axis] == 0
            found.append(axis if fits else None)
        return tuple(found)

    def of_tree(self, tree, weights: Weights, shapes: Shapes, lanes=False):
        """A sharding for every leaf of a training state, of weights, of gates or of what an optimiser makes of them.

        A leaf belongs to the weight whose path is the innermost dictionary key on the way to it, and is cut where it
        has that weight's axes: of the factors ``[*l, d_in, r]`` and ``[*l, r, d_out]`` all but the rank, of several
        such weights ``[k, ...]`` each. What belongs to no weight (counts, schedules) lies whole on every device.

        Args:
            tree: arrays, or their shapes.
            weights: of the model.
            shapes: of the model's weights, without an axis of lanes.
            lanes: whether leaves have a leading axis of lanes, cut along `seed`: one bool, or a tree of them.
        """
        lanes = jax.tree.map(lambda _: lanes, tree) if isinstance(lanes, bool) else lanes

        def sharding(path, leaf, lane: bool) -> NamedSharding:
            own = leaf.shape[1:] if lane else leaf.shape
            spec = self._of_leaf(path, own, weights, shapes)
            return NamedSharding(self.mesh, PartitionSpec(*((SEED,) if lane else ()), *spec))

        return jax.tree_util.tree_map_with_path(sharding, tree, lanes)

    def _of_leaf(self, path, own: Sequence[int], weights: Weights, shapes: Shapes) -> tuple[str | None, ...]:
        keys = [entry.key for entry in path if isinstance(entry, DictKey) and entry.key in weights]
        whole = (None,) * len(own)
        if not keys or len(shape := shapes[keys[-1]]) > len(own):
            return whole
        spec, before = self.of_weight(weights[keys[-1]].axes, shape), len(own) - len(shape)
        cut = (axis if size == like else None for axis, size, like in zip(spec, own[before:], shape, strict=True))
        return (*whole[:before], *cut)

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


def check_model(placement: Placement, weights: Weights, shapes: Shapes, *, batch_size: int) -> None:
    """Refuse a model or a batch that the mesh does not divide.

    Raises:
        AgwmError: an axis of a weight that `model` cuts, or the batch size and `data`.
    """
    model, data = placement.mesh.shape[MODEL], placement.mesh.shape[DATA]
    cut = {
        (name, size): path
        for path, weight in weights.items()
        for name, size in zip(weight.axes, shapes[path], strict=True)
        if RULES.get(name) == MODEL
    }
    for (name, size), path in cut.items():
        if size % model:
            most = int(np.gcd.reduce([n for _, n in cut]))
            raise AgwmError(
                f"mesh.model {model} does not divide the model's axis {name} ({size} in {path}): choose one of "
                f"{', '.join(str(n) for n in range(1, min(most, 64) + 1) if not most % n)}."
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
        host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
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
