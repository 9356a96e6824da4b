"""How cost and memory scale to larger models, more seeds and meshes: the figures of docs/scaling.md.

    python experiments/scaling.py              # tables and measurement, 5 minutes on 2 cores
    python experiments/scaling.py --only tables  # tables alone, seconds

Tables of memory are estimates (agwm_jax.engine.memory.estimate) of shapes, on meshes that need not exist; costs are
measured on a small model (experiments/scaling_cost.py). Replaces what is between the markers of docs/scaling.md, and
writes docs/scaling.csv and docs/scaling.png.
"""

import argparse
import csv
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh
from scaling_cost import BASE, GROWS, QUANTITIES, Row, draw, exponents, measure
from shapes import bert, build_shapes

from agwm_jax.engine.memory import USABLE, SideBySide, estimate
from agwm_jax.engine.sharding import AXES, Placement, bytes_per_device
from agwm_jax.engine.step_memory import STEPS
from agwm_jax.models.bert import BertConfig
from agwm_jax.runs.build import Built
from agwm_jax.settings.config import Config

DEVICE = 80e9
BATCH, LENGTH = 32, 128
MODELS = {  # layers, width, heads, feed-forward width
    "110 M": (12, 768, 12, 3072),
    "340 M": (24, 1024, 16, 4096),
    "1 B": (36, 1536, 24, 6144),
    "8 B": (40, 4096, 32, 16384),
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "plain step": {"method": {"name": "vanilla"}},
    "finetune with alpha": {"method": {"name": "frozen_alpha"}},
    "search, first_order": {"hypergradient": {"estimator": "first_order"}},
    "search, unrolled": {"hypergradient": {"estimator": "unrolled"}},
    "search, neumann 5": {"hypergradient": {"estimator": "neumann", "num_terms": 5}},
}
LAYER_SUMS = 6
"""Sums of activations over `model` in a layer, forward and backward: counted in programs compiled for a CPU."""


class Layout(NamedTuple):
    """A mesh, by its sizes."""

    data: int = 1
    model: int = 1
    fully_sharded: bool = False

    @property
    def name(self) -> str:
        """As a user would say it."""
        if self.data * self.model == 1:
            return "1 device"
        axes = " x ".join(f"{axis} {n}" for axis, n in (("data", self.data), ("model", self.model)) if n > 1)
        return f"{self.data * self.model}: {axes}{', fully sharded' if self.fully_sharded else ''}"

    @property
    def placement(self) -> Placement:
        """On devices that need not exist."""
        mesh: Any = AbstractMesh((1, self.data, self.model), AXES)
        return Placement(mesh, self.fully_sharded)


LAYOUTS = (
    Layout(),
    Layout(8),
    Layout(8, 1, True),
    Layout(4, 2, True),
    Layout(32, 2, True),
    Layout(16, 4, True),
)


def subject(model: BertConfig, program: str, dtype: str) -> tuple[Config, Built]:
    """Settings and shapes of a run that ends with, or consists of, the program."""
    values = {"data": {"batch_size": BATCH, "max_length": LENGTH}, "model": {"dtype": dtype}, **PROGRAMS[program]}
    config = Config.model_validate(values)
    return config, build_shapes(config, model, length=LENGTH)


def shape(name: str) -> BertConfig:
    """Of a model of the tables."""
    layers, width, heads, inner = MODELS[name]
    return bert(layers, width, heads, inner)


def weights(model: BertConfig) -> tuple[int, int]:
    """Bytes of the task weights, and of those that are mixed."""
    _, built = subject(model, "search, first_order", "float32")
    sizes = {path: 4 * x.size for path, x in built.initial.task.items()}
    return sum(sizes.values()), sum(size for path, size in sizes.items() if path in built.frozen)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown; the first column is text."""
    rule = "| --- |" + " ---: |" * (len(head) - 1)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)])


def constants_table() -> str:
    """The constants of every step."""
    head = ["step", "kernels", "others", "width", "inner", "attention", "one_layer", "rollback"]
    return table(head, [[f"`{name}`", *(f"{value:g}" for value in step)] for name, step in STEPS.items()])


def memory_table(dtype: str) -> str:
    """GB of a device for every model, program and mesh; in brackets what does not fit."""
    lines = []
    for name in MODELS:
        for program in PROGRAMS:
            config, built = subject(shape(name), program, dtype)
            cells = []
            for layout in LAYOUTS:
                needed = estimate(config, built, layout.placement, platform="gpu").total
                cells.append(gigabytes(needed) if needed <= USABLE * DEVICE else f"({gigabytes(needed)})")
            lines.append([f"{name}, {program}", *cells])
    return table(["", *(layout.name for layout in LAYOUTS)], lines)


def seeds_table(dtype: str) -> str:
    """Most seeds that fit side by side on one device."""
    lines = []
    for name in MODELS:
        cells = []
        for program in PROGRAMS:
            config, built = subject(shape(name), program, dtype)

            def total(seeds: int, config=config, built=built) -> int:
                return estimate(config, built, Layout().placement, SideBySide(seeds, 1), platform="gpu").total

            first, further = total(1), total(2) - total(1)
            most = int((USABLE * DEVICE - first) // further) + 1 if first <= USABLE * DEVICE else 0
            cells.append(f"{most} ({gigabytes(further)} each)")
        lines.append([name, *cells])
    return table(["", *PROGRAMS], lines)


def traffic(model: BertConfig, layout: Layout, dtype: str) -> dict[str, float]:
    """Bytes that a device sends in one forward and backward pass, by what for; formulae in docs/scaling.md."""
    task, mixed = weights(model)
    n, parts = layout.data, layout.model
    ring, model_ring = (n - 1) / n, (parts - 1) / parts
    mine = mixed / parts + task - mixed
    kept = bytes_per_device_of_cut(model, layout) if layout.fully_sharded else 0
    size = 2 if dtype == "bfloat16" else 4
    tokens = BATCH * LENGTH / n
    return {
        "gradients": ring * (2 * (mine - kept) + kept),
        "gathers": ring * 2 * kept,
        "activations": model.num_hidden_layers * LAYER_SUMS * 2 * model_ring * tokens * model.hidden_size * size,
    }


def bytes_per_device_of_cut(model: BertConfig, layout: Layout) -> float:
    """Bytes, over all devices of `data`, of the weights that full sharding cuts; as `model` leaves them."""
    _, built = subject(model, "search, first_order", "float32")
    shapes = {path: x.shape for path, x in built.initial.task.items()}

    def held(fully_sharded: bool) -> int:
        where = layout._replace(fully_sharded=fully_sharded).placement
        return bytes_per_device(built.initial.task, where.of_tree(built.initial.task, shapes))

    return (held(False) - held(True)) * layout.data / (layout.data - 1)


def traffic_table(dtype: str) -> str:
    """GB that a device sends in one forward and backward pass."""
    lines = []
    for name in MODELS:
        cells = []
        for layout in LAYOUTS[1:]:
            parts = traffic(shape(name), layout, dtype)
            cells.append(" + ".join(gigabytes(parts[kind]) if parts[kind] else "0" for kind in parts))
        lines.append([name, *cells])
    return table(["", *(layout.name for layout in LAYOUTS[1:])], lines)


def cost_table(rows: Sequence[Row]) -> str:
    """The measured rows, and the exponents."""
    lines = []
    for row in rows:
        spread = f"{row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f})"
        numbers = [spread, f"{row['flops'] / 1e9:.1f}", f"{row['bytes'] / 1e6:.0f}", f"{row['compile_seconds']:.1f}"]
        lines.append([f"{row['grows']} {row['value']}", *numbers])
    slopes = [[name, *(f"{found[q]:.2f}" for q in QUANTITIES)] for name, found in exponents(rows).items()]
    rows_text = table(["", "s (fastest to slowest)", "GFLOP", "peak MB", "compile, s"], lines)
    return f"{table(['exponent of', *(label for label, *_ in QUANTITIES.values())], slopes)}\n\n{rows_text}"


def setting(rounds: int) -> str:
    """Where and how the costs were measured."""
    base = ", ".join(f"{name} {value}" for name, value in BASE.items() if name != "terms")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (
        f"{base} where not said otherwise; float32, dropout off, medians of {rounds} rounds in which all programs take "
        f"turns; {jax.devices()[0].device_kind} ({cores} cores), jax {jax.__version__}, Python "
        f"{platform.python_version()}."
    )


def gigabytes(number: float) -> str:
    """Three digits."""
    value = number / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def replace_blocks(text: str, blocks: dict[str, str]) -> str:
    """What stands between ``<!-- name begin -->`` and ``<!-- name end -->``, anew."""
    for name, content in blocks.items():
        pattern = rf"(<!-- {name} begin[^>]*-->\n).*?(<!-- {name} end -->)"
        text, count = re.subn(pattern, lambda match, c=content: f"{match[1]}{c}\n{match[2]}", text, flags=re.S)
        if count != 1:
            raise SystemExit(f"scaling: docs/scaling.md has {count} blocks {name}, expected one.")
    return text


def main() -> int:
    """Estimate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", choices=("tables", "costs"), help="the other blocks stay as they are")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs", help="folder of scaling.md")
    arguments = parser.parse_args()
    blocks = {}
    if arguments.only != "costs":
        blocks["constants"] = constants_table()
        for dtype in ("bfloat16", "float32"):
            blocks[f"memory {dtype}"] = memory_table(dtype)
        blocks["seeds"], blocks["traffic"] = seeds_table("bfloat16"), traffic_table("bfloat16")
    if arguments.only != "tables":
        rows = measure(GROWS, arguments.rounds)
        with (arguments.output / "scaling.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, arguments.output / "scaling.png")
        blocks["costs"] = f"{cost_table(rows)}\n\n{setting(arguments.rounds)}"
    page = arguments.output / "scaling.md"
    page.write_text(replace_blocks(page.read_text(), blocks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
