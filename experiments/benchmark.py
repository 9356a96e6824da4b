"""Seconds, memory and compile time of a training step, of search iterations and of a finetune step, in one run.

    python experiments/benchmark.py --output runs/benchmark            # MiniLM-L6, 16 x 128, float32
    python experiments/benchmark.py --shape bert-base --batch 32 --dtype bfloat16 --device gpu --output runs/benchmark

Weights are random, dropout is off. The unit is one plain training step (forward, backward, AdamW). All programs are
timed in turn, round after round, so that a machine that slows down slows all of them; the table has medians, and the
ratio of each program to the plain step of the same round. `--torch` adds the plain step of PyTorch and `transformers`.

Writes benchmark.json and benchmark.md.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agwm_jax import bilevel, hypergrad, init_alpha, linear_solve, mix, mixup_problem, partition, project_alpha
from agwm_jax.core.cost import matmul_flops
from agwm_jax.core.inner import InnerState, gradient_step
from agwm_jax.errors import AgwmError
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.models.loss import batch_loss
from agwm_jax.schema import MIXED_KERNELS
from agwm_jax.train.lanes import compiler_options

SHAPES = {  # layers, width, heads, feed-forward width
    "minilm": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
    "bert-large": (24, 1024, 16, 4096),
}


class Bench(NamedTuple):
    """A step to be timed: ``run(state) -> state``, compiled, with its state donated."""

    run: Callable[[Any], Any]
    state: Any
    flops: int
    bytes: int
    """Peak, as the compiler reports it: arguments (weights, optimiser), temporaries, and results that are no update."""
    trace_seconds: float
    compile_seconds: float
    cached_seconds: float
    """Trace, and compilation from the persistent cache."""


def configuration(shape: str, length: int) -> BertConfig:
    """The shape of a checkpoint, without dropout."""
    layers, width, heads, inner = SHAPES[shape]
    config = BertConfig(30522, width, layers, heads, inner, max_position_embeddings=max(512, length))
    return config.with_dropout(0.0)


def programs(config: BertConfig, *, batch: int, length: int, dtype: str, unroll: int) -> dict[str, tuple[Any, Any]]:
    """``{name: (step, state)}``; `step` takes the state, the frozen weights and the batches."""
    apply, params = functionalize(
        BertClassifier(config, num_labels=2, dtype=jnp.dtype(dtype), unroll=unroll, rngs=nnx.Rngs(0))
    )
    parts = partition(params, mixed=MIXED_KERNELS)
    alpha = init_alpha(jax.random.key(0), parts)
    loss = batch_loss(apply, "classification")
    tx, outer_tx = optax.adamw(2e-5, eps_root=1e-16), optax.adamw(2e-3)

    def plain(state, frozen, data):
        del frozen
        return gradient_step(lambda task, _, batch: loss(task, batch), tx, state, None, data[0])

    def finetune(state, frozen, data):
        inner, alpha = state
        inner, value = gradient_step(
            lambda task, a, batch: loss(mix(frozen, task, a), batch), tx, inner, alpha, data[0]
        )
        return (inner, alpha), value

    def search(estimator, rollback):
        def solver(frozen):
            problem = mixup_problem(loss, frozen, mixed=parts.mixed)
            return bilevel(problem, estimator, inner_tx=tx, outer_tx=outer_tx, project=project_alpha, rollback=rollback)

        def step(state, frozen, data):
            return solver(frozen).step(state, jax.tree.map(lambda x: x[None], data[0]), data[1])

        return step, solver(parts.frozen).init(parts.task, alpha)

    def neumann(terms, **options):
        return hypergrad.implicit(linear_solve.neumann(num_terms=terms, step_size=0.01), **options)

    inner = InnerState(parts.task, tx.init(parts.task))
    data = tuple(_batch(seed, batch, length) for seed in (0, 1))
    found = {
        "plain step": (plain, inner),
        "finetune, alpha frozen": (finetune, (inner, alpha)),
        "search, first_order": search(hypergrad.first_order(), False),
        "search, finite_difference, rollback": search(hypergrad.finite_difference(), True),
        "search, unrolled 1": search(hypergrad.unrolled(), False),
        "search, neumann 1": search(neumann(1), False),
        "search, neumann 5": search(neumann(5), False),
        "search, neumann 5, differences": search(neumann(5, hvp="finite_difference"), False),
        "search, neumann 5, Gauss-Newton": search(neumann(5, curvature="gauss_newton"), False),
    }
    return {name: ((step, parts.frozen, data), state) for name, (step, state) in found.items()}


def _batch(seed: int, batch: int, length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30000, (batch, length))
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "token_type_ids": jnp.zeros((batch, length), jnp.int32),
        "attention_mask": jnp.ones((batch, length), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, 2, batch), jnp.int32),
        "weight": jnp.ones(batch),
    }


def build(program: tuple[Any, Any, Any], state) -> Bench:
    """Trace, compile (twice: the second time from the persistent cache) and count one step."""
    step, frozen, data = program
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)  # it is donated

    def compiled() -> tuple[Any, float, float]:
        began = time.perf_counter()
        # A function of its own each time: else jit's memory of the first, and not the cache on disk, serves the second.
        lowered = jax.jit(lambda *a: step(*a), donate_argnums=0).lower(state, frozen, data)
        middle = time.perf_counter()
        return lowered.compile(compiler_options()), middle - began, time.perf_counter() - middle

    first, trace_seconds, compile_seconds = compiled()
    _, traced, loaded = compiled()
    memory = first.memory_analysis()
    return Bench(
        lambda state: first(state, frozen, data)[0],
        state,
        matmul_flops(step, state, frozen, data),
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        trace_seconds,
        compile_seconds,
        traced + loaded,
    )


def torch_step(config: BertConfig, *, batch: int, length: int) -> Callable[[], None]:
    """The same plain step in eager PyTorch: `transformers`' BERT and torch's AdamW.

    Raises:
        AgwmError: PyTorch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise AgwmError(f"--torch needs PyTorch beside the product ({error}): pip install torch.") from None
    torch.set_num_threads(_threads())
    torch.manual_seed(0)
    names = {k: v for k, v in vars(config).items() if k not in ("classifier_dropout",)}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**names, num_labels=2))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    data = {k: torch.from_numpy(np.array(v)).long() for k, v in _batch(0, batch, length).items() if k != "weight"}

    def step() -> None:
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()

    return step


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matmul_rate(dtype: str) -> float:
    """Floating-point operations a second of one large matrix product: what the device can do at most."""
    n = 1536 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / float(np.median(seconds))


def measure(benches: dict[str, Bench], extra: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every program, one call of each a round; the first round is not kept."""
    states = {name: bench.state for name, bench in benches.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*benches, *extra)}
    for number in range(rounds + 1):
        for name, bench in benches.items():
            began = time.perf_counter()
            states[name] = jax.block_until_ready(bench.run(states[name]))
            seconds[name].append(time.perf_counter() - began)
        for name, run in extra.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1} of {rounds + 1}", end="\r", file=sys.stderr, flush=True)
    return {name: found[1:] for name, found in seconds.items()}


def rows(benches: dict[str, Bench], seconds: dict[str, list[float]], rate: float) -> list[dict[str, Any]]:
    """One row a program."""
    plain, unit = np.array(seconds["plain step"]), benches["plain step"]
    found = []
    for name, each in seconds.items():
        ratio = np.array(each) / plain
        row: dict[str, Any] = {"program": name, "seconds": float(np.median(each))}
        row |= {"ratio": float(np.median(ratio)), "ratio_quartiles": np.quantile(ratio, [0.25, 0.75]).tolist()}
        if name in benches:
            bench = benches[name]
            row |= {"fb": bench.flops / unit.flops, "bytes": bench.bytes, "bytes_ratio": bench.bytes / unit.bytes}
            row |= {"utilisation": bench.flops / row["seconds"] / rate, "trace_seconds": bench.trace_seconds}
            row |= {"compile_seconds": bench.compile_seconds, "cached_seconds": bench.cached_seconds}
        found.append(row)
    return found


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table, with the machine."""
    lines = [
        "| program | s | plain steps (quartiles) | fb | peak GB (ratio) | utilisation | compile, s | cached, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        low, high = row["ratio_quartiles"]
        line = f"| {row['program']} | {row['seconds']:.3f} | {row['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        if "fb" in row:
            line += (
                f" {row['fb']:.2f} | {row['bytes'] / 1e9:.2f} ({row['bytes_ratio']:.2f}) | {row['utilisation']:.0%} |"
            )
            line += f" {row['trace_seconds'] + row['compile_seconds']:.1f} | {row['cached_seconds']:.1f} |"
        else:
            line += " - | - | - | - | - |"
        lines.append(line)
    return "\n".join([*lines, "", result["setting"], ""])


def main() -> int:
    """Build, time in turn, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="refuse to run on anything else")
    parser.add_argument("--shape", choices=SHAPES, default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--unroll", type=int, default=1, help="layers an iteration of the scan over layers")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="programs that contain one of these words, and the plain step")
    parser.add_argument("--torch", action="store_true", help="time PyTorch's plain step too (CPU)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if arguments.device and device.platform != arguments.device:
        print(
            f"benchmark: JAX runs on {device.platform}, not on {arguments.device}: install jax for it.", file=sys.stderr
        )
        return 2
    config = configuration(arguments.shape, arguments.length)
    size = {"batch": arguments.batch, "length": arguments.length}
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        benches = {}
        for name, (program, state) in programs(config, **size, dtype=arguments.dtype, unroll=arguments.unroll).items():
            if not arguments.only or name == "plain step" or any(word in name for word in arguments.only):
                benches[name] = build(program, state)
                print(f"compiled {name} in {benches[name].compile_seconds:.1f} s", file=sys.stderr, flush=True)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        extra = {"plain step, PyTorch": torch_step(config, **size)} if arguments.torch else {}
    except AgwmError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    seconds = measure(benches, extra, arguments.rounds)
    rate = matmul_rate(arguments.dtype)
    shape = (
        f"{arguments.shape}, batch {arguments.batch} x {arguments.length}, {arguments.dtype}, unroll {arguments.unroll}"
    )
    machine = f"{jax.device_count()} x {device.device_kind} ({_threads()} cores), matrix rate {rate / 1e9:.0f} GFLOP/s"
    versions = f"jax {jax.__version__}, Python {platform.python_version()}"
    result = {
        "setting": f"{shape}, {arguments.rounds} rounds; {machine}; {versions}",
        "rows": rows(benches, seconds, rate),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "benchmark.json").write_text(json.dumps(result, indent=1))
    text = markdown(result)
    (arguments.output / "benchmark.md").write_text(text)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
