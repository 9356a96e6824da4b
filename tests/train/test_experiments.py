"""The experiment scripts run on something small, and their tables and figures come from their rows."""

import csv
import json

import pytest

from agwm_jax import hypergrad


@pytest.fixture
def experiments(request, monkeypatch):
    monkeypatch.syspath_prepend(request.config.rootpath / "experiments")


def test_hypergradients_are_compared_on_a_real_search(experiments, monkeypatch, configure):
    import hypergradient_comparison as script

    found = {
        "first_order": hypergrad.first_order(),
        "unrolled": hypergrad.unrolled(),
        "penalty": hypergrad.penalty(weight=10.0),
    }
    monkeypatch.setattr(script, "estimators", lambda terms, learning_rate: found)
    preset = script.Preset((4,), (1.0,), 5, outer_steps=3, orders=1, searched=("first_order",), terms=(1,))
    rows = script.model_rows(script.read_setting(configure("--search.epochs", "6"), 12), preset)

    def value(part, name, quantity):
        (row,) = [r for r in rows if (r["part"], r["estimator"], r["quantity"]) == (part, name, quantity)]
        return row["value"]

    assert value("cost", "first_order", "fb") == pytest.approx(2, rel=0.02)
    assert value("cost", "unrolled", "fb") == pytest.approx(4, rel=0.02)
    assert value("points", "reference", "response to direct") > 0
    assert -1 <= value("points", "unrolled", "cosine") <= 1
    # One estimator, one order: the first is its own direct term, and alpha that is held gives another loss.
    assert value("search", "first_order", "fitted loss, equal steps") != value(
        "search", "alpha held", "fitted loss, equal steps"
    )
    with pytest.raises(script.AgwmError, match=r"the search has 24 outer steps, 100 are needed: raise search\.epochs"):
        script.read_setting(configure("--search.epochs", "6"), 100)


def test_the_table_and_the_figures_come_from_the_rows(experiments, request, tmp_path):
    from hypergradient_figures import write_figures, write_markdown

    kinds = {"fb": float, "anchor": float, "value": float, "step": int, "order": int, "terms": int}
    with (request.config.rootpath / "docs/hypergradient_comparison.csv").open(newline="") as file:
        rows = [{k: kinds.get(k, str)(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    table = write_markdown(rows, tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text() == table
    assert all(path.stat().st_size > 50_000 for path in write_figures(rows, tmp_path))
    # The README quotes this table: seconds, and the response's cosine at either anchor.
    cells = {
        line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]]
        for line in table.split("\n\n")[0].splitlines()
    }
    readme = (request.config.rootpath / "README.md").read_text()
    for name in ("unrolled", "neumann 5", "conjugate_gradient 5, GN", "nystrom 10, GN", "penalty 10"):
        fb, seconds, gigabytes = cells[name][:3]
        assert f"| {fb} | {seconds} | {gigabytes} |" in readme, name


def test_a_benchmark_writes_its_rows(experiments, monkeypatch, tmp_path):
    import benchmark

    monkeypatch.setitem(benchmark.SHAPES, "minilm", (2, 16, 2, 32))
    options = ["--batch", "2", "--length", "8", "--rounds", "2", "--only", "first_order", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmark", *options])
    assert benchmark.main() == 0
    plain, search = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert (plain["ratio"], plain["fb"]) == (1, 1)
    assert search["fb"] == pytest.approx(2, rel=0.02)
    assert "search, first_order" in (tmp_path / "benchmark.md").read_text()
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "tpu"])
    assert benchmark.main() == 2
