"""The only training loop: it runs the phases of a method, compiled, in chunks of steps, and can stop at any of them."""

import contextlib
import math
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.engine import processes
from agwm_jax.engine.checkpoint import Checkpoints, Position
from agwm_jax.engine.group import Group, Held, Layout, Member
from agwm_jax.engine.lanes import Lanes, Programs
from agwm_jax.engine.needs import INITIAL, PRETRAINED
from agwm_jax.engine.observer import Observer
from agwm_jax.errors import Diverged
from agwm_jax.methods.interface import State, Variables
from agwm_jax.models.weights import Weights

_GO_ON, _SAVE, _STOP = range(3)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal; the state was saved first."""


class Outcome(NamedTuple):
    """What a group learnt."""

    learnt: list[Variables | None]
    """One a member, on the devices; None for one that diverged."""
    diverged: dict[int, str]
    """What happened to each member that diverged while others went on."""
    seconds: dict[str, float]
    """By stage, and under "compile" and "checkpoint"; of all members together."""


def fit(
    members: Sequence[Member],
    *,
    weights: Weights,
    layout: Layout,
    observer: Observer,
    checkpoints: Checkpoints | None = None,
    chunk_steps: int = 50,
    checkpoint_minutes: float = 0.0,
    programs: Programs | None = None,
) -> Outcome:
    """Run all phases of a method for one seed or several at once, from the newest checkpoint if there is one.

    The training set lies on the devices and a chunk of steps is one call of a compiled loop over index batches; what it
    tells is fetched while the next runs. Every random number follows from a member's key, the phase's name and the
    step, so a run that was killed and continued ends with the same bits where the kernels are deterministic, as on a
    CPU, and a seed learns what it would alone, to rounding.

    Args:
        members: one a seed, their methods alike but for the plans.
        weights: what is known of the model's weights, by path.
        layout: mesh of devices, and what goes side by side.
        observer: is told what happens.
        checkpoints: where to save and resume; None: nowhere.
        chunk_steps: steps a call of the devices.
        checkpoint_minutes: between checkpoints; 0 for the ends of phases only.
        programs: what was compiled before for the same config.

    Raises:
        Diverged: all members did: an info whose name ends in ``loss`` or ``norm``, or a weight, is not finite.
        AgwmError: the checkpoint is one of other seeds.
        Interrupted: on SIGINT or SIGTERM, after saving if there are checkpoints.
    """
    programs = programs or Programs()
    run = _Fit(members, weights, layout, observer, checkpoints, chunk_steps, 60 * checkpoint_minutes, programs)
    with jax.set_mesh(layout.placement.mesh), _deferred_signals() as run.interrupted:
        return run.run()


class _Chunk(NamedTuple):
    """Steps that were sent to the devices; what they tell may not be there yet."""

    first: int
    stop: int
    infos: dict[str, Any]
    end: dict[str, Any]


class _Fit:
    """A group in progress."""

    interrupted: threading.Event

    def __init__(
        self,
        members: Sequence[Member],
        weights: Weights,
        layout: Layout,
        observer: Observer,
        checkpoints: Checkpoints | None,
        chunk_steps: int,
        checkpoint_seconds: float,
        programs: Programs,
    ):
        self.group = Group(members, layout, weights, programs.needs.get(layout))
        programs.needs[layout] = self.group.needs
        self.observer, self.checkpoints, self.programs = observer, checkpoints, programs
        self.chunk_steps, self.checkpoint_seconds = chunk_steps, checkpoint_seconds
        phases = members[0].method.phases
        ends = np.cumsum([phase.num_steps for phase in phases]).tolist()
        self.offsets = {phase.name: end - phase.num_steps for phase, end in zip(phases, ends, strict=True)}
        self.start = Position(0, 0, {}, [member.seed for member in members], layout.together, {})
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.diverged: dict[int, str] = {}
        self.saved_at = time.monotonic()

    def run(self) -> Outcome:
        found = None if self.checkpoints is None else self.checkpoints.restore(self._template, self.start)
        position, saved = (self.start, {"held": {}, "state": None}) if found is None else found
        self.seconds.update(position.seconds)
        self.diverged.update({int(member): sentence for member, sentence in position.diverged.items()})
        self.observer.resume(lambda phase, step: self._lies_before(position, phase, step))
        if found is not None:
            lanes = Lanes(self.group, position.stage)
            self.observer.say(f"continuing in {lanes.name} after step {position.step}")
        needs, state, first = self.group.needs, saved["state"], position.step
        held: Held = self.group.place(needs.held(position.stage, started=state is not None)) | saved["held"]
        data = self.group.place_data()
        for number in range(position.stage, len(self.group.stages)):
            lanes = Lanes(self.group, number)
            state = lanes.start(held) if state is None else state
            held = _only(held, needs.held(number, started=True))
            self.observer.begin(lanes.name, step=first, num_steps=lanes.num_steps)
            if first < lanes.num_steps:  # else the run was stopped just after the stage's last step
                state = self._run_stage(number, lanes, state, held, data, first)
            later = needs.held(number + 1, started=False)
            held = {**_only(held, later), **lanes.finish(held, state, later)}
            state, first = None, 0
        if self._agree() == _STOP:
            raise Interrupted(f"stopped after the last step; {self._how_to_go_on()}")
        learnt = self.group.of_members(held)
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return Outcome(
            [None if member in self.diverged else own for member, own in enumerate(learnt)],
            dict(self.diverged),
            dict(self.seconds),
        )

    def _run_stage(
        self, number: int, lanes: Lanes, state: State, held: Held, data: dict[str, Any], first: int
    ) -> State:
        """The steps of a stage from `first` on, chunk by chunk; the state after the last."""
        known = len(self.programs.compiled)
        program = lanes.compile(self.programs, self.chunk_steps)
        if len(self.programs.compiled) > known:
            self.seconds["compile"] += program.seconds
        arguments = lanes.arguments(held, data)
        step, before, began = first, None, time.perf_counter()
        while step < lanes.num_steps:
            stop = min(step + self.chunk_steps, lanes.num_steps)
            state, infos, end = program.advance(state, *arguments, step, stop)
            chunk, step = _Chunk(step, stop, infos, end), stop
            if before is not None:  # while the devices are busy with the next
                self._record(lanes, before)
            before, wanted = chunk, self._agree()
            if wanted == _GO_ON and step < lanes.num_steps:
                continue
            self._record(lanes, chunk)
            before = None
            self.seconds[lanes.name] += time.perf_counter() - began
            self._save(number, step, lanes, state, held)
            if wanted == _STOP:
                raise Interrupted(
                    f"stopped in {lanes.name} after step {step} of {lanes.num_steps}; {self._how_to_go_on()}"
                )
            began = time.perf_counter()
        return state

    def _agree(self) -> int:
        """What all processes do next; the devices of several are waited for."""
        due = bool(self.checkpoint_seconds) and time.monotonic() - self.saved_at >= self.checkpoint_seconds
        return processes.most(_STOP if self.interrupted.is_set() else _SAVE if due else _GO_ON)

    def _how_to_go_on(self) -> str:
        if self.checkpoints is None:
            return "nothing is saved, for there are no checkpoints"
        self.checkpoints.wait()
        return "the state is saved: run the same command again to continue"

    def _record(self, lanes: Lanes, chunk: _Chunk) -> None:
        """Hand each lane's infos to the observer; a member whose numbers are no longer finite is given up."""
        infos, end = jax.device_get((chunk.infos, chunk.end))
        for lane in range(len(end["finite"])):
            member, phase = lanes.member_and_phase(lane)
            own = [
                {name: float(column[i, lane]) for name, column in infos.items()}
                for i in range(chunk.stop - chunk.first)
            ]
            own[-1].update({name: float(column[lane]) for name, column in end["monitor"].items()})
            if member not in self.diverged:
                self.observer.chunk(member, phase, own, step=chunk.first, offset=self.offsets[phase.name])
            self._look_at(member, phase.name, own, chunk, is_finite=bool(end["finite"][lane]))

    def _look_at(
        self, member: int, phase: str, infos: Sequence[Mapping[str, float]], chunk: _Chunk, *, is_finite: bool
    ) -> None:
        for i, info in enumerate(infos, start=chunk.first):
            for name, value in sorted(info.items(), key=lambda item: item[0] != "loss"):  # the loss is named first
                if name.endswith(("loss", "norm")) and not math.isfinite(value):
                    self._give_up(member, f"{phase}: {name} became {value} at step {i}")
        if not is_finite:
            self._give_up(member, f"{phase}: a weight is not finite after step {chunk.stop - 1}")

    def _give_up(self, member: int, what: str) -> None:
        if member in self.diverged:
            return
        sentence = f"{what}; lower the learning rate (or the step size of a solver) and start in a new --run.output"
        self.diverged[member] = sentence
        self.observer.give_up(member, sentence)
        if len(self.diverged) == len(self.group.members):
            latest = None if self.checkpoints is None else self.checkpoints.latest
            kept = "there is no checkpoint" if latest is None else f"the checkpoint of step {latest} is kept"
            last = "" if len(self.group.members) == 1 else "all that went side by side diverged, the last so: "
            raise Diverged(f"{last}{sentence} ({kept}).")

    def _save(self, number: int, step: int, lanes: Lanes, state: State, held: Held) -> None:
        """A checkpoint of all that goes on from here; pretrained and initial arrays are made anew."""
        if self.checkpoints is None:
            return
        began = time.perf_counter()
        diverged = {str(member): sentence for member, sentence in self.diverged.items()}
        position = self.start._replace(stage=number, step=step, seconds=dict(self.seconds), diverged=diverged)
        total = self.offsets[lanes.stage[0].name] + len(lanes.stage) * step
        self.checkpoints.save(total, position, {"state": state, "held": _only(held, _saved(held))})
        self.seconds["checkpoint"] += time.perf_counter() - began
        self.saved_at = time.monotonic()

    def _template(self, position: Position) -> dict[str, Any]:
        """Shapes and places of what was saved at a position."""
        held = _saved(self.group.needs.held(position.stage, started=True))
        state = Lanes(self.group, position.stage).state
        return {"state": state, "held": {key: self.group.arrays[key] for key in held}}

    def _lies_before(self, position: Position, phase: str, step: int) -> bool:
        for number, stage in enumerate(self.group.stages):
            if any(one.name == phase for one in stage):
                return (number, step) < (position.stage, position.step)
        return False


def _only(held: Held, wanted) -> Held:
    return {key: x for key, x in held.items() if key in wanted}


def _saved(keys) -> set[str]:
    return {key for key in keys if key.split("/")[0] not in (PRETRAINED, INITIAL)}


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
        name = signal.Signals(number).name
        said = f"agwm: heard {name}: stopping after the steps that run now; Ctrl-C again stops at once\n"
        os.write(2, said.encode())  # print() may be what was interrupted

    before = {number: signal.signal(number, defer) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
