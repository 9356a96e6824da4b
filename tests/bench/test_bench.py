"""The benchmark and comparison scripts run on something small; tables and figures come from their rows."""

import csv
import json
import sys
from pathlib import Path

import pytest

from agwm_jax import AgwmError, hypergrad, linear_solve, load_config
from agwm_jax.bench.benchmark import PLAIN, Costs, time_alone
from agwm_jax.bench.benchmark import markdown as markdown_page
from agwm_jax.bench.figures import write_figures, write_markdown
from agwm_jax.bench.hypergradients import Compared, Preset, model_rows
from agwm_jax.bench.programs import TimedStep, programs, shape
from agwm_jax.bench.scaling import markdown, rows
from agwm_jax.bench.search import read_setting
from agwm_jax.bench.timing import compile_twice
from agwm_jax.models.family import Options
from agwm_jax.runs.build import build

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "runs"))

from tiny import SETTINGS, words, write_checkpoint  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """All of these programs are small."""


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")


def test_a_benchmark_writes_its_rows(experiments, monkeypatch, tmp_path):
    import benchmark

    monkeypatch.setitem(benchmark.SHAPES, "minilm", ("bert", 2, 16, 2, 32))
    monkeypatch.setattr(benchmark, "matrix_product", lambda dtype: (lambda: None, 1000))
    only = ["--only", "plain", "first_order", "--seeds", "0"]
    monkeypatch.setattr(
        "sys.argv", ["benchmark", "--batch", "2", "--length", "8", "--rounds", "2", "--output", str(tmp_path), *only]
    )
    assert benchmark.main() == 0
    (result,) = json.loads((tmp_path / "benchmark.json").read_text())
    table = (tmp_path / "benchmark.md").read_text()
    assert [row["program"] for row in result["rows"]] == ["plain step", "search, first_order"]
    for row in result["rows"]:
        # Counted from the program, and said beside its name: on so small a model alpha's own products show a little.
        assert row["fb"] == pytest.approx(row["useful_fb"], rel=0.02)
        assert row["program"] in table
    assert [result["rows"][0][name] for name in ("ratio", "fb", "bytes_ratio")] == [1, pytest.approx(1, rel=0.02), 1]
    assert "plain products (the device is no CUDA device" in result["attention"]


def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
    of = shape("bert", 2, 16, 2, 32, batch=2, length=8)
    steps = {PLAIN: TimedStep({"name": "vanilla"}, "finetune", 1), "larger": TimedStep({"name": "agwm"}, "finetune", 1)}
    found, costs = programs(of, Options(), steps), Costs(of.pass_flops, lambda: None, 1)
    needs = {name: compile_twice(program).bytes for name, program in found.items()}
    assert needs[PLAIN] < needs["larger"]
    monkeypatch.setattr("agwm_jax.bench.benchmark.free_bytes", lambda: float(needs[PLAIN]))
    rows, _ = time_alone(found, {}, 1, costs)
    by = {row["program"]: row for row in rows}
    assert by[PLAIN]["ratio"] == 1
    assert by["larger"]["lacking"].startswith("not run: it takes 0.")
    assert "not run: it takes" in markdown_page({"setting": "s", "attention": "a", "rows": rows, "seeds": []})
    monkeypatch.setattr("agwm_jax.bench.benchmark.free_bytes", lambda: 0.0)
    with pytest.raises(AgwmError, match=r"plain step: not run: it takes .* take a smaller --batch"):
        time_alone(found, {}, 1, costs)


def test_options_of_a_benchmark(experiments, monkeypatch):
    import benchmark

    gpu = benchmark.parse(["--preset", "gpu", "--batch", "16"])
    assert (gpu.device, gpu.shape, gpu.dtype, gpu.batch) == ("gpu", ["bert-base", "bert-large"], "bfloat16", 16)
    assert benchmark.parse([]).seeds == 4
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "tpu"])
    assert benchmark.main() == 2


def test_hypergradients_are_compared_on_a_real_search(tmp_path):
    settings = {**SETTINGS, "model": write_checkpoint(tmp_path), "method.search.epochs": 6}
    config = load_config(None, words({**settings, "output": tmp_path / "run"}))
    estimators = {"first_order": hypergrad.first_order(), "unrolled": hypergrad.unrolled()}
    reference = hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=5, damping=0.1), curvature="gauss_newton")
    preset = Preset((4,), (1.0,), 5, outer_steps=3, orders=1, searched=("first_order",), terms=(1,))
    found = model_rows(read_setting(config, 12), preset, Compared(estimators, reference, "first_order", "unrolled"))

    def value(part, name, quantity):
        (row,) = [r for r in found if (r["part"], r["estimator"], r["quantity"]) == (part, name, quantity)]
        return row["value"]

    assert value("cost", "first_order", "fb") == pytest.approx(2, rel=0.02)
    assert value("cost", "unrolled", "fb") == pytest.approx(4, rel=0.02)
    assert value("points", "reference", "response to direct") > 0
    assert -1 <= value("points", "unrolled", "cosine") <= 1
    # The direct term alone, in a search of its own, leads elsewhere than alpha that is held.
    losses = [value("search", name, "fitted loss, equal steps") for name in ("first_order", "alpha held")]
    assert losses[0] != losses[1]
    with pytest.raises(AgwmError, match=r"outer steps, 100 are needed: raise method\.search\.epochs"):
        read_setting(config, 100)


def test_the_table_and_the_figures_come_from_the_rows(tmp_path):
    kinds = {"fb": float, "anchor": float, "value": float, "step": int, "order": int, "terms": int}
    with (ROOT / "docs/hypergradient_comparison.csv").open(newline="") as file:
        found = [{k: kinds.get(k, str)(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    table = write_markdown(found, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == table
    assert all(path.stat().st_size > 50_000 for path in write_figures(found, tmp_path))
    page = (ROOT / "docs/hypergradients.md").read_text()
    first = table.split("\n\n")[0].splitlines()
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in first}
    for name in ("unrolled", "neumann 5", "conjugate_gradient 5, GN", "nystrom 10, GN", "penalty 10"):
        fb, seconds, gigabytes = cells[name][:3]
        assert f"| {fb} | {seconds} | {gigabytes} |" in page, name


def test_memory_is_that_of_compiled_shapes_and_falls_with_devices():
    models = {"tiny": shape("bert", 2, 32, 4, 64, batch=8, length=16)}
    meshes = {
        "1": {"data": 1, "model": 1, "fully_sharded": False},
        "8": {"data": 4, "model": 2, "fully_sharded": True},
    }
    alone, shared = rows(models, {"plain": {"name": "vanilla"}}, meshes, Options())
    assert shared.gigabytes < 0.5 * alone.gigabytes
    assert alone.collectives == {}
    assert shared.collectives["all-gather"] > 0
    assert "| tiny, plain |" in markdown([alone, shared])


def test_the_room_of_a_gate(experiments, monkeypatch, tmp_path):
    """Weights that a far too large rate has spoilt: a gate fitted to them moves back towards the pretrained ones."""
    import leverage

    settings = {**SETTINGS, "model": write_checkpoint(tmp_path), "task.validation_size": 80}
    kept = {name: value for name, value in settings.items() if not name.startswith(("method", "finetune"))}
    typed = [word for name, value in kept.items() for word in (f"--{name}", str(value))]
    config = tmp_path / "task.yaml"
    config.write_text("task: {source: agreement}\n")
    own = ["--config", str(config), "--output", str(tmp_path / "out"), "--rates", "0.3", "--seeds", "0", "1"]
    fitting = [
        "--gates",
        "one",
        "kernel",
        "weights",
        "--control-rate",
        "0",
        "--steps",
        "60",
        "--gate-rate",
        "0.1",
        "--gate-batch",
        "16",
    ]
    monkeypatch.setattr("sys.argv", ["leverage", *own, *fitting, *typed])
    assert leverage.main() == 0
    with (tmp_path / "out" / "leverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["gate"]) for row in rows] == [
        (s, g) for s in "01" for g in ("A = 1", "one", "kernel", "weights")
    ]
    for row in rows:
        moved = float(row["mean_gate"])
        assert moved == 1 if row["gate"] in ("A = 1", "weights") else 0 <= moved <= 1
        base = next(float(r["score"]) for r in rows if (r["seed"], r["gate"]) == (row["seed"], "A = 1"))
        assert float(row["gain"]) == pytest.approx(float(row["score"]) - base, abs=1e-4)
        assert row["gate"] != "weights" or float(row["gain"]) == 0  # trained at a rate of 0 they are what they were
    assert sum(float(row["mean_gate"]) for row in rows) / len(rows) < 0.9
    assert "| A = 1 | one | kernel | weights |" in (tmp_path / "out" / "leverage.md").read_text()


def test_a_gate_is_scored_on_texts_that_it_was_not_fitted_on(experiments, monkeypatch, tmp_path):
    import leverage

    fitted, scored = [], []

    class Recorded:
        def rows(self, half):
            fitted.append({*half.tolist()})
            return half

        def fit(self, pretrained, task, data, rows):
            return task, 1.0

        def merge(self, pretrained, task, found):
            return task

    def score(config, prepared, params, rows):
        scored.append({*rows.tolist()})
        return 1.0

    monkeypatch.setattr(leverage, "score", score)
    settings = {**SETTINGS, "model": write_checkpoint(tmp_path), "output": tmp_path / "run"}
    (prepared,) = build(load_config(None, words(settings, "vanilla")))
    leverage.measure(None, prepared, {}, {"gate": Recorded()})
    plain, gated = scored[:2], scored[2:]
    assert sorted(map(len, plain)) == sorted(map(len, gated)) == sorted(map(len, fitted))
    assert [one & other for one, other in zip(fitted, gated, strict=True)] == [set(), set()]
    assert plain[0] | plain[1] == fitted[0] | gated[0] == set(range(len(prepared.draw.encoded["test"]["labels"])))
