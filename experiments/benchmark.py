"""Seconds, memory and compile time of a training step, of search iterations, and of several seeds side by side.

    python experiments/benchmark.py --output runs/benchmark                      # MiniLM-L6, 16 x 128, float32: a CPU
    python experiments/benchmark.py --only plain unrolled --layers 12            # compile time by layers, and the rest
    python experiments/benchmark.py --only seeds --seeds 4 --length 32           # only several seeds, and one alone
    python experiments/benchmark.py --preset gpu --output runs/gpu               # BERT-base and -large in bfloat16

Weights are random, dropout is off. The unit is one plain training step (forward, backward, AdamW). All programs are
timed in turn, round after round; a table has medians, and the ratio of each program to the plain step of the same
round, with quartiles. `fb` is counted from the program: forward-backward passes of one batch. `utilisation` is what a
program has to compute, in a second, against the rate of one large matrix product of the same round. `--torch` adds the
plain step of PyTorch. Writes benchmark.json and benchmark.md.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from agwm_jax import AgwmError
from agwm_jax.bench.benchmark import PLAIN, Costs, markdown, time_alone, time_side_by_side
from agwm_jax.bench.programs import TimedStep, programs, shape, torch_step
from agwm_jax.bench.timing import matrix_product, processor, say, threads
from agwm_jax.models.attention import fused_refusal
from agwm_jax.models.family import Options

SHAPES = {  # family, layers, width, heads, feed-forward width
    "minilm": ("bert", 6, 384, 12, 1536),
    "bert-base": ("bert", 12, 768, 12, 3072),
    "bert-large": ("bert", 24, 1024, 16, 4096),
    "roberta-base": ("roberta", 12, 768, 12, 3072),
}


def _search(fb: float, estimator: str, *, differences: bool = False, rollback: bool = False, **options) -> TimedStep:
    settings = {"name": "agwm", "estimator": {"name": estimator, **options}, "search": {"rollback": rollback}}
    return TimedStep(settings, "search-0", fb, differences)


def _neumann(fb: float, terms: int, *, differences: bool = False, **options) -> TimedStep:
    solver = {"name": "neumann", "num_terms": terms, "step_size": 0.01}
    return _search(fb, "implicit", differences=differences, solver=solver, **options)


STEPS = {
    PLAIN: TimedStep({"name": "vanilla"}, "finetune", 1),
    "finetune, alpha frozen": TimedStep({"name": "agwm"}, "finetune", 1),
    "search, first_order": _search(2, "first_order"),
    "search, finite_difference, rollback": _search(5, "finite_difference", differences=True, rollback=True),
    "search, unrolled 1": _search(4, "unrolled"),
    "search, neumann 1": _neumann(5, 1),
    "search, neumann 5": _neumann(13, 5),
    "search, neumann 5, differences": _neumann(8, 5, differences=True, hvp="finite_difference"),
    "search, neumann 5, Gauss-Newton": _neumann(12, 5, curvature="gauss_newton"),
}
SIDE_BY_SIDE = ("finetune, alpha frozen", "search, unrolled 1")
PRESETS: dict[str, dict[str, Any]] = {
    "gpu": {"device": "gpu", "shape": ["bert-base", "bert-large"], "batch": 32, "dtype": "bfloat16", "rounds": 30}
}


def run(name: str, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Everything that was asked for of one shape, as far as it is measured: again after each program of many seeds."""
    options = Options(jnp.dtype(arguments.dtype), arguments.unroll)
    words = arguments.only

    seeds = arguments.seeds if words is None or "seeds" in words else 0
    chosen = {n for n in STEPS if words is None or n == PLAIN or any(word in n for word in words)}

    family, layers, *sizes = SHAPES[name]
    of = shape(family, arguments.layers or layers, *sizes, batch=arguments.batch, length=arguments.length)
    steps = {n: step for n, step in STEPS.items() if n in chosen or (seeds and n in SIDE_BY_SIDE)}
    found = programs(of, options, steps, seeds=seeds, side_by_side=SIDE_BY_SIDE)
    costs = Costs(of.pass_flops, *matrix_product(arguments.dtype))
    alone = {name: program for name, program in found.items() if name in chosen}
    torch = {"plain step, PyTorch": torch_step(of)} if arguments.torch else {}
    rows, compiled = time_alone(alone, torch, arguments.rounds, costs)
    width = of.config.hidden_size // of.config.num_attention_heads
    reason = fused_refusal(dtype=options.dtype, head_width=width, length=arguments.length, dropout=False)
    device = jax.devices()[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    result: dict[str, Any] = {
        "setting": f"{name}, {of.config.num_hidden_layers} layers, batch {arguments.batch} x {arguments.length}, "
        f"{arguments.dtype}, unroll {arguments.unroll or 'auto'}, {arguments.rounds} rounds; {jax.device_count()} x "
        f"{kind} ({threads()} cores); jax {jax.__version__}, Python {platform.python_version()}",
        "attention": "fused where no second derivatives are taken" if reason is None else f"plain products ({reason})",
        "rows": rows,
        "seeds": [],
    }
    yield result
    for program in (program for program in found if found[program].single is not None):
        row = time_side_by_side(found, compiled, program, seeds, arguments.rounds, costs)
        result = {**result, "seeds": [*result["seeds"], row]}
        yield result


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
    parser.add_argument("--unroll", type=int, help="layers an iteration of the scan (default: all of up to 6, else 1)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seeds", type=int, help="side by side; default 4 on a CPU, 10 elsewhere, 0: none")
    parser.add_argument(
        "--only", nargs="+", help="programs that contain one of these words, and the plain step; seeds: several seeds"
    )
    parser.add_argument("--torch", action="store_true", help="time PyTorch's plain step too (CPU)")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    parser.set_defaults(**PRESETS.get(parser.parse_args(words).preset, {}))
    arguments = parser.parse_args(words)
    if arguments.seeds is None:
        arguments.seeds = 4 if jax.default_backend() == "cpu" else 10
    return arguments


def main() -> int:
    """Build, time in turn, write."""
    arguments = parse()
    found = jax.devices()[0].platform
    if arguments.device and found != arguments.device:
        say(f"benchmark: JAX runs on {found}, not on {arguments.device}: install jax for it.")
        return 2
    results: dict[str, dict[str, Any]] = {}
    caching = jax.config.jax_enable_compilation_cache
    try:
        with tempfile.TemporaryDirectory() as cache:
            jax.config.update("jax_enable_compilation_cache", True)
            jax.config.update("jax_compilation_cache_dir", cache)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
            arguments.output.mkdir(parents=True, exist_ok=True)
            for name in arguments.shape:
                for result in run(name, arguments):
                    results[name] = result
                    (arguments.output / "benchmark.json").write_text(json.dumps([*results.values()], indent=1))
                    (arguments.output / "benchmark.md").write_text("\n".join(map(markdown, results.values())))
                print(f"\n{markdown(results[name])}")
    except AgwmError as error:
        say(f"benchmark: {error}")
        return 2
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        jax.config.update("jax_enable_compilation_cache", caching)
        compilation_cache.reset_cache()  # else the next program would be looked for in the folder that is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
