"""Members that run side by side: what they share lies on the devices once, and what no function reads does not."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Key

from agwm_jax.engine import needs
from agwm_jax.engine.batches import stream
from agwm_jax.engine.needs import INITIAL, PRETRAINED, Needs, fill, find_needs, stages_as_run
from agwm_jax.engine.sharding import SEED, Placement, place
from agwm_jax.methods.interface import Method, Variables
from agwm_jax.models.weights import Weights

Held = dict[needs.Key, Array]
"""What lies on the devices: ``[members, ...]``, or one array for all where it is shared."""


class Member(NamedTuple):
    """The run of one seed, as it lies on the host."""

    seed: int
    method: Method
    """Those of one group are alike but for their plans: the functions of the first serve all."""
    pretrained: Mapping[str, Any]
    """By path; the very same array in several members where they share it."""
    data: dict[str, np.ndarray]
    """Columns of its training set."""
    key: Key[Array, ""]


class Layout(NamedTuple):
    """How the members of a group lie on the devices, and what goes side by side."""

    placement: Placement
    together: bool = False
    """All phases of a stage at once, not one after the other."""


class Group:
    """Shapes and places of all that a group of members holds; nothing lies on the devices yet.

    Args:
        members: one or more.
        layout: see `Layout`.
        weights: of the model.
        known: what the method needs, where it has been traced for this layout before.
    """

    def __init__(self, members: Sequence[Member], layout: Layout, weights: Weights, known: Needs | None = None):
        """Trace the method, if it was not."""
        first = members[0]
        self.members, self.placement, self.weights = members, layout.placement, weights
        self.weight_shapes = {path: tuple(x.shape) for path, x in first.pretrained.items()}
        self.stages = stages_as_run(first.method, together=layout.together)
        self.needs = known or find_needs(first.method, first.pretrained, first.data, self.stages)
        shared = [
            path for path, x in first.pretrained.items() if all(member.pretrained[path] is x for member in members)
        ]
        self.shared = frozenset(f"{PRETRAINED}/{path}" for path in shared)
        self.arrays = self._arrays()
        self.first_rows = self._first_rows()

    def _arrays(self) -> dict[needs.Key, jax.ShapeDtypeStruct]:
        found: dict[needs.Key, jax.ShapeDtypeStruct] = {}
        sources = {path: f"{PRETRAINED}/{path}" for path in self.weight_shapes}
        for keys in (sources, self.needs.initial, *(stage.learnt for stage in self.needs.stages)):
            shapes = jax.tree.map(self._shape, keys)
            own = jax.tree.map(lambda key: key not in self.shared, keys)
            placed = self.abstract(shapes, lanes=own)
            found = {**dict(zip(jax.tree.leaves(keys), jax.tree.leaves(placed), strict=True)), **found}
        return found

    def _shape(self, key: needs.Key) -> jax.ShapeDtypeStruct:
        one = self.needs.shapes[key]
        return one if key in self.shared else jax.ShapeDtypeStruct((len(self.members), *one.shape), one.dtype)

    def abstract(self, tree, *, lanes: Any = True):
        """The shapes of a tree with the places of its leaves; see `Placement.of_tree`."""
        where = self.placement.of_tree(tree, self.weights, self.weight_shapes, lanes)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)

    def _first_rows(self) -> tuple[int, ...]:
        """Row of each member's first example in `columns`."""
        first = self.members[0].data
        if all(member.data[name] is column for member in self.members for name, column in first.items()):
            return (0,) * len(self.members)
        lengths = [len(next(iter(member.data.values()))) for member in self.members]
        return tuple(np.cumsum([0, *lengths[:-1]]).tolist())

    @property
    def data(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the training sets of all members, one below the other where they differ."""
        last = self.members[-1].data
        return {
            name: jax.ShapeDtypeStruct(
                (self.first_rows[-1] + len(x), *x.shape[1:]),
                jax.dtypes.canonicalize_dtype(x.dtype),
                sharding=self.placement.replicated,
            )
            for name, x in last.items()
        }

    def place_data(self) -> dict[str, Array]:
        """The training sets on the devices."""
        first = self.members[0].data
        if any(self.first_rows):
            first = {name: np.concatenate([member.data[name] for member in self.members]) for name in first}
        return place(first, jax.tree.map(lambda _: self.placement.replicated, first))

    def place(self, wanted: Collection[needs.Key]) -> Held:
        """Pretrained and initial arrays of these keys on the devices; others are left out."""
        pretrained = {key for key in wanted if key.startswith(f"{PRETRAINED}/")}
        drawn = sorted(key for key in wanted if key.startswith(f"{INITIAL}/"))
        paths = {f"{PRETRAINED}/{path}": path for path in self.weight_shapes}
        held = {}
        for key in sorted(pretrained | (self.needs.init if drawn else set())):
            each = [np.asarray(member.pretrained[paths[key]]) for member in self.members]
            held[key] = place(each[0] if key in self.shared else np.stack(each), self.arrays[key].sharding)
        if drawn:
            held |= self._draw(drawn, {key: held[key] for key in self.needs.init})
        return {key: x for key, x in held.items() if key in wanted}

    def _draw(self, drawn: Sequence[needs.Key], held: Held) -> Held:
        """`Method.init` of all members; what it computes."""
        sources = {path: f"{PRETRAINED}/{path}" for path in self.weight_shapes}

        def one(held: Held, key) -> Held:
            pretrained = fill(sources, self.needs.shapes, held)
            initial = self.members[0].method.init(pretrained, jax.random.wrap_key_data(key))
            return pick(initial, self.needs.initial, drawn)

        init = each_lane(one, (self.axes(held), 0), len(self.members))
        where = {key: self.arrays[key].sharding for key in drawn}
        return jax.jit(init, out_shardings=where)(held, self.place_keys([stream(m.key, "init") for m in self.members]))

    def axes(self, keys: Collection[needs.Key]) -> dict[needs.Key, int | None]:
        """As `jax.vmap` takes them."""
        return {key: None if key in self.shared else 0 for key in keys}

    def place_keys(self, keys: Sequence[Key[Array, ""]]) -> Array:
        """Random keys on the devices, as numbers ``[lanes, ...]``."""
        numbers = np.stack([np.asarray(jax.random.key_data(key)) for key in keys])
        return place(numbers, NamedSharding(self.placement.mesh, PartitionSpec(SEED)))

    def of_members(self, held: Held) -> list[Variables]:
        """What each member has learnt in the end."""
        learnt = self.needs.learnt
        shapes = jax.tree.map(lambda key: self.needs.shapes[key], learnt)
        where = self.placement.of_tree(shapes, self.weights, self.weight_shapes)
        places = dict(zip(jax.tree.leaves(learnt), jax.tree.leaves(where), strict=True))
        own = {key: held[key] for key in places if key not in self.shared}
        of_one = jax.jit(
            lambda own, member: {key: x[member] for key, x in own.items()},
            out_shardings={key: places[key] for key in own},
        )
        each = [{**held, **of_one(own, member)} for member in range(len(self.members))]
        return [jax.tree.map(lambda key, found=found: found[key], learnt) for found in each]


def pick(tree, keys, wanted: Collection[needs.Key]) -> dict[needs.Key, Any]:
    """The leaves of a tree whose keys are wanted; `keys` has the tree's structure."""
    leaves = dict(zip(jax.tree.leaves(keys), jax.tree.leaves(tree), strict=True))
    return {key: leaves[key] for key in wanted}


def each_lane(fn: Callable[..., Any], axes: tuple[Any, ...], count: int) -> Callable[..., Any]:
    """`fn` mapped over lanes; `axes` as `jax.vmap` takes them, all of them may be None."""

    def with_lane(lane, *args):
        del lane
        return fn(*args)

    mapped = jax.vmap(with_lane, in_axes=(0, *axes), spmd_axis_name=SEED)
    return lambda *args: mapped(jnp.arange(count), *args)
