"""Runs side by side: what several seeds share lies on the devices once, and one program takes a step of all."""

import functools
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from agwm_jax.core.types import Params
from agwm_jax.engine.batches import gather
from agwm_jax.engine.sharding import SEED, Placement, place
from agwm_jax.methods.interface import Method, Phase, Weights

Shapes = dict[str, tuple[int, ...]]


class Member(NamedTuple):
    """One seed of a run, as it lies on the host."""

    seed: int
    method: Method
    frozen: Params
    initial: Weights
    data: dict[str, np.ndarray]
    """Columns of its training set."""
    key: Array


class Stacked(NamedTuple):
    """One tree for several lanes: leaves that all share as they are, the others with a leading axis of lanes."""

    tree: Any
    lanes: Any
    """True where a leaf has that axis."""

    @property
    def axes(self) -> Any:
        """As `jax.vmap` takes them."""
        return jax.tree.map(lambda lane: 0 if lane else None, self.lanes)


def stack(trees: Sequence[Any]) -> Stacked:
    """Trees of one structure, one a lane; a leaf is shared where it is the same array in all of them."""
    lanes = jax.tree.map(lambda *xs: any(x is not xs[0] for x in xs), *trees)

    def one(lane: bool, *xs):
        return np.stack([np.asarray(x) for x in xs]) if lane else xs[0]

    return Stacked(jax.tree.map(one, lanes, *trees), lanes)


def own_axis(tree) -> Stacked:
    """A tree whose leaves all have the axis of lanes."""
    return Stacked(tree, jax.tree.map(lambda _: True, tree))


class Table(NamedTuple):
    """The training sets of all members, one below the other where they differ."""

    columns: dict[str, np.ndarray]
    first: tuple[int, ...]
    """Row of each member's first example."""


def table(members: Sequence[Member]) -> Table:
    """The table that the rows of plans refer to, once they are moved by `first`."""
    columns = members[0].data
    if all(member.data[name] is column for member in members for name, column in columns.items()):
        return Table(columns, (0,) * len(members))
    lengths = [len(member.data["labels"]) for member in members]
    joined = {name: np.concatenate([member.data[name] for member in members]) for name in columns}
    return Table(joined, tuple(np.cumsum([0, *lengths[:-1]]).tolist()))


class Round(NamedTuple):
    """Phases of one stage that run at once, for all members; their lane is ``member * len(phases) + phase``."""

    numbers: tuple[int, ...]
    """Places of the phases in the method."""
    phases: tuple[Phase, ...]
    """Of the first member, whose functions serve all; only plans differ."""

    @property
    def num_steps(self) -> int:
        """Steps of each of its phases."""
        return self.phases[0].num_steps

    @property
    def name(self) -> str:
        """Such as ``finetune`` or ``search-0..4``."""
        first, last = self.phases[0].name, self.phases[-1].name
        return first if len(self.phases) == 1 else f"{first}..{last.rsplit('-')[-1]}"


def rounds(method: Method, *, together: bool) -> tuple[Round, ...]:
    """A method's phases in the order that they run; with `together` those of a stage at once."""
    found: list[Round] = []
    number = 0
    for stage in method.stages:
        numbered = tuple(zip(range(number, number + len(stage)), stage, strict=True))
        for group in [numbered] if together else [(one,) for one in numbered]:
            found.append(Round(tuple(n for n, _ in group), tuple(phase for _, phase in group)))
        number += len(stage)
    return tuple(found)


def _plans(members: Sequence[Member], round_: Round, first: Sequence[int]) -> dict[str, Int[np.ndarray, "lanes _ ..."]]:
    """Rows of the table for every lane and step."""

    def moved(rows, by: int) -> np.ndarray:
        rows = np.asarray(rows)
        return np.where(rows >= 0, rows + by, rows).astype(np.int32)

    def stacked(name: str) -> np.ndarray:
        numbered = [(m.method.phases[n].plan[name], by) for m, by in zip(members, first, strict=True) for n in numbers]
        return np.stack([moved(rows, by) for rows, by in numbered])

    numbers = round_.numbers
    return {name: stacked(name) for name in round_.phases[0].plan}


class Group(NamedTuple):
    """All members on the devices, with what no round changes."""

    members: Sequence[Member]
    placement: Placement
    weights: Shapes
    frozen: Stacked
    initial: Stacked
    data: dict[str, Array]
    first: tuple[int, ...]
    """See `Table`."""


def on_devices(members: Sequence[Member], placement: Placement) -> Group:
    """Weights and training sets of all members, placed once."""
    example = members[0]
    weights = {path: x.shape for path, x in (*example.frozen.items(), *example.initial.task.items())}

    def put(stacked: Stacked) -> Stacked:
        shardings = placement.of_tree(stacked.tree, weights, stacked.lanes)
        return stacked._replace(tree=place(stacked.tree, shardings))

    rows = table(members)
    return Group(
        members,
        placement,
        weights,
        put(stack([member.frozen for member in members])),
        put(stack([member.initial for member in members])),
        place(rows.columns, jax.tree.map(lambda _: placement.replicated, rows.columns)),
        rows.first,
    )


class Program(NamedTuple):
    """A round's compiled functions and what compiling cost."""

    advance: Callable[..., tuple[Any, dict[str, Array]]]
    """``advance(state, frozen, data, plan, keys, start, stop) -> (state, infos [chunk_steps, lanes])``."""
    monitor: Callable[[Any], dict[str, Array]]
    finite: Callable[[Any], Array]
    """``finite(state) -> [lanes]``: whether all numbers of each lane are."""
    seconds: float


class Lanes:
    """The lanes of one round: a member's phases, side by side with those of the others.

    Args:
        group: the members.
        round_: the phases.
        carry: what each member has learnt so far, leaves ``[members, ...]``, or their shapes; None: nothing.
    """

    def __init__(self, group: Group, round_: Round, carry: Weights | None):
        """Lay out the lanes; nothing is computed yet."""
        self.round, self._group, self._phase = round_, group, round_.phases[0]
        self._per_member = len(round_.phases)
        self._count = len(group.members) * self._per_member
        self._carry = group.initial if carry is None else own_axis(carry)
        self.state_shape = jax.eval_shape(self._start, group.frozen.tree, group.initial.tree, self._carry.tree)

    def member_and_phase(self, lane: int) -> tuple[int, Phase, int]:
        """Whose lane it is, the phase that runs in it, and the place of the phase in the method."""
        member, number = divmod(lane, self._per_member)
        return member, self.round.phases[number], self.round.numbers[number]

    def start(self) -> Any:
        """The state before the first step."""
        start = jax.jit(self._start, out_shardings=self._shardings(self.state_shape))
        return start(self._group.frozen.tree, self._group.initial.tree, self._carry.tree)

    def compile(self, state, chunk_steps: int) -> "Program":
        """Trace and compile the loop over the steps of a chunk, for all lanes at once."""
        axes = (0, self._group.frozen.axes, None, 0, 0, None)

        def lane(state, frozen, data, plan, key, step):
            return self._phase.step(state, frozen, _batches(data, plan, jax.random.wrap_key_data(key), step))

        def advance(state, frozen, data, plan, keys, start, stop):
            frozen = self._for_lanes(frozen, self._group.frozen)

            def lanes(state, step):
                return self._each(lane, axes)(state, frozen, data, plan, keys, step)

            def body(step, loop):
                state, infos = loop
                state, info = lanes(state, step)
                return state, {name: infos[name].at[step - start].set(value) for name, value in info.items()}

            _, info = jax.eval_shape(lanes, state, start)
            infos = {name: jnp.zeros((chunk_steps, *value.shape), value.dtype) for name, value in info.items()}
            return jax.lax.fori_loop(start, stop, body, (state, infos))

        began = time.perf_counter()
        whole = self._group.placement.replicated
        results = (jax.tree.map(lambda x: x.sharding, state), whole)
        jitted = jax.jit(advance, donate_argnums=0, out_shardings=results)
        compiled = jitted.lower(state, *self.arguments, 0, 1).compile(compiler_options())
        monitor, finite = (
            jax.jit(self._each(fn, (0,)), out_shardings=whole).lower(state).compile()
            for fn in (self._phase.monitor, _all_finite)
        )
        return Program(compiled, monitor, finite, time.perf_counter() - began)

    @functools.cached_property
    def arguments(self) -> tuple[Any, ...]:
        """What a compiled chunk takes beside the state: frozen weights, training sets, plans and keys."""
        group, placement = self._group, self._group.placement
        rows = _plans(group.members, self.round, group.first)
        keys = [
            jax.random.key_data(jax.random.fold_in(member.key, zlib.crc32(phase.name.encode())))
            for member in group.members
            for phase in self.round.phases
        ]
        host = np.stack([np.asarray(key) for key in keys])
        plan = place(rows, {name: placement.of_rows(x.ndim) for name, x in rows.items()})
        return group.frozen.tree, group.data, plan, place(host, self._shardings(host))

    def advance(self, program: "Program", state, step: int, stop: int) -> tuple[Any, list[list[dict[str, float]]]]:
        """Run a chunk; the infos of each lane, one a step, with the monitor's diagnostics in the last."""
        state, columns = program.advance(state, *self.arguments, step, stop)
        columns, monitored = jax.device_get((columns, program.monitor(state)))
        infos = [
            [{name: float(column[i, lane]) for name, column in columns.items()} for i in range(stop - step)]
            for lane in range(self._count)
        ]
        for lane, lane_infos in enumerate(infos):
            lane_infos[-1].update({name: float(value[lane]) for name, value in monitored.items()})
        return state, infos

    def finish(self, state) -> Weights:
        """What each member has learnt after this round, leaves ``[members, ...]``."""
        members = len(self._group.members)

        def finished(carry, state):
            axes = self._carry.axes
            for number, phase in enumerate(self.round.phases):
                own = jax.tree.map(lambda x, n=number: x[n :: self._per_member], state)
                carry, axes = each_lane(phase.finish, (axes, 0), members)(carry, own), 0
            return carry

        shape = jax.eval_shape(finished, self._carry.tree, state)
        return jax.jit(finished, out_shardings=self._shardings(shape))(self._carry.tree, state)

    def _start(self, frozen, initial, carry):
        group = self._group
        axes = (group.frozen.axes, group.initial.axes, self._carry.axes)
        pairs = zip((frozen, initial, carry), (group.frozen, group.initial, self._carry), strict=True)
        state = self._each(self._phase.start, axes)(*(self._for_lanes(tree, like) for tree, like in pairs))
        # A copy of every array: the state is donated, and must not share a buffer with anything kept.
        return jax.tree.map(jnp.copy, state)

    def _for_lanes(self, tree, like: Stacked):
        """The leaves of members, each as often as the member has lanes."""
        return jax.tree.map(lambda x, own: jnp.repeat(x, self._per_member, axis=0) if own else x, tree, like.lanes)

    def _each(self, fn: Callable[..., Any], axes: tuple[Any, ...]) -> Callable[..., Any]:
        return each_lane(fn, axes, self._count)

    def _shardings(self, tree):
        return self._group.placement.of_tree(tree, self._group.weights, lanes=True)


def each_lane(fn: Callable[..., Any], axes: tuple[Any, ...], count: int) -> Callable[..., Any]:
    """`fn` mapped over lanes; `axes` as `jax.vmap` takes them, all of them may be None."""

    def with_lane(lane, *args):
        del lane
        return fn(*args)

    mapped = jax.vmap(with_lane, in_axes=(0, *axes), spmd_axis_name=SEED)
    return lambda *args: mapped(jnp.arange(count), *args)


def _all_finite(tree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all()


def _batches(data, plan, key, step):
    keys = jax.random.split(jax.random.fold_in(key, step), len(plan))
    return {name: gather(data, plan[name][step], keys[i]) for i, name in enumerate(sorted(plan))}


def compiler_options() -> dict[str, Any]:
    """What XLA is told for training steps.

    Its CPU backend orders a program such that independent gradients can run at once, and then holds the activations of
    all of them; in order of memory they are no slower where one gradient fills the cores (CHANGELOG, 0.2.0).
    """
    # Not xla_cpu_enable_concurrency_optimized_scheduler: as an option of one program that is taken, and not read.
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else {}
