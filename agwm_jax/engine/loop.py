"""The only training loop: it runs the phases of a method, compiled, in chunks of steps, and can stop at any of them."""

import contextlib
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.engine import processes
from agwm_jax.engine.checkpoint import Checkpoints, Position, abstract
from agwm_jax.engine.lanes import Lanes, Member, Program, on_devices, rounds
from agwm_jax.engine.sharding import Placement
from agwm_jax.errors import Diverged
from agwm_jax.methods.interface import Weights
from agwm_jax.runs.recorder import Recorders


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal; the state was saved first."""


class Layout(NamedTuple):
    """How the runs of a group lie on the devices, and which go side by side."""

    placement: Placement
    together: bool = False
    """The searches on different splits at once, not one after the other."""


class Outcome(NamedTuple):
    """What a group of runs learnt."""

    weights: list[Weights | None]
    """One a member, on the devices; None for one that diverged."""
    diverged: dict[int, str]
    """What happened to each member that diverged while others went on."""
    seconds: dict[str, float]
    """By phase, and under "compile" and "checkpoint"; of all members together."""


def fit(
    members: Sequence[Member],
    *,
    layout: Layout,
    checkpoints: Checkpoints,
    recorders: Recorders,
    chunk_steps: int,
    checkpoint_steps: int,
) -> Outcome:
    """Run all phases of a method for one seed or several at once, from the newest checkpoint if there is one.

    The training set lies on the devices and a chunk of steps is one call of a compiled loop over index batches: nothing
    goes to the host in between. Every random number follows from a member's key, the phase's name and the step, so a
    run that was killed and continued ends with the same bits, and a seed learns what it would alone, to rounding.

    Args:
        members: one a seed, their methods alike but for the plans.
        layout: mesh of devices, and what goes side by side.
        checkpoints: where to save and resume.
        recorders: what the run tells, one a member.
        chunk_steps: steps a call of the devices.
        checkpoint_steps: steps between checkpoints; 0 for the ends of phases only.

    Raises:
        Diverged: no loss is finite any longer.
        AgwmError: the checkpoint is one of other seeds.
        Interrupted: after saving, on SIGINT or SIGTERM.
    """
    with jax.set_mesh(layout.placement.mesh), recorders, _deferred_signals() as interrupted:
        return _Fit(members, layout, checkpoints, recorders, interrupted, chunk_steps, checkpoint_steps).run()


class _Fit:
    """A group of runs in progress."""

    def __init__(
        self,
        members: Sequence[Member],
        layout: Layout,
        checkpoints: Checkpoints,
        recorders: Recorders,
        interrupted: threading.Event,
        chunk_steps: int,
        checkpoint_steps: int,
    ):
        self.group = on_devices(members, layout.placement)
        self.layout, self.checkpoints, self.recorders, self.interrupted = layout, checkpoints, recorders, interrupted
        self.chunk_steps, self.checkpoint_steps = chunk_steps, checkpoint_steps
        self.rounds = rounds(members[0].method, together=layout.together)
        self.offsets = np.cumsum([0, *(phase.num_steps for phase in members[0].method.phases)]).tolist()
        self.start = Position(0, 0, {}, [member.seed for member in members], layout.together, {})
        self.programs: dict[Any, Program] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def run(self) -> Outcome:
        found = self.checkpoints.restore(self._template, self.start)
        position, saved = (self.start, {}) if found is None else found
        carry, state = saved.get("carry"), saved.get("state")
        self.seconds.update(position.seconds)
        self.recorders.diverged.update({int(member): sentence for member, sentence in position.diverged.items()})
        self.recorders.open(lambda phase, step: self._lies_before(position, phase, step))
        if found is not None:
            self.recorders.say(f"continuing in {self.rounds[position.round].name} after step {position.step}")
        for number, round_ in list(enumerate(self.rounds))[position.round :]:
            first = position.step if number == position.round else 0
            lanes = Lanes(self.group, round_, carry)
            state = lanes.start() if state is None else state
            self.recorders.begin(round_, step=first)
            if first < round_.num_steps:  # else the run was stopped just after the round's last step
                state = self._run_round(number, lanes, state, carry, first)
            carry, state = lanes.finish(state), None
        if self._stop_is_wanted():
            raise Interrupted("stopped after the last step; the state is saved: run the same command again to continue")
        return Outcome(self._by_member(carry), dict(self.recorders.diverged), dict(self.seconds))

    def _run_round(self, number: int, lanes: Lanes, state, carry, first: int) -> Any:
        """The steps of a round from `first` on, chunk by chunk; the state after the last."""
        round_, step = lanes.round, first
        shared = (
            round_.phases[0].step,
            len(round_.phases),
            *((k, np.shape(v)) for k, v in round_.phases[0].plan.items()),
        )
        if shared not in self.programs:
            self.programs[shared] = lanes.compile(state, self.chunk_steps)
            self.seconds["compile"] += self.programs[shared].seconds
        program = self.programs[shared]
        while step < round_.num_steps:
            began = time.perf_counter()
            stop = _next_stop(step, round_.num_steps, self.chunk_steps, self.checkpoint_steps)
            state, infos = lanes.advance(program, state, step, stop)
            self._record(lanes, infos, step)
            step = stop
            self.seconds[round_.name] += time.perf_counter() - began
            stopped = self._stop_is_wanted()
            at_checkpoint = self.checkpoint_steps and step % self.checkpoint_steps == 0
            if at_checkpoint or step == round_.num_steps or stopped:
                self._save(number, step, lanes, program, state, carry)
            if stopped:
                raise Interrupted(
                    f"stopped in {round_.name} after step {step} of {round_.num_steps}; the state is saved: "
                    "run the same command again to continue"
                )
        return state

    def _record(self, lanes: Lanes, infos: list[list[dict[str, float]]], step: int) -> None:
        """Hand each lane's infos to its seed; a seed whose numbers are no longer finite is given up."""
        for lane, lane_infos in enumerate(infos):
            member, phase, place = lanes.member_and_phase(lane)
            self.recorders.chunk(member, phase, lane_infos, step=step, offset=self.offsets[place])
            for i, info in enumerate(lane_infos, start=step):
                for name in ("loss", "outer_loss", "hypergradient_norm"):
                    if not math.isfinite(info.get(name, 0.0)):
                        self._give_up(member, phase.name, name, str(info[name]), i)
        self.recorders.show(step + len(infos[0]))

    def _give_up(self, member: int, phase: str, what: str, value: str, step: int) -> None:
        if member in self.recorders.diverged:
            return
        sentence = (
            f"{phase}: {what} became {value} at step {step}; lower the learning rate (search.inner, search.outer or "
            "finetune.optimizer), or the step size of a Neumann series, and start in a new --run.output"
        )
        self.recorders.give_up(member, sentence)
        if len(self.recorders.diverged) == len(self.group.members):
            latest = self.checkpoints.latest
            kept = "there is no checkpoint" if latest is None else f"the checkpoint of step {latest} is kept"
            last = "" if len(self.group.members) == 1 else "all that went side by side diverged, the last so: "
            raise Diverged(f"{last}{sentence} ({kept}).")

    def _save(self, number: int, step: int, lanes: Lanes, program: Program, state, carry) -> None:
        """A checkpoint of a state that is worth one."""
        began = time.perf_counter()
        for lane in np.flatnonzero(~np.asarray(program.finite(state))):
            member, phase, _ = lanes.member_and_phase(int(lane))
            self._give_up(member, phase.name, "a weight", "not finite", step - 1)
        diverged = {str(place): sentence for place, sentence in self.recorders.diverged.items()}
        position = self.start._replace(round=number, step=step, seconds=dict(self.seconds), diverged=diverged)
        content = {"state": state} if carry is None else {"state": state, "carry": carry}
        total = self.offsets[lanes.round.numbers[0]] + len(lanes.round.phases) * step
        self.checkpoints.save(total, position, content)
        self.seconds["checkpoint"] += time.perf_counter() - began

    def _stop_is_wanted(self) -> bool:
        return processes.any_of(self.interrupted.is_set())

    def _template(self, position: Position):
        """Shapes and placement of what was saved at a position."""
        content = {}
        carry = None
        if position.round > 0:
            count, initial = len(self.group.members), self.group.members[0].initial
            carry = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), initial)
            content["carry"] = carry
        content["state"] = Lanes(self.group, self.rounds[position.round], carry).state_shape
        return abstract(content, self.layout.placement.of_tree(content, self.group.weights, lanes=True))

    def _lies_before(self, position: Position, phase: str, step: int) -> bool:
        for number, round_ in enumerate(self.rounds):
            if any(one.name == phase for one in round_.phases):
                return (number, step) < (position.round, position.step)
        return False

    def _by_member(self, carry) -> list[Weights | None]:
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), carry)
        shardings = self.layout.placement.of_tree(one, self.group.weights)
        pick = jax.jit(lambda tree, member: jax.tree.map(lambda x: x[member], tree), out_shardings=shardings)
        return [None if i in self.recorders.diverged else pick(carry, i) for i in range(len(self.group.members))]


def _next_stop(step: int, num_steps: int, chunk_steps: int, checkpoint_steps: int) -> int:
    """End of the chunk that starts at `step`: at most `chunk_steps` further, at a checkpoint, at the end."""
    stop = min(step + chunk_steps, num_steps)
    return min(stop, (step // checkpoint_steps + 1) * checkpoint_steps) if checkpoint_steps else stop


@contextlib.contextmanager
def _deferred_signals() -> Iterator[threading.Event]:
    """Let a chunk end before SIGINT or SIGTERM takes effect; a second SIGINT acts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signal handlers belong to the main thread
        return

    def defer(number, frame):
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
