"""Every estimator of the hypergradient against exact answers, and against a converged solve on a real model.

    python experiments/hypergradients.py --data FOLDER --output runs/hypergradients

1. Analytic problems in float64: relative error of the hypergradient against cost.
2. The model of the config, along a recorded search for every anchor: cosine, norm and response of each estimator's
   hypergradient against a reference (conjugate gradients on the damped Gauss-Newton system of the same batch), seconds
   and memory; then the loss of the validation split, on which alpha is fitted, and of the development split, which
   nothing is fitted on, after equally many outer steps and after equal seconds.

Writes comparison.csv, comparison.md and the figures frontier.png and cosine.png.
"""

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from agwm_jax import AgwmError, hypergrad, linear_solve, load_config
from agwm_jax.bench.analytic import Analytic, Curve, analytic_rows
from agwm_jax.bench.figures import write_figures, write_markdown
from agwm_jax.bench.hypergradients import Compared, Preset, model_rows
from agwm_jax.bench.search import read_setting

PRESETS = {
    "default": Preset(
        points=(10, 30),
        anchors=(0.0, 1.0),
        reference_steps=30,
        outer_steps=20,
        orders=1,
        searched=("first_order", "unrolled", "finite_difference, SAMA", "penalty 10", "conjugate_gradient 5, GN"),
        terms=(5,),
    ),
    "full": Preset(
        points=tuple(range(5, 45, 5)),
        anchors=(0.0, 0.1, 1.0),
        reference_steps=200,
        outer_steps=40,
        orders=5,
        searched=None,
        terms=(1, 3, 5, 10, 20),
    ),
}
DAMPING = 0.1  # of the reference; the largest eigenvalue is about 100
SOLVER_DAMPING = 1.0  # of the conjugate gradients that are compared with it, which have few steps
TERMS = (1, 2, 5, 10, 20, 50, 100)  # of the analytic problems


def curves(case: Analytic) -> Iterator[Curve]:
    """What is compared on a problem; costs are those of the docstrings, to which tests/core/test_cost.py holds them."""
    implicit, eta = hypergrad.implicit, case.step_size
    yield "first_order", 1, 1, [hypergrad.first_order()]
    yield "finite_difference", 1, 3, [hypergrad.finite_difference(radius=1e-3, step_size=eta)]
    for weight in (1, 10, 100, 1000):
        yield "penalty", weight, 5, [hypergrad.penalty(weight=weight)]
    for k in TERMS:
        yield "unrolled", k, 2 * k + 1, [hypergrad.unrolled(num_steps=k)]
        series = linear_solve.neumann(num_terms=k, step_size=eta)
        yield "neumann", k, 2 * k + 2, [implicit(series)]
        yield "neumann, differences", k, k + 2, [implicit(series, hvp="finite_difference")]
        yield "conjugate_gradient", k, 2 * k + 4, [implicit(linear_solve.conjugate_gradient(num_steps=k))]
    for rank in (rank for rank in TERMS if rank <= case.rank):
        sketches = [linear_solve.nystrom(rank=rank, rho=0.1 / eta, seed=seed) for seed in range(3)]
        yield "nystrom", rank, 2 * rank + 4, [implicit(sketch) for sketch in sketches]


def compared(preset: Preset, learning_rate: float) -> Compared:
    """The estimators of the comparison on the real model, by the name in tables and figures."""
    terms = preset.terms
    implicit, auto = hypergrad.implicit, "auto"
    found = {
        "first_order": hypergrad.first_order(),
        "unrolled": hypergrad.unrolled(),
        "unrolled, differences": hypergrad.unrolled(hvp="finite_difference"),
        f"finite_difference, {learning_rate:g} v (DARTS)": hypergrad.finite_difference(step_size=learning_rate),
        "finite_difference, v": hypergrad.finite_difference(),
        "finite_difference, SAMA": hypergrad.finite_difference(precondition="adjoint"),
        "penalty 10": hypergrad.penalty(weight=10.0),
        "gradient_descent 1, GN": implicit(linear_solve.gradient_descent(step_size=auto), curvature="gauss_newton"),
    }
    for k in terms:
        series = linear_solve.neumann(num_terms=k, step_size=auto)
        gradients = linear_solve.conjugate_gradient(num_steps=k, damping=SOLVER_DAMPING)
        found |= {
            f"neumann {k}": implicit(series),
            f"neumann {k}, GN": implicit(series, curvature="gauss_newton"),
            f"conjugate_gradient {k}, GN": implicit(gradients, curvature="gauss_newton"),
        }
    sketch = linear_solve.nystrom(rank=2 * max(terms), rho=10.0)
    found |= {f"nystrom {2 * max(terms)}, GN": implicit(sketch, curvature="gauss_newton")}
    reference = linear_solve.conjugate_gradient(num_steps=preset.reference_steps, damping=DAMPING)
    return Compared(found, implicit(reference, curvature="gauss_newton"), direct="first_order", unit="unrolled")


COLUMNS = ("part", "problem", "estimator", "terms", "fb", "anchor", "step", "order", "quantity", "value")


def main() -> int:
    """Measure, then write the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path(__file__).parents[1] / "configs/stsb_300.yaml")
    parser.add_argument(
        "--data", type=Path, help="folder with train.jsonl and validation.jsonl (default: as the config)"
    )
    parser.add_argument("--preset", choices=PRESETS, default="default", help="full is for a GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/hypergradients"))
    arguments, overrides = parser.parse_known_args()
    data = arguments.data
    files = (
        [w for s in ("train", "validation") for w in (f"--task.files.{s}", str(data / f"{s}.jsonl"))] if data else []
    )
    began = time.perf_counter()
    try:
        config = load_config(
            arguments.config, ["--data.max_length", "32", "--method.search.epochs", "3", *files, *overrides]
        )
        preset = PRESETS[arguments.preset]
        setting = read_setting(config, max(*preset.points, preset.outer_steps) + 1)
        arguments.output.mkdir(parents=True, exist_ok=True)
        rows = analytic_rows(curves, hypergrad.implicit(linear_solve.dense()))
        print(f"analytic problems: {time.perf_counter() - began:.0f} s", flush=True)
        rows += model_rows(setting, preset, compared(preset, setting.learning_rate))
    except AgwmError as error:
        print(f"hypergradients: {error}", file=sys.stderr)
        return 2
    with (arguments.output / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    report = write_markdown(rows, arguments.output / "comparison.md")
    figures = write_figures(rows, arguments.output)
    print(f"\n{report}\n{time.perf_counter() - began:.0f} s on {jax.device_count()} x {jax.devices()[0].device_kind}")
    print("Written:", *(f"  {path}" for path in (arguments.output / "comparison.csv", *figures)), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
