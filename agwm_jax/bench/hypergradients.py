"""The comparison of hypergradients on the search of a real model: agreement, cost, and what each leads to."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from agwm_jax.bench.search import Program, Setting, compile_step
from agwm_jax.core.estimators.base import Estimator

Rows = list[dict[str, Any]]


class Preset(NamedTuple):
    """How much is measured."""

    points: tuple[int, ...]
    """Outer steps of the recorded searches at which every estimator is compared."""
    anchors: tuple[float, ...]
    reference_steps: int
    outer_steps: int
    """Of the comparison of losses, which is done with the last anchor."""
    orders: int
    """Orders of the data in the comparison of losses."""
    searched: tuple[str, ...] | None
    """Estimators in the comparison of losses; None for all."""
    terms: tuple[int, ...]
    """Numbers of terms or steps of the solvers."""


class Compared(NamedTuple):
    """What is compared, by the name in tables and figures."""

    estimators: dict[str, Estimator]
    reference: Estimator
    direct: str
    """The one that is the direct term alone."""
    unit: str
    """The one that records the search, and whose time is the unit of the comparison at equal time."""


WARM_UP = 2  # steps of the recorded search before a point in which an estimator builds up what it carries


def without_signal(estimator: Estimator) -> Estimator:
    """The control: alpha stays where it starts, and all else goes on as in a search."""

    def estimate(*arguments):
        result = estimator.estimate(*arguments)
        return result._replace(hypergradient=optax.tree.zeros_like(result.hypergradient))

    return estimator._replace(estimate=estimate)


def model_rows(setting: Setting, preset: Preset, compared: Compared) -> Rows:
    """Part 2: every estimator at points of the recorded searches, then each in a search of its own."""
    programs = {}
    for name, estimator in compared.estimators.items():
        programs[name] = compile_step(setting, estimator)
        print(f"compiled {name}: {programs[name].cost:.1f} fb, {programs[name].compile_seconds:.0f} s", flush=True)
    reference = compile_step(setting, compared.reference)
    held = compile_step(setting, without_signal(compared.estimators[compared.direct]))

    rows: Rows = []
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for anchor in preset.anchors:
        recorded = recorded_search(setting, programs[compared.unit], anchor, preset.points)
        for step in preset.points:
            rows += compare(setting, recorded, step, anchor, programs, reference, seconds, direct=compared.direct)
            print(f"compared at step {step}, anchor {anchor:g}", flush=True)
    median = {name: float(np.median(found)) for name, found in seconds.items()}
    for name, program in programs.items():
        for quantity, value in (("fb", program.cost), ("seconds", median[name]), ("bytes", program.bytes)):
            rows.append({"part": "cost", "estimator": name, "quantity": quantity, "value": value})
    searched = {name: programs[name] for name in preset.searched or programs}
    median["alpha held"] = median[compared.direct]
    return rows + search_losses(setting, preset, {"alpha held": held, **searched}, median, unit=compared.unit)


def recorded_search(setting: Setting, program: Program, anchor: float, points: tuple[int, ...]) -> dict[int, Any]:
    """States before the outer steps of one search at which an estimator is called."""
    state, found = program.init_estimator(setting.start), {}
    wanted = {step - back for step in points for back in range(WARM_UP + 1)}
    for step in range(max(points) + 1):
        if step in wanted:
            found[step] = state
        state, _ = program.step(setting.pretrained, jnp.float32(anchor), state, *setting.batches(step))
    return found


def compare(
    setting: Setting,
    recorded: Mapping[int, Any],
    step: int,
    anchor: float,
    programs: Mapping[str, Program],
    reference: Program,
    seconds: dict[str, list[float]],
    *,
    direct: str,
) -> Rows:
    """Cosine and norm ratio to the reference, of the whole hypergradient and of the response alone, at one point."""

    def hypergradient(program: Program, name: str | None = None):
        state = program.init_estimator(recorded[step - WARM_UP])
        carries = any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(state.estimator[0]))
        for at in range(step - WARM_UP if carries else step, step + 1):
            state = recorded[at]._replace(estimator=state.estimator)
            batches = jax.block_until_ready(setting.batches(at))
            began = time.perf_counter()
            state, info = jax.block_until_ready(program.step(setting.pretrained, jnp.float32(anchor), state, *batches))
            if name is not None:
                seconds[name].append(time.perf_counter() - began)
        return _flat(state.estimator[1]), info

    where = {"part": "points", "anchor": anchor, "step": step}
    wanted, info = hypergradient(reference)
    rows: Rows = [
        {**where, "estimator": "reference", "quantity": quantity, "value": float(info[quantity])}
        for quantity in ("damped_residual", "residual")
    ]
    found_by = {name: hypergradient(program, name) for name, program in programs.items()}
    term = found_by[direct][0]
    for name, (found, info) in found_by.items():
        measured = {"cosine": _cosine(found, wanted), "norm ratio": _norm(found) / _norm(wanted)}
        if name != direct:
            measured["response cosine"] = _cosine(found - term, wanted - term)
            measured["response to direct"] = _norm(found - term) / _norm(term)
        if "residual" in info:
            measured["residual"] = float(info["residual"])
        rows += [{**where, "estimator": name, "quantity": q, "value": v} for q, v in measured.items()]
    ratio = _norm(wanted - term) / _norm(term)
    return [*rows, {**where, "estimator": "reference", "quantity": "response to direct", "value": ratio}]


def search_losses(
    setting: Setting, preset: Preset, programs: Mapping[str, Program], seconds: Mapping[str, float], *, unit: str
) -> Rows:
    """Losses after equally many outer steps, and after the seconds that `unit` takes for them."""

    @jax.jit
    def losses(frozen, state):
        loss = setting.problem(frozen, 0.0).outer_loss
        return {name: loss(state.inner.params, state.outer, rows) for name, rows in setting.splits.items()}

    limit = preset.outer_steps * seconds[unit]
    most = setting.num_steps
    anchor = preset.anchors[-1]
    rows: Rows = []
    for name, program in programs.items():
        stops = {"equal steps": preset.outer_steps, "equal seconds": min(most, max(1, int(limit / seconds[name])))}
        for order in range(preset.orders):
            state = program.init_estimator(setting.start)
            for step in range(1, max(stops.values()) + 1):
                batches = setting.batches(step - 1, order)
                state, _ = program.step(setting.pretrained, jnp.float32(anchor), state, *batches)
                for stop in (stop for stop, at in stops.items() if at == step):
                    row = {"part": "search", "estimator": name, "anchor": anchor, "step": step, "order": order}
                    found = losses(setting.pretrained, state)
                    rows += [{**row, "quantity": f"{s} loss, {stop}", "value": float(v)} for s, v in found.items()]
        print(f"searched with {name}", flush=True)
    return rows


def _flat(tree) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def _norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))


def _cosine(x: np.ndarray, y: np.ndarray) -> float:
    norms = _norm(x) * _norm(y)
    return float(x @ y / norms) if norms else float("nan")
