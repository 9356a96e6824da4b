"""Lanes: the phases of one stage, of all members of a group, as one compiled program."""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from agwm_jax.engine import needs
from agwm_jax.engine.batches import step_batches, stream
from agwm_jax.engine.group import Group, Held, Layout, each_lane, pick
from agwm_jax.engine.needs import Needs, fill, finish_all, stage_name, unread
from agwm_jax.engine.sharding import place
from agwm_jax.methods.interface import Context, Phase, State


class Program(NamedTuple):
    """The compiled loop over the steps of a chunk."""

    advance: Callable[..., tuple[State, dict[str, Array], dict[str, Any]]]
    """``advance(state, held, data, plan, keys, start, stop)``: the state, infos ``[chunk_steps, lanes]``, and of the
    state at the end ``{"monitor": {name: [lanes]}, "finite": [lanes]}``."""
    num_bytes: int
    """What one device holds while it runs: arguments, results and temporaries, as the compiler counts them."""
    seconds: float
    """Spent compiling it."""


@dataclasses.dataclass
class Programs:
    """What has been traced and compiled for runs that differ in their seeds only: groups of one size share it."""

    needs: dict[Layout, Needs] = dataclasses.field(default_factory=dict)
    compiled: dict[Any, Program] = dataclasses.field(default_factory=dict)


class Lanes:
    """The lanes of one stage; that of a member's phase is ``member * len(stage) + phase``.

    Args:
        group: the members.
        number: of the stage.
    """

    def __init__(self, group: Group, number: int):
        self.stage, self.needs = group.stages[number], group.needs.stages[number]
        self._group, self._number = group, number
        self._count = len(group.members) * len(self.stage)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._count, *x.shape), x.dtype), self.needs.state)
        self.state = group.abstract(shapes)
        """Shapes and places of the state of all lanes."""

    @property
    def name(self) -> str:
        """Of the stage."""
        return stage_name(self.stage)

    @property
    def num_steps(self) -> int:
        """Steps of each of its phases."""
        return self.stage[0].num_steps

    def member_and_phase(self, lane: int) -> tuple[int, Phase]:
        """Whose lane it is, and which phase runs in it."""
        member, number = divmod(lane, len(self.stage))
        return member, self.stage[number]

    def start(self, held: Held) -> State:
        """The state before the first step."""
        held = {key: held[key] for key in self.needs.start}
        where = jax.tree.map(lambda x: x.sharding, self.state)
        return jax.jit(self._start, out_shardings=where)(held, self._keys("start"))

    def _start(self, held: Held, keys):
        starts = list(dict.fromkeys(phase.start for phase in self.stage))

        def one(start, held, key):
            return start(self._context(held), jax.random.wrap_key_data(key))

        axes = (self._group.axes(held), 0)
        if len(starts) == 1:
            lanes = each_lane(lambda *args: one(starts[0], *args), axes, self._count)
            state = lanes(self._for_lanes(held), keys)
        else:
            members, per_member = len(self._group.members), len(self.stage)
            each = [
                each_lane(lambda *args, s=phase.start: one(s, *args), axes, members)(held, keys[number::per_member])
                for number, phase in enumerate(self.stage)
            ]
            state = jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(self._count, *xs[0].shape[1:]), *each)
        # A copy of every array: the state is donated, and must not share a buffer with anything kept.
        return jax.tree.map(jnp.copy, state)

    def compile(self, programs: Programs, chunk_steps: int) -> Program:
        """The loop over the steps of a chunk, for all lanes at once; what was compiled before is used again."""
        arguments = (self.state, *self._abstract_arguments)
        steps = list(dict.fromkeys(phase.step for phase in self._group.members[0].method.phases))
        key = (
            steps.index(self.stage[0].step),
            self._slots,
            self._axes,
            chunk_steps,
            jax.tree.structure(arguments),
            *((x.shape, x.dtype, x.sharding) for x in jax.tree.leaves(arguments)),
        )
        if key not in programs.compiled:
            programs.compiled[key] = self._compile(arguments, chunk_steps)
        return programs.compiled[key]

    def _compile(self, arguments: tuple[Any, ...], chunk_steps: int) -> Program:
        axes = (0, self._axes, None, 0, 0, None)
        monitor = each_lane(self.stage[0].monitor, (0,), self._count)

        def advance(state, held, data, plan, keys, start, stop):
            held = tuple(self._for_lanes(dict(zip(self._step_keys, held, strict=True))).values())

            def lanes(state, step):
                return each_lane(self._step, axes, self._count)(state, held, data, plan, keys, step)

            def body(step, loop):
                state, infos = loop
                state, info = lanes(state, step)
                return state, {name: infos[name].at[step - start].set(value) for name, value in info.items()}

            _, info = jax.eval_shape(lanes, state, start)
            infos = {name: jnp.zeros((chunk_steps, *value.shape), value.dtype) for name, value in info.items()}
            state, infos = jax.lax.fori_loop(start, stop, body, (state, infos))
            return state, infos, {"monitor": monitor(state), "finite": jax.vmap(_all_finite)(state)}

        began = time.perf_counter()
        whole = self._group.placement.replicated
        where = (jax.tree.map(lambda x: x.sharding, self.state), whole, whole)
        jitted = jax.jit(advance, donate_argnums=0, out_shardings=where)
        compiled = jitted.lower(*arguments, 0, 1).compile(compiler_options())
        return Program(compiled, peak_bytes(compiled), time.perf_counter() - began)

    def _step(self, state, held, data, plan, key, step):
        """One step of one lane."""
        shapes = jax.tree.leaves(jax.tree.map(lambda key: self._group.needs.shapes[key], self.needs.sources))
        leaves = [unread(like) if slot is None else held[slot] for slot, like in zip(self._slots, shapes, strict=True)]
        context = jax.tree.unflatten(jax.tree.structure(self.needs.sources), leaves)
        own = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        batches = step_batches(data, plan, own, step)
        return self.needs.take_step(state, context, batches, stream(own, "step"), jnp.int32(step))

    @cached_property
    def _step_keys(self) -> tuple[needs.Key, ...]:
        """What the step reads, in the order of the context."""
        return tuple(dict.fromkeys(key for key in jax.tree.leaves(self.needs.sources) if key in self.needs.step))

    @property
    def _axes(self) -> tuple[int | None, ...]:
        """Of the arrays of `_step_keys`, as `jax.vmap` takes them."""
        return tuple(self._group.axes(self._step_keys).values())

    @cached_property
    def _slots(self) -> tuple[int | None, ...]:
        """For every leaf of the context its place in `_step_keys`, or None where the step does not read it."""
        places = {key: place for place, key in enumerate(self._step_keys)}
        read = self.needs.take_step.reads[len(jax.tree.leaves(self.needs.state)) :]
        keys = jax.tree.leaves(self.needs.sources)
        return tuple(places[key] if is_read else None for key, is_read in zip(keys, read, strict=False))

    @property
    def _abstract_arguments(self) -> tuple[Any, ...]:
        group = self._group
        plan = {
            name: jax.ShapeDtypeStruct(
                (self._count, *np.shape(rows)), jnp.int32, sharding=group.placement.of_rows(1 + np.ndim(rows))
            )
            for name, rows in self.stage[0].plan.items()
        }
        numbers = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        keys = jax.ShapeDtypeStruct((self._count, *numbers.shape), numbers.dtype)
        return tuple(group.arrays[key] for key in self._step_keys), group.data, plan, group.abstract(keys)

    def arguments(self, held: Held, data: dict[str, Array]) -> tuple[Any, ...]:
        """What a program takes beside the state: what the step reads of the context, training sets, plans and keys."""
        rows = self._plans()
        plan = place(rows, {name: self._group.placement.of_rows(x.ndim) for name, x in rows.items()})
        return tuple(held[key] for key in self._step_keys), data, plan, self._keys(None)

    def _plans(self) -> dict[str, np.ndarray]:
        """Rows of the group's table for every lane and step."""

        def moved(rows, by: int) -> np.ndarray:
            rows = np.asarray(rows)
            return np.where(rows >= 0, rows + by, rows).astype(np.int32)

        own = [
            (next(phase for phase in member.method.phases if phase.name == shared.name).plan, by)
            for member, by in zip(self._group.members, self._group.first_rows, strict=True)
            for shared in self.stage
        ]
        return {name: np.stack([moved(plan[name], by) for plan, by in own]) for name in self.stage[0].plan}

    def _keys(self, use: str | None) -> Array:
        """The random stream of every lane's phase, or the one within it for a use."""
        phases = [stream(member.key, phase.name) for member in self._group.members for phase in self.stage]
        return self._group.place_keys(phases if use is None else [stream(key, use) for key in phases])

    def finish(self, held: Held, state: State, wanted: Collection[needs.Key]) -> Held:
        """Of the arrays that are wanted those that the stage computes."""
        group, per_member = self._group, len(self.stage)
        made = sorted(key for key in wanted if key.split("/")[0] == str(self._number))
        read = {key: held[key] for key in self.needs.finish}

        def one(held: Held, states: Sequence[State]) -> Held:
            return pick(finish_all(self.stage, self._context(held), states), self.needs.learnt, made)

        def finished(held: Held, state: State) -> Held:
            states = [jax.tree.map(lambda x, n=n: x[n::per_member], state) for n in range(per_member)]
            each = states if per_member > 1 else [state]
            return each_lane(one, (group.axes(held), 0), len(group.members))(held, each)

        return jax.jit(finished, out_shardings={key: group.arrays[key].sharding for key in made})(read, state)

    def _context(self, held: Held) -> Context:
        return fill(self.needs.sources, self._group.needs.shapes, held)

    def _for_lanes(self, held: Held) -> Held:
        """What members do not share, each as often as the member has lanes."""
        times = len(self.stage)
        return {key: x if key in self._group.shared else jnp.repeat(x, times, axis=0) for key, x in held.items()}


def _all_finite(tree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all() if floats else jnp.array(True)


def peak_bytes(compiled: Any) -> int:
    """What one device holds while a program runs, as the compiler counts it; 0 where a backend does not count."""
    found = compiled.memory_analysis()
    if found is None:
        return 0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(kept + found.temp_size_in_bytes)


def compiler_options() -> dict[str, Any]:
    """What XLA is told for training steps.

    Its CPU backend orders a program such that independent gradients can run at once, and then holds the activations of
    all of them; in order of memory they are no slower where one gradient fills the cores (CHANGELOG, 0.2.0).
    """
    # Not xla_cpu_enable_concurrency_optimized_scheduler: as an option of one program that is taken, and not read.
    return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"} if jax.default_backend() == "cpu" else {}
