"""Seconds, memory and compile time of a training step, of search iterations, and of several seeds side by side.

    python experiments/benchmark.py --output runs/benchmark                      # MiniLM-L6, 16 x 128, float32: a CPU
    python experiments/benchmark.py --only plain unrolled --compile-layers 6 12 24
    python experiments/benchmark.py --only seeds --seeds 4 --length 32           # only several seeds, and one alone

On a GPU, with bfloat16, 32 x 128 and 10 seeds (the presets are defaults, which any option changes):

    python experiments/benchmark.py --preset gpu --output runs/gpu               # BERT-base, then BERT-large
    python experiments/benchmark.py --preset gpu --shape bert-base --batch 16 --only seeds --output runs/gpu-seeds

The first line of a table says which attention runs: there fused where no products with second derivatives are taken
(plain step, finetune, `first_order`, `finite_difference`, differences), plain in the other searches. What to hold the
second command against: 10 seeds should cost no more than 4 single ones.

Weights are random, dropout is off. The unit is one plain training step (forward, backward, AdamW). All programs are
timed in turn, round after round and each round in another order, so that a machine that slows down slows all of them;
each is called twice in a row and the second call is timed, for in training a step follows its like. A table has
medians, and the ratio of each program to the plain step of the same round, with quartiles. Several seeds take turns
with one of them.

`utilisation` is that of the model's operations: what a program has to compute, from shapes (its forward-backward
passes by the docstring of its estimator; nothing that is computed anew), in a second, against the rate of one large
matrix product of the same round. `fb` beside it is counted from the program. `--torch` adds the plain step of PyTorch.

Writes benchmark.json and benchmark.md.
"""

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from benchmark_programs import (
    SHAPES,
    Program,
    configuration,
    free_bytes,
    matrix_product,
    model_flops,
    programs,
    start,
    threads,
    torch_step,
)
from jax.experimental.compilation_cache import compilation_cache

from agwm_jax.core.cost import matmul_flops
from agwm_jax.engine.lanes import compiler_options
from agwm_jax.errors import AgwmError
from agwm_jax.models.attention import fused_refusal
from agwm_jax.models.bert import BertConfig

PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {
        "device": "gpu",
        "shape": ["bert-base", "bert-large"],
        "batch": 32,
        "dtype": "bfloat16",
        "rounds": 30,
    }
}
PLAIN, MATRIX = "plain step", "matrix product"


class Bench(NamedTuple):
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
    lowered = jitted.lower(program.state, program.frozen, program.data)
    middle = time.perf_counter()
    return lowered.compile(compiler_options()), middle - began, time.perf_counter() - middle


def build(program: Program) -> Bench:
    """Trace, compile (twice: the second time from the persistent cache) and count one step."""
    first, trace_seconds, compile_seconds = compile_step(program)
    _, traced, loaded = compile_step(program)
    memory = first.memory_analysis()
    return Bench(
        lambda state: first(state, program.frozen, program.data)[0],
        matmul_flops(program.counted, program.state, program.frozen, program.data),
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        trace_seconds,
        compile_seconds,
        traced + loaded,
    )


def measure(
    benches: Mapping[str, Bench], states: dict[str, Any], others: Mapping[str, Callable[[], None]], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds ``[rounds]`` of every program, the second of two calls a round; a first round is not kept."""

    def step(name: str) -> None:
        states[name] = jax.block_until_ready(benches[name].run(states[name]))

    runs = {**{name: partial(step, name) for name in benches}, **others}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in np.random.default_rng(number).permutation(list(runs)).tolist():
            runs[name]()  # after a larger program it finds its pages given back to the system, and pays for new ones
            began = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1} of {rounds + 1}", end="\r", file=sys.stderr, flush=True)
    return {name: np.array(found[1:]) for name, found in seconds.items()}


class Costs(NamedTuple):
    """What utilisation is reckoned with."""

    pass_flops: int
    """Of one forward and backward pass, from shapes."""
    matrix_flops: int

    def utilisation(self, fb: float, seconds: np.ndarray, matrix_seconds: np.ndarray) -> float:
        """Share of the rate of a large matrix product, median over rounds."""
        return float(np.median(fb * self.pass_flops / seconds / (self.matrix_flops / matrix_seconds)))


def compiled_columns(bench: Bench, fb: float, costs: Costs) -> dict[str, Any]:
    """What is known of a program before it runs."""
    return {
        "fb": bench.flops / costs.pass_flops,
        "useful_fb": fb,
        "bytes": bench.bytes,
        "trace_seconds": bench.trace_seconds,
        "compile_seconds": bench.compile_seconds,
        "cached_seconds": bench.cached_seconds,
    }


def rows(
    found: Mapping[str, Program], benches: Mapping[str, Bench], seconds: dict[str, np.ndarray], costs: Costs
) -> list[dict[str, Any]]:
    """One row a program of one seed."""
    table = []
    for name, each in seconds.items():
        if name == MATRIX:
            continue
        row = {"program": name, "seconds": float(np.median(each)), **_ratio("ratio", each / seconds[PLAIN])}
        if name in benches:
            row |= compiled_columns(benches[name], found[name].fb, costs)
            row["bytes_ratio"] = row["bytes"] / benches[PLAIN].bytes
            row["utilisation"] = costs.utilisation(found[name].fb, each, seconds[MATRIX])
        table.append(row)
    return table


def seeds_row(
    program: Program, name: str, seeds: int, bench: Bench, seconds: dict[str, np.ndarray], costs: Costs
) -> dict[str, Any]:
    """Several seeds side by side, against one of them as often."""
    each, single = seconds[name], seconds[str(program.single)]
    return {
        "program": program.single,
        "seeds": seeds,
        "seconds": float(np.median(each)),
        "seconds_per_seed": float(np.median(each)) / seeds,
        "single_seconds": float(np.median(single)),
        **_ratio("ratio", each / single / seeds),
        **compiled_columns(bench, program.fb, costs),
        "utilisation": costs.utilisation(program.fb, each, seconds[MATRIX]),
        "single_utilisation": costs.utilisation(program.fb / seeds, single, seconds[MATRIX]),
    }


def _ratio(name: str, ratio: np.ndarray) -> dict[str, Any]:
    return {name: float(np.median(ratio)), f"{name}_quartiles": np.quantile(ratio, [0.25, 0.75]).tolist()}


def time_alone(found: dict[str, Program], torch: dict[str, Callable[[], None]], rounds: int, costs: Costs, product):
    """The rows of all programs of one seed, and what was compiled."""
    benches = {}
    for name, program in found.items():
        benches[name] = build(program)
        print(f"compiled {name} in {benches[name].compile_seconds:.1f} s", file=sys.stderr, flush=True)
    states = {name: start(program, program.state) for name, program in found.items()}
    seconds = measure(benches, states, {**torch, MATRIX: product}, rounds)
    return rows(found, benches, seconds, costs), benches


def time_side_by_side(
    found: dict[str, Program], benches: dict[str, Bench], name: str, seeds: int, rounds: int, costs: Costs, product
) -> dict[str, Any]:
    """One row: several seeds in turn with one of them; or how much memory they lack."""
    program, single = found[name], str(found[name].single)
    both = {single: benches.get(single) or build(found[single]), name: build(program)}
    print(f"compiled {name} in {both[name].compile_seconds:.1f} s", file=sys.stderr, flush=True)
    needed = sum(bench.bytes for bench in both.values())
    if needed > free_bytes():
        lacking = (
            f"not run: with one seed beside it it takes {needed / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"
        )
        return {"program": single, "seeds": seeds, "lacking": lacking}
    one = found[single].state
    states = {single: start(found[single], one), name: start(program, one)}
    return seeds_row(program, name, seeds, both[name], measure(both, states, {MATRIX: product}, rounds), costs)


def compile_table(shape: str, layers: Sequence[int], names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of tracing and compiling every program at some numbers of layers, ``{program: {layers: seconds}}``."""
    table: dict[str, Any] = {name: {} for name in names}
    jax.config.update("jax_enable_compilation_cache", False)  # it holds the shape's own number of layers already
    compilation_cache.reset_cache()
    for number in layers:
        config = configuration(shape, length=options["length"], layers=number)
        found = programs(config, **options, seeds=0)
        for name in names:
            _, traced, compiled = compile_step(found[name])
            table[name][number] = traced + compiled
            print(f"compiled {name}, {number} layers, in {compiled:.1f} s", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    return table


def markdown(result: dict[str, Any]) -> str:
    """All that was measured of one shape."""
    lines = [f"## {result['setting']}", "", f"Attention: {result['attention']}.", ""]
    lines += [
        "| program | s | plain steps (quartiles) | fb | peak GB (ratio) | utilisation | compile, s | cached, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        line = f"| {row['program']} | {row['seconds']:.3f} | {_spread(row)} |"
        if "fb" in row:
            line += f" {row['fb']:.2f} | {row['bytes'] / 1e9:.2f} ({row['bytes_ratio']:.2f}) |"
            line += f" {row['utilisation']:.0%} | {row['trace_seconds'] + row['compile_seconds']:.1f} |"
            line += f" {row['cached_seconds']:.1f} |"
        else:
            line += " - | - | - | - | - |"
        lines.append(line)
    if result["seeds"]:
        lines += [
            "",
            "| side by side | seeds | s a seed | one alone, s | a seed, in single ones (quartiles) |"
            " all, in single ones | peak GB | utilisation (alone) | compile, s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            *map(_seeds_line, result["seeds"]),
        ]
    if result["compile"]:
        layers = list(next(iter(result["compile"].values())))
        lines += [
            "",
            f"| trace and compile, s | {' | '.join(f'{n} layers' for n in layers)} |",
            f"| --- | {' | '.join('---:' for _ in layers)} |",
        ]
        for name, seconds in result["compile"].items():
            lines.append(f"| {name} | {' | '.join(f'{x:.1f}' for x in seconds.values())} |")
    return "\n".join([*lines, ""])


def _seeds_line(row: dict[str, Any]) -> str:
    if "lacking" in row:
        return f"| {row['program']} | {row['seeds']} | {row['lacking']} | - | - | - | - | - | - |"
    return (
        f"| {row['program']} | {row['seeds']} | {row['seconds_per_seed']:.3f} | {row['single_seconds']:.3f} |"
        f" {_spread(row)} | {row['ratio'] * row['seeds']:.1f} | {row['bytes'] / 1e9:.2f} |"
        f" {row['utilisation']:.0%} ({row['single_utilisation']:.0%}) |"
        f" {row['trace_seconds'] + row['compile_seconds']:.1f} |"
    )


def _spread(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"


def attention(config: BertConfig, dtype: str, length: int) -> str:
    """Which kernel the programs run that take no products with second derivatives."""
    width = config.hidden_size // config.num_attention_heads
    reason = fused_refusal(dtype=jnp.dtype(dtype), head_width=width, length=length, dropout=False)
    return "fused where no second derivatives are taken" if reason is None else f"plain products ({reason})"


def run(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for of one shape."""
    config = configuration(shape, length=arguments.length, layers=arguments.layers)
    size = {"batch": arguments.batch, "length": arguments.length}
    options: dict[str, Any] = {**size, "dtype": arguments.dtype, "unroll": arguments.unroll}
    torch = {"plain step, PyTorch": torch_step(config, **size)} if arguments.torch else {}
    only, seeds = arguments.only, arguments.seeds
    with_seeds = seeds > 0 and (only is None or "seeds" in only)
    found = programs(config, **options, seeds=seeds if with_seeds else 0)
    alone = {
        name: program
        for name, program in found.items()
        if program.single is None and (only is None or name == PLAIN or any(word in name for word in only))
    }
    product, matrix_flops = matrix_product(arguments.dtype)
    costs = Costs(model_flops(config, **size), matrix_flops)
    table, benches = time_alone(alone, torch, arguments.rounds, costs, product)
    side_by_side = [
        time_side_by_side(found, benches, name, seeds, arguments.rounds, costs, product)
        for name, program in found.items()
        if program.single is not None
    ]
    device = jax.devices()[0]
    layers = f"{config.num_hidden_layers} layers, " if arguments.layers else ""
    setting = f"{shape}, {layers}batch {arguments.batch} x {arguments.length}, {arguments.dtype}"
    machine = f"{jax.device_count()} x {device.device_kind} ({threads()} cores)"
    return {
        "setting": f"{setting}, unroll {arguments.unroll}, {arguments.rounds} rounds; {machine}; "
        f"jax {jax.__version__}, Python {platform.python_version()}",
        "shape": dataclasses.asdict(config),
        "attention": attention(config, arguments.dtype, arguments.length),
        "rows": table,
        "seeds": side_by_side,
        "compile": compile_table(shape, arguments.compile_layers, list(alone), options)
        if arguments.compile_layers
        else {},
    }


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Options, of which a preset changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="other defaults: gpu is bfloat16, 32 x 128, both BERTs")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="refuse to run on anything else")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["minilm"])
    parser.add_argument("--layers", type=int, help="in place of the shape's own")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--unroll", type=int, default=1, help="layers an iteration of the scan over layers")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, help="side by side; default 4 on a CPU, 10 elsewhere, 0: none")
    parser.add_argument(
        "--only", nargs="+", help="programs that contain one of these words, and the plain step; seeds: several seeds"
    )
    parser.add_argument("--compile-layers", nargs="+", type=int, default=[], help="compile time at these layers too")
    parser.add_argument("--torch", action="store_true", help="time PyTorch's plain step too (CPU)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    preset = parser.parse_args(words).preset
    parser.set_defaults(**PRESETS.get(preset, {}))
    arguments = parser.parse_args(words)
    if arguments.seeds is None:
        arguments.seeds = 4 if jax.default_backend() == "cpu" else 10
    return arguments


def main() -> int:
    """Build, time in turn, write."""
    arguments = parse()
    found = jax.devices()[0].platform
    if arguments.device and found != arguments.device:
        print(f"benchmark: JAX runs on {found}, not on {arguments.device}: install jax for it.", file=sys.stderr)
        return 2
    results = []
    caching = jax.config.jax_enable_compilation_cache
    try:
        with tempfile.TemporaryDirectory() as cache:
            jax.config.update("jax_enable_compilation_cache", True)
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            for shape in arguments.shape:
                results.append(run(shape, arguments))
                arguments.output.mkdir(parents=True, exist_ok=True)
                (arguments.output / "benchmark.json").write_text(json.dumps(results, indent=1))
                (arguments.output / "benchmark.md").write_text("\n".join(map(markdown, results)))
                print(f"\n{markdown(results[-1])}")
    except AgwmError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_enable_compilation_cache", caching)
        compilation_cache.reset_cache()  # else the next program would be looked for in the folder that is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
