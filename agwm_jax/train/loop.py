"""The only training loop: it runs the phases of a method, compiled, in chunks of steps, and can stop at any of them."""

import contextlib
import math
import signal
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from agwm_jax.core.types import Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.phase import Method, Phase, Weights
from agwm_jax.train.batches import gather
from agwm_jax.train.checkpoint import Checkpoints, Position, abstract
from agwm_jax.train.recorder import Recorder


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal; the state was saved first."""


class Program(NamedTuple):
    """A phase's compiled functions and what compiling cost."""

    advance: Callable[..., tuple[Any, dict[str, jax.Array]]]
    monitor: Callable[[Any], dict[str, jax.Array]]
    seconds: float


def fit(
    method: Method,
    *,
    frozen: Params,
    initial: Weights,
    data: dict[str, jax.Array],
    key: PRNGKeyArray,
    checkpoints: Checkpoints,
    make_recorder: Callable[[int], Recorder],
    chunk_steps: int,
    checkpoint_steps: int,
) -> tuple[Weights, dict[str, float], list[dict[str, Any]]]:
    """Run all phases of a method, from the newest checkpoint if there is one.

    The training set lies on the device and a chunk of steps is one call of a compiled loop over index batches: nothing
    goes to the host in between. Every random number follows from `key`, the phase's name and the step, so a run that
    was killed and continued ends with the same bits.

    Args:
        method: what to run.
        frozen: pretrained weights W0, and weights that are never trained.
        initial: the pretrained start.
        data: columns of the training set, on the device.
        key: PRNG key of the run.
        checkpoints: where to save and resume.
        make_recorder: given the global step that the run starts at.
        chunk_steps: steps a call of the device.
        checkpoint_steps: steps between checkpoints; 0 for the ends of phases only.

    Returns:
        The learnt weights; seconds by phase, and under "compile"; the records of metrics.jsonl.

    Raises:
        AgwmError: the loss is no longer finite.
        Interrupted: after saving, on SIGINT or SIGTERM.
    """
    device = next(iter(frozen.values())).sharding

    def template(position: Position):
        shape = jax.eval_shape(method.phases[position.phase].start, frozen, initial, initial)
        return abstract({"state": shape, "carry": initial}, device)

    found = checkpoints.restore(template)
    if found is None:
        position, carry, state = Position(0, 0, {}), initial, None
    else:
        position, (carry, state) = found[0], (found[1]["carry"], found[1]["state"])
    offsets = np.cumsum([0, *(phase.num_steps for phase in method.phases)])
    seconds = defaultdict(float, position.seconds)
    programs: dict[Any, Program] = {}

    with make_recorder(int(offsets[position.phase]) + position.step) as recorder, _deferred_signals() as interrupted:
        session = _Session(checkpoints, recorder, interrupted, seconds, chunk_steps, checkpoint_steps)
        if found is not None:
            recorder.say(f"continuing in {method.phases[position.phase].name} after step {position.step}")
        for index, phase in list(enumerate(method.phases))[position.phase :]:
            first = position.step if index == position.phase else 0
            recorder.begin(phase.name, step=first, num_steps=phase.num_steps)
            if state is None:
                state = _own(jax.jit(phase.start)(frozen, initial, carry))
            plan = {name: jnp.asarray(rows) for name, rows in phase.plan.items()}
            arguments = (frozen, data, plan, jax.random.fold_in(key, zlib.crc32(phase.name.encode())))
            shared = (phase.step, *((name, rows.shape) for name, rows in plan.items()))
            if first < phase.num_steps:  # else the run was stopped just after the phase's last step
                if shared not in programs:
                    programs[shared] = _compile(phase, state, *arguments, chunk_steps=chunk_steps)
                    seconds["compile"] += programs[shared].seconds
                here = _Here(index, phase, int(offsets[index]), carry)
                state = _run_phase(session, here, programs[shared], state, arguments, first)
            carry, state = _own(phase.finish(carry, state)), None
        if interrupted.is_set():
            raise Interrupted("stopped after the last step; the state is saved: run the same command again to continue")
        return carry, dict(seconds), recorder.records


class _Session(NamedTuple):
    """What lasts for the run."""

    checkpoints: Checkpoints
    recorder: Recorder
    interrupted: threading.Event
    seconds: dict[str, float]
    chunk_steps: int
    checkpoint_steps: int


class _Here(NamedTuple):
    """The phase that runs."""

    number: int
    phase: Phase
    offset: int
    """Global step of its first."""
    carry: Weights


def _run_phase(session: _Session, here: _Here, program: Program, state, arguments, first: int) -> Any:
    """The steps of a phase from `first` on, chunk by chunk; the state after the last."""
    phase, step = here.phase, first
    while step < phase.num_steps:
        began = time.perf_counter()
        stop = _next_stop(step, phase.num_steps, session.chunk_steps, session.checkpoint_steps)
        state, infos = _advance(program, state, arguments, step, stop)
        session.recorder.chunk(phase.name, infos, step=step, num_steps=phase.num_steps, offset=here.offset)
        _check_finite(phase.name, step, infos, session.checkpoints.latest)
        step = stop
        session.seconds[phase.name] += time.perf_counter() - began
        at_checkpoint = session.checkpoint_steps and step % session.checkpoint_steps == 0
        if at_checkpoint or step == phase.num_steps or session.interrupted.is_set():
            _save(session, here, state, step)
        if session.interrupted.is_set():
            raise Interrupted(
                f"stopped in {phase.name} after step {step} of {phase.num_steps}; the state is saved: "
                "run the same command again to continue"
            )
    return state


def _save(session: _Session, here: _Here, state, step: int) -> None:
    """A checkpoint of a state that is worth one."""
    began = time.perf_counter()
    if not _all_finite(state):
        raise AgwmError(_diverged(here.phase.name, "a weight", "not finite", step - 1, session.checkpoints.latest))
    position = Position(here.number, step, dict(session.seconds))
    session.checkpoints.save(here.offset + step, position, {"state": state, "carry": here.carry})
    session.seconds["checkpoint"] += time.perf_counter() - began


def _next_stop(step: int, num_steps: int, chunk_steps: int, checkpoint_steps: int) -> int:
    """End of the chunk that starts at `step`: at most `chunk_steps` further, at a checkpoint, at the end."""
    stop = min(step + chunk_steps, num_steps)
    return min(stop, (step // checkpoint_steps + 1) * checkpoint_steps) if checkpoint_steps else stop


def _advance(program: Program, state, arguments, step: int, stop: int) -> tuple[Any, list[dict[str, float]]]:
    """Run a chunk; its infos, one a step, with the monitor's diagnostics in the last."""
    state, columns = program.advance(state, *arguments, step, stop)
    columns, monitored = jax.device_get((columns, program.monitor(state)))
    infos = [{name: float(column[i]) for name, column in columns.items()} for i in range(stop - step)]
    infos[-1].update({name: float(value) for name, value in monitored.items()})
    return state, infos


def compiler_options() -> dict[str, Any]:
    """What XLA is told for training steps.

    Its CPU backend orders a program such that independent gradients can run at once, and then holds the activations of
    all of them; in order of memory they are no slower where one gradient fills the cores (CHANGELOG, 0.2.0).
    """
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if jax.default_backend() == "cpu" else {}


def _compile(phase: Phase, state, frozen, data, plan, key, *, chunk_steps: int) -> Program:
    """Compile ``advance(state, frozen, data, plan, key, start, stop) -> (state, infos [chunk_steps])``."""

    def batches(data, plan, key, step):
        keys = jax.random.split(jax.random.fold_in(key, step), len(plan))
        return {name: gather(data, plan[name][step], keys[i]) for i, name in enumerate(sorted(plan))}

    def advance(state, frozen, data, plan, key, start, stop):
        def body(step, loop):
            state, infos = loop
            state, info = phase.step(state, frozen, batches(data, plan, key, step))
            return state, {name: infos[name].at[step - start].set(value) for name, value in info.items()}

        _, info = jax.eval_shape(phase.step, state, frozen, jax.eval_shape(batches, data, plan, key, start))
        infos = {name: jnp.zeros(chunk_steps, value.dtype) for name, value in info.items()}
        return jax.lax.fori_loop(start, stop, body, (state, infos))

    began = time.perf_counter()
    jitted = jax.jit(advance, donate_argnums=0)
    compiled = jitted.lower(state, frozen, data, plan, key, 0, 1).compile(compiler_options())
    monitor = jax.jit(phase.monitor).lower(state).compile()
    return Program(compiled, monitor, time.perf_counter() - began)


def _own(tree):
    """A copy of every array: the training state is donated, and must not share a buffer with anything kept."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def _check_finite(phase: str, step: int, infos: list[dict[str, float]], kept: int | None) -> None:
    for i, info in enumerate(infos, start=step):
        for name in ("loss", "outer_loss", "hypergradient_norm"):
            if not math.isfinite(info.get(name, 0.0)):
                raise AgwmError(_diverged(phase, name, str(info[name]), i, kept))


@jax.jit
def _all_finite(tree) -> jax.Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def _diverged(phase: str, what: str, value: str, step: int, kept: int | None) -> str:
    state = "there is no checkpoint before it" if kept is None else f"the checkpoint of step {kept} of the run is kept"
    return (
        f"{phase}: {what} became {value} at step {step}; {state}. Lower the learning rate (search.inner, search.outer "
        "or finetune.optimizer), or the step size of a Neumann series, and start in a new --run.output."
    )


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
