"""Compiled steps, timed in turn, and what the compiler and the trace say of them."""

import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agwm_jax.core.cost import matmul_flops
from agwm_jax.engine.lanes import compiler_options, peak_bytes

TURN_SECONDS = 0.3
"""Of the untimed and of the timed half of a program's turn. Before it a GPU was idle and has lowered its clock, and a
CPU may have given the pages of a larger program back to the system: the first steps pay for that."""

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Program(NamedTuple):
    """A training step of one seed, or of several side by side."""

    step: Step
    """``step(state, context, data) -> (state, info)``."""
    counted: Step
    """The same without fused kernels, whose products no count sees."""
    state: Any
    """On the host, or shapes of it."""
    context: Any
    data: Any
    fb: float
    """What it has to compute, in forward-backward passes of one batch of one seed: nothing that is computed anew."""
    single: str | None = None
    """For several seeds: the program of one."""

    def start(self, one: Any) -> Any:
        """A state that may be donated; `one` is that of a single seed, which those side by side all begin with."""
        return jax.tree.map(lambda shape, x: jnp.array(jnp.broadcast_to(x, shape.shape)), self.state, one)


class Compiled(NamedTuple):
    """A compiled step: ``run(state) -> state``, which donates its state."""

    run: Callable[[Any], Any]
    flops: int
    """Of all matrix products that the program runs, what it computes anew included."""
    bytes: int
    """Peak, as the compiler reports it: arguments (weights, optimiser), temporaries, and results that are no update."""
    trace_seconds: float
    compile_seconds: float
    cached_seconds: float
    """Trace, and compilation from the persistent cache."""


def compile_step(program: Program) -> tuple[Any, float, float]:
    """The compiled step, seconds of tracing, seconds of compiling."""
    began = time.perf_counter()
    # A function of its own each time: else jit's memory of the first, and not the cache on disk, serves the second.
    jitted = jax.jit(lambda *arguments: program.step(*arguments), donate_argnums=0)
    lowered = jitted.lower(program.state, program.context, program.data)
    middle = time.perf_counter()
    return lowered.compile(compiler_options()), middle - began, time.perf_counter() - middle


def compile_twice(program: Program) -> Compiled:
    """Trace, compile (the second time from the persistent cache) and count one step."""
    first, trace_seconds, compile_seconds = compile_step(program)
    _, traced, loaded = compile_step(program)
    return Compiled(
        lambda state: first(state, program.context, program.data)[0],
        matmul_flops(program.counted, program.state, program.context, program.data),
        peak_bytes(first),
        trace_seconds,
        compile_seconds,
        traced + loaded,
    )


def measure(
    compiled: Mapping[str, Compiled],
    starts: Mapping[str, Callable[[], Any]],
    others: Mapping[str, Callable[[], None]],
    rounds: int,
) -> dict[str, np.ndarray]:
    """Seconds ``[rounds]`` of one step of every program; a first round is not kept.

    All programs take turns, in another order each round, so that a machine that slows down slows all of them. The
    state of one is made for its turn and dropped after it: those of all may be more than a device holds. A turn is one
    step or more for `TURN_SECONDS` that are not timed, and as many that are.
    """

    def turn(name: str) -> Callable[[], None]:
        state = starts[name]()

        def step() -> None:
            nonlocal state
            state = jax.block_until_ready(compiled[name].run(state))

        return step

    seconds: dict[str, list[float]] = {name: [] for name in [*compiled, *others]}
    for number in range(rounds + 1):
        for name in np.random.default_rng(number).permutation(list(seconds)).tolist():
            run = turn(name) if name in compiled else others[name]
            _seconds_a_call(run)
            seconds[name].append(_seconds_a_call(run))
            del run
        print(f"round {number + 1} of {rounds + 1}", end="\r", file=sys.stderr, flush=True)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


def _seconds_a_call(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    count = 0
    while count == 0 or time.perf_counter() - began < TURN_SECONDS:
        run()
        count += 1
    return (time.perf_counter() - began) / count


def matrix_product(dtype: str) -> tuple[Callable[[], None], int]:
    """One large matrix product, whose rate is what the device can do at most, and its floating-point operations."""
    n = 1536 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return lambda: jax.block_until_ready(product(x)), 2 * n**3


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The CPU's name and its widest vector instructions, where the system says."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file.read().splitlines()]
    except OSError:
        return "CPU"
    fields = {name.strip(): value.strip() for name, _, value in lines}
    flags = fields.get("flags", "").split()
    vectors = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    family = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', 'CPU')} ({family}, {vectors})"


def free_bytes() -> float:
    """Memory that the device has left, on a CPU the machine; infinite where nobody says."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"] - stats["bytes_in_use"])
    try:
        with open("/proc/meminfo") as file:
            return 1024.0 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
