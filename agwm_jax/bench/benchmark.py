"""The benchmark of training steps: rows, and the page that shows them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from agwm_jax.bench.timing import Compiled, Program, compile_twice, free_bytes, measure, say
from agwm_jax.errors import AgwmError
from agwm_jax.report.table import markdown_table

PLAIN, MATRIX = "plain step", "matrix product"


class Costs(NamedTuple):
    """What utilisation is reckoned with."""

    pass_flops: int
    """Of one forward and backward pass, from shapes."""
    product: Callable[[], None]
    """One large matrix product."""
    matrix_flops: int

    def utilisation(self, fb: float, seconds: np.ndarray, matrix_seconds: np.ndarray) -> float:
        """Share of the rate of a large matrix product, median over rounds."""
        return float(np.median(fb * self.pass_flops / seconds / (self.matrix_flops / matrix_seconds)))


def time_alone(
    found: Mapping[str, Program],
    others: Mapping[str, Callable[[], None]],
    rounds: int,
    costs: Costs,
) -> tuple[list[dict[str, Any]], dict[str, Compiled]]:
    """One row a program of one seed, all timed in turn with `others`; and what was compiled.

    Raises:
        AgwmError: the plain step, which all are held against, does not fit the device.
    """
    compiled = {}
    for name, program in found.items():
        compiled[name] = compile_twice(program)
        say(f"compiled {name} in {compiled[name].compile_seconds:.1f} s")
    lacking = {name: _lacking(each) for name, each in compiled.items()}
    if lacking[PLAIN]:
        raise AgwmError(f"{PLAIN}: {lacking[PLAIN]}; take a smaller --batch or --length.")
    fitting = {name: each for name, each in compiled.items() if lacking[name] is None}
    starts = {name: partial(found[name].start, found[name].state) for name in fitting}
    seconds = measure(fitting, starts, {**others, MATRIX: costs.product}, rounds)
    rows: list[dict[str, Any]] = [{"program": name, "lacking": text} for name, text in lacking.items() if text]
    for name, each in seconds.items():
        if name == MATRIX:
            continue
        row = {"program": name, "seconds": float(np.median(each)), **_ratio(each / seconds[PLAIN])}
        if name in compiled:
            row |= _compiled_columns(compiled[name], found[name].fb, costs)
            row["bytes_ratio"] = row["bytes"] / compiled[PLAIN].bytes
            row["utilisation"] = costs.utilisation(found[name].fb, each, seconds[MATRIX])
        rows.append(row)
    return rows, compiled


def time_side_by_side(
    found: Mapping[str, Program],
    compiled: Mapping[str, Compiled],
    name: str,
    seeds: int,
    rounds: int,
    costs: Costs,
) -> dict[str, Any]:
    """One row: several seeds in turn with one of them; or how much memory they lack."""
    program, single = found[name], str(found[name].single)
    both = {single: compiled.get(single) or compile_twice(found[single]), name: compile_twice(program)}
    say(f"compiled {name} in {both[name].compile_seconds:.1f} s")
    if lacking := _lacking(both[name]):
        return {"program": single, "seeds": seeds, "lacking": lacking}
    starts = {one: partial(found[one].start, found[single].state) for one in (single, name)}
    seconds = measure(both, starts, {MATRIX: costs.product}, rounds)
    each, alone = seconds[name], seconds[single]
    return {
        "program": single,
        "seeds": seeds,
        "seconds": float(np.median(each)),
        "seconds_per_seed": float(np.median(each)) / seeds,
        "single_seconds": float(np.median(alone)),
        **_ratio(each / alone / seeds),
        **_compiled_columns(both[name], program.fb, costs),
        "utilisation": costs.utilisation(program.fb, each, seconds[MATRIX]),
        "single_utilisation": costs.utilisation(program.fb / seeds, alone, seconds[MATRIX]),
    }


def _lacking(compiled: Compiled) -> str | None:
    """Why a program cannot run here; None where it can."""
    fits = compiled.bytes <= free_bytes()
    return None if fits else f"not run: it takes {compiled.bytes / 1e9:.1f} GB, {free_bytes() / 1e9:.1f} GB are free"


def _compiled_columns(compiled: Compiled, fb: float, costs: Costs) -> dict[str, Any]:
    return {
        "fb": compiled.flops / costs.pass_flops,
        "useful_fb": fb,
        "bytes": compiled.bytes,
        "trace_seconds": compiled.trace_seconds,
        "compile_seconds": compiled.compile_seconds,
        "cached_seconds": compiled.cached_seconds,
    }


def _ratio(ratio: np.ndarray) -> dict[str, Any]:
    return {"ratio": float(np.median(ratio)), "ratio_quartiles": np.quantile(ratio, [0.25, 0.75]).tolist()}


def markdown(result: Mapping[str, Any]) -> str:
    """All that was measured of one shape, as a page."""
    head = f"## {result['setting']}\n\nAttention: {result['attention']}.\n"
    tables = ([_cells(row) for row in result["rows"]], [_seeds_cells(row) for row in result["seeds"]])
    return "\n".join([head, *(markdown_table(rows) for rows in tables if rows)])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    if "lacking" in row:
        return {"program": row["program"], "s": row["lacking"]}
    cells = {"program": row["program"], "s": f"{row['seconds']:.3f}", "plain steps (quartiles)": _spread(row)}
    if "fb" not in row:
        return cells
    return cells | {
        "fb": f"{row['fb']:.2f}",
        "peak GB (ratio)": f"{row['bytes'] / 1e9:.2f} ({row['bytes_ratio']:.2f})",
        "utilisation": f"{row['utilisation']:.0%}",
        "compile, s": f"{row['trace_seconds'] + row['compile_seconds']:.1f}",
        "cached, s": f"{row['cached_seconds']:.1f}",
    }


def _seeds_cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"side by side": row["program"], "seeds": str(row["seeds"])}
    if "lacking" in row:
        return cells | {"s a seed": row["lacking"]}
    return cells | {
        "s a seed": f"{row['seconds_per_seed']:.3f}",
        "one alone, s": f"{row['single_seconds']:.3f}",
        "a seed, in single ones (quartiles)": _spread(row),
        "all, in single ones": f"{row['ratio'] * row['seeds']:.1f}",
        "peak GB": f"{row['bytes'] / 1e9:.2f}",
        "utilisation (alone)": f"{row['utilisation']:.0%} ({row['single_utilisation']:.0%})",
        "compile, s": f"{row['trace_seconds'] + row['compile_seconds']:.1f}",
    }


def _spread(row: Mapping[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    return f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
