"""Seconds, operations, memory and compile time of a search iteration against all that may grow, and their plot."""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agwm_jax import bilevel, hypergrad, init_alpha, linear_solve, mixup_problem, partition, project_alpha
from agwm_jax.core.cost import matmul_flops
from agwm_jax.engine.lanes import compiler_options, each_lane
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.models.loss import batch_loss
from agwm_jax.report.style import FAINT, INK, headline, save
from agwm_jax.settings.schema import MIXED_KERNELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

BASE = {"width": 256, "layers": 4, "batch": 4, "length": 64, "seeds": 1, "terms": 0}
"""Terms 0 is `unrolled` with one step; above, `neumann`."""
GROWS = {
    "batch": (2, 4, 8, 16),
    "length": (32, 64, 128, 256),
    "layers": (2, 4, 8, 16),
    "seeds": (1, 2, 4, 8),
    "terms": (1, 2, 4, 8, 16),
}
QUANTITIES = {  # label, colour, marker
    "seconds": ("seconds", "#0072B2", "o"),
    "flops": ("operations, counted", "#D55E00", "s"),
    "bytes": ("peak bytes", "#009E73", "^"),
    "compile_seconds": ("seconds to compile", "#8a8a8a", "x"),
}
VOCABULARY = 1000


class Search(NamedTuple):
    """A search iteration of one or more seeds: ``step(state, frozen, data) -> (state, info)``."""

    step: Callable[..., Any]
    state: Any
    frozen: Any
    data: Any


class Ready(NamedTuple):
    """The same, compiled."""

    run: Callable[[Any], Any]
    state: Any
    flops: int
    bytes: int
    compile_seconds: float


def search(size: dict[str, int]) -> Search:
    """An iteration on a model with random weights, without dropout, as the training loop lays seeds side by side."""
    width, seeds = size["width"], size["seeds"]
    config = BertConfig(VOCABULARY, width, size["layers"], width // 64, 4 * width).with_dropout(0.0)
    apply, params = functionalize(BertClassifier(config, num_labels=2, rngs=nnx.Rngs(0)))
    parts = partition(params, mixed=MIXED_KERNELS)
    loss = batch_loss(apply, "classification")
    estimator = hypergrad.unrolled()
    if size["terms"]:
        estimator = hypergrad.implicit(linear_solve.neumann(num_terms=size["terms"], step_size=0.01))

    def solver(frozen):
        problem = mixup_problem(loss, frozen, mixed=parts.mixed)
        options = {"inner_tx": optax.adamw(2e-5, eps_root=1e-16), "outer_tx": optax.adamw(2e-3)}
        return bilevel(problem, estimator, project=project_alpha, rollback=False, **options)

    def step(state, frozen, data):
        return solver(frozen).step(state, jax.tree.map(lambda x: x[None], data[0]), data[1])

    def one(seed: int) -> tuple[Any, Any]:
        state = solver(parts.frozen).init(parts.task, init_alpha(jax.random.key(seed), parts))
        return state, tuple(_batch(2 * seed + k, size["batch"], size["length"]) for k in (0, 1))

    state, data = jax.tree.map(lambda *xs: jnp.stack(xs), *(one(seed) for seed in range(seeds)))
    return Search(each_lane(step, (0, None, 0), seeds), state, parts.frozen, data)


def _batch(seed: int, batch: int, length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(1, VOCABULARY, (batch, length)), jnp.int32)
    labels = jnp.asarray(rng.integers(0, 2, batch), jnp.int32)
    columns = {"input_ids": ids, "token_type_ids": jnp.zeros_like(ids), "attention_mask": jnp.ones_like(ids)}
    return {**columns, "labels": labels, "weight": jnp.ones(batch)}


def compile_search(found: Search) -> Ready:
    """Trace, compile and count; peak bytes: arguments, temporaries, and results that are no update in place."""
    began = time.perf_counter()
    lowered = jax.jit(found.step, donate_argnums=0).lower(found.state, found.frozen, found.data)
    compiled = lowered.compile(compiler_options())
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    size = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    flops = matmul_flops(found.step, found.state, found.frozen, found.data)

    def run(state):
        return compiled(state, found.frozen, found.data)[0]

    return Ready(run, found.state, flops, size - memory.alias_size_in_bytes, seconds)


def measure(grows: dict[str, Sequence[int]], rounds: int, base: dict[str, int] = BASE) -> list[Row]:
    """One row a value; all programs take turns, round after round, and the first round is not kept."""
    sizes: dict[tuple[int, ...], dict[str, int]] = {}
    for name, values in grows.items():
        sizes |= {tuple(size.values()): size for size in ({**base, name: value} for value in values)}
    ready, states, seconds = {}, {}, {}
    for number, (key, size) in enumerate(sizes.items(), start=1):
        ready[key] = compile_search(search(size))
        states[key], seconds[key] = ready[key].state, []
        print(f"compiled {number} of {len(sizes)}", end="\r", file=sys.stderr, flush=True)
    for number in range(rounds + 1):
        for key, one in ready.items():
            began = time.perf_counter()
            states[key] = jax.block_until_ready(one.run(states[key]))
            seconds[key].append(time.perf_counter() - began)
        print(f"round {number} of {rounds}     ", end="\r", file=sys.stderr, flush=True)
    rows = []
    for name, values in grows.items():
        for value in values:
            key = tuple({**base, name: value}.values())
            one, times = ready[key], seconds[key][1:]
            row: Row = {"grows": name, "value": value, "seconds": float(np.median(times))}
            row |= {"fastest": min(times), "slowest": max(times)}
            rows.append(row | {"flops": one.flops, "bytes": one.bytes, "compile_seconds": one.compile_seconds})
    return rows


def exponents(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Slope in log-log of every quantity over the three largest values of what grows: 1 is linear."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["grows"] for row in rows):
        last = [row for row in rows if row["grows"] == name][-3:]
        x = np.log([row["value"] for row in last])
        found[name] = {
            # Adding 0 makes a rounded -0 a 0.
            quantity: round(float(np.polyfit(x, np.log([row[quantity] for row in last]), 1)[0]), 2) + 0.0
            for quantity in QUANTITIES
        }
    return found


def draw(rows: Sequence[Row], path: Path) -> Path:
    """A panel for each thing that grows: every quantity, relative to its value at the smallest."""
    return save(path, 7.4, lambda figure: _panels(figure, rows), width=12.0)


def _panels(figure: "Figure", rows: Sequence[Row]) -> None:
    slopes = exponents(rows)
    panels = figure.subplots(2, 3).ravel()
    for axes, (name, slope) in zip(panels, slopes.items(), strict=False):
        own = [row for row in rows if row["grows"] == name]
        x = np.array([row["value"] for row in own])
        axes.plot(x, x / x[0], color=FAINT, ls="--", lw=1.2)
        for quantity, (_, color, marker) in QUANTITIES.items():
            y = np.array([row[quantity] for row in own])
            axes.plot(x, y / y[0], color=color, marker=marker, lw=1.6, ms=6, label=f"exponent {slope[quantity]:.2f}")
        axes.set(xscale="log", yscale="log", xlabel=_LABELS[name], title=_TITLES[name])
        axes.set_xticks(x, [str(value) for value in x])
        axes.set_yticks(ticks := [0.5, 1, 2, 4, 8, 16, 32], [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(0.45, max(x[-1] / x[0], axes.get_ylim()[1]))
        axes.legend(fontsize=9, loc="upper left", handlelength=1.6)
    panels[0].set_ylabel("relative to the smallest")
    panels[3].set_ylabel("relative to the smallest")
    legend = panels[-1]
    legend.axis("off")
    for label, color, marker in QUANTITIES.values():
        legend.plot([], [], color=color, marker=marker, lw=1.6, ms=6, label=label)
    legend.plot([], [], color=FAINT, ls="--", label="linear")
    legend.legend(fontsize=11, loc="upper left")
    remark = "Exponent: slope over the three largest values.\nAbove the dashed line: faster than linear."
    legend.text(0, 0.12, remark, fontsize=10, color=INK, transform=legend.transAxes)
    headline(figure, "What a search iteration costs against what grows")


_TITLES = {
    "batch": "examples (unrolled)",
    "length": "length (unrolled)",
    "layers": "layers (unrolled)",
    "seeds": "seeds side by side (unrolled)",
    "terms": "terms (neumann)",
}
_LABELS = {
    "batch": "examples a batch",
    "length": "tokens a text",
    "layers": "layers",
    "seeds": "seeds in one program",
    "terms": "terms of the series",
}
