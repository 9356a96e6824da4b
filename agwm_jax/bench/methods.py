"""All methods side by side: what a run costs by count, and the table and figure of finished runs."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from agwm_jax.core.cost import matmul_flops
from agwm_jax.engine.batches import step_batches
from agwm_jax.methods.interface import Context
from agwm_jax.report.style import headline, save
from agwm_jax.runs.build import Prepared, build, build_setup, recipe
from agwm_jax.settings import load_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Row(NamedTuple):
    """One method on one task, at the factor of the learning rate that its development score chose."""

    task: str
    method: str
    factor: float
    scores: tuple[float, ...]
    """By seed, of the reported split."""
    forward_backwards: float
    """Of a whole run, in units of one batch's: counted matrix products over those of one plain step."""
    seconds: float
    """A seed, without compiling; where seeds went side by side the share of one."""
    gigabytes: float
    """Peak of the process that trained all seeds."""


def counted(prepared: Prepared, unit: float) -> float:
    """Forward-backwards of a whole run; see `Row`. Nothing is computed."""
    key, params = jax.eval_shape(lambda: jax.random.key(0)), _shapes(prepared.pretrained.params)
    method = prepared.method
    data, step = _shapes(prepared.table), jax.ShapeDtypeStruct((), jnp.int32)
    initial = jax.eval_shape(method.init, params, key)
    total = 0.0
    for number, phase in enumerate(method.phases):
        context = Context(params, initial, method.learnt_shapes(params, number))
        rows = {name: jnp.asarray(plan[:1]) for name, plan in phase.plan.items()}
        batches = jax.eval_shape(lambda data, key, rows=rows: step_batches(data, rows, key, 0), data, key)
        state = jax.eval_shape(phase.start, context, key)
        total += phase.num_steps * matmul_flops(phase.step, state, context, batches, key, step) / unit
    return total


def plain_step(config: Path, words: Sequence[str]) -> float:
    """Matrix products of one forward and backward pass of a full batch: the unit of `counted`."""
    loaded = load_config(config, [*words, "--method", "vanilla"])
    (prepared,) = build(loaded)
    size = loaded.data.batch_size
    setup = build_setup(recipe(loaded), prepared.pretrained, prepared.draw.task.kind, seed=0, num_examples=size)
    plan = {"train": jnp.zeros((1, size), jnp.int32)}
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.eval_shape(lambda data, key: step_batches(data, plan, key, 0), _shapes(prepared.table), key)["train"]
    loss = jax.value_and_grad(setup.loss(reverse_only=True))
    return float(matmul_flops(loss, _shapes(prepared.pretrained.params), batch))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), tree)


def read_row(task: str, method: str, runs: Mapping[float, Sequence[Path]], costs: Mapping[str, float]) -> Row | None:
    """The factor with the best mean development score, and what the method did at it; None without a finished run.

    Args:
        task: its name.
        method: its name.
        runs: finished run folders by factor.
        costs: of `counted`, by method.
    """
    results = {
        f: [json.loads((run / "result.json").read_text()) for run in found] for f, found in runs.items() if found
    }
    if not results:
        return None

    def development(factor: float) -> float:
        return statistics.fmean(result["scores"]["development"][result["metric"]] for result in results[factor])

    best = max(results, key=development)
    found = results[best]
    trained = [r["seconds"]["total"] - sum(r["seconds"].get(k, 0) for k in ("compile", "prepare")) for r in found]
    peak = max(r["peak_memory_bytes"] for r in found) / 1e9
    scores = tuple(100 * r["score"] for r in found)
    return Row(task, method, best, scores, costs[method], statistics.fmean(trained), peak)


def markdown(rows: Sequence[Row]) -> str:
    """A row a method: score and spread by task, then counted cost, seconds and memory on the first task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    by = {(row.method, row.task): row for row in rows}
    first = [by[row.method, tasks[0]] for row in rows if (row.method, tasks[0]) in by]
    methods = sorted({row.method for row in rows}, key=lambda m: -_mean([by[m, t] for t in tasks if (m, t) in by]))
    head = ["method", *tasks, "forward-backwards", "s a seed", "GB"]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for method in methods:
        cells = [_score(by.get((method, task))) for task in tasks]
        one = next(row for row in [*(r for r in first if r.method == method), *rows] if row.method == method)
        cells += [f"{one.forward_backwards:.0f}", f"{one.seconds:.0f}", f"{one.gigabytes:.1f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _mean(rows: Sequence[Row]) -> float:
    return statistics.fmean(statistics.fmean(row.scores) for row in rows)


def _score(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = f" ± {statistics.stdev(row.scores):.1f}" if len(row.scores) > 1 else ""
    return f"{statistics.fmean(row.scores):.1f}{spread}"


def write_figure(rows: Sequence[Row], path: Path) -> Path:
    """Score against counted cost, a panel a task; plain fine-tuning's score is the line."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    return save(path, 4.6, lambda figure: _panels(figure, rows, tasks), width=13.0)


def _panels(figure: "Figure", rows: Sequence[Row], tasks: Sequence[str]) -> None:
    headline(figure, "Score (mean and range over seeds) against counted cost")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = sorted((row for row in rows if row.task == task), key=lambda row: statistics.fmean(row.scores))
        means = [statistics.fmean(row.scores) for row in own]
        floor = _floor(means)
        low = min(score for row, mean in zip(own, means, strict=True) if mean >= floor for score in row.scores)
        high = max(score for row in own for score in row.scores)
        for number, (row, mean) in enumerate(zip(own, means, strict=True)):
            cost, inside = max(row.forward_backwards, 0.5), mean >= floor
            place = (cost, mean if inside else low)
            if inside:
                axes.plot([cost, cost], [min(row.scores), max(row.scores)], color="0.8", linewidth=1, zorder=1)
            axes.plot(*place, "o" if inside else "v", color="tab:blue", markersize=4, zorder=2)
            axes.annotate(
                row.method if inside else f"{row.method} ({mean:.1f})",
                place,
                xytext=(1.03, (number + 0.5) / len(own)),  # a column of names beside the panel: no two overlap
                textcoords="axes fraction",
                fontsize=6,
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.85", "linewidth": 0.5},
                annotation_clip=False,
                zorder=0,
            )
        for score in (mean for row, mean in zip(own, means, strict=True) if row.method == "vanilla"):
            axes.axhline(score, color="0.4", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_xscale("log")
        axes.set_xlabel("forward-backwards of a run")
        axes.set_ylabel("score x 100")
        axes.set_title(task, fontsize=9)


def _floor(means: Sequence[float]) -> float:
    """Below it a score would squeeze the others: a triangle at the edge stands for it, and its name tells it."""
    if len(means) < 4:
        return min(means)
    first, _, third = statistics.quantiles(means)
    return first - 3 * (third - first)
