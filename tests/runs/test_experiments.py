"""The experiment scripts run on something small, and their tables and figures come from their rows."""

import csv
import json

import jax
import jax.numpy as jnp
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


@pytest.fixture
def benchmark(experiments, monkeypatch, tmp_path):
    """``benchmark(*options) -> (exit status, results, table)`` on a model of two narrow layers."""
    import benchmark as script

    monkeypatch.setitem(script.SHAPES, "minilm", (2, 16, 2, 32))
    monkeypatch.setattr(script, "matrix_product", lambda dtype: (lambda: None, 1000))
    # These halve the time of compiling what runs for milliseconds.
    quickly = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
    monkeypatch.setattr(script, "compiler_options", lambda: quickly)

    def run(*options):
        words = ["--batch", "2", "--length", "8", "--rounds", "2", "--output", str(tmp_path), *options]
        monkeypatch.setattr("sys.argv", ["benchmark", *words])
        status = script.main()
        return status, json.loads((tmp_path / "benchmark.json").read_text()), (tmp_path / "benchmark.md").read_text()

    run.script = script
    return run


def test_a_benchmark_writes_all_of_its_rows(benchmark, monkeypatch):
    # The second compilation of each, that from the cache, is left to the tests with fewer rows.
    compile_step, compiled = benchmark.script.compile_step, {}

    def once(program):
        if program.step not in compiled:
            compiled[program.step] = compile_step(program)
        return compiled[program.step]

    monkeypatch.setattr(benchmark.script, "compile_step", once)
    status, (result,), table = benchmark("--seeds", "2")
    assert status == 0
    assert len(result["rows"]) == 9
    for row in result["rows"]:
        # Counted from the program, and said by the estimator: on so small a model alpha's own products show a little.
        assert row["fb"] == pytest.approx(row["useful_fb"], rel=0.02), row["program"]
        assert row["program"] in table
    assert [result["rows"][0][name] for name in ("ratio", "fb", "bytes_ratio")] == [1, 1, 1]
    assert [row["program"] for row in result["seeds"]] == ["finetune, alpha frozen", "search, unrolled 1"]
    for row in result["seeds"]:
        assert row["fb"] == pytest.approx(row["useful_fb"], rel=0.02)
        (single,) = [one for one in result["rows"] if one["program"] == row["program"]]
        assert row["useful_fb"] == 2 * single["useful_fb"]
        assert row["seconds_per_seed"] == pytest.approx(row["seconds"] / 2)
    assert "plain products (the device is no CUDA device" in result["attention"]


def test_a_benchmark_compiles_at_several_depths(benchmark, monkeypatch):
    programs, depths = benchmark.script.programs, []

    def noting(config, **options):
        depths.append(config.num_hidden_layers)
        return programs(config, **options)

    monkeypatch.setattr(benchmark.script, "programs", noting)
    _, (result,), table = benchmark("--only", "nothing", "--layers", "3", "--compile-layers", "1", "2")
    (row,) = result["rows"]
    assert row["program"] == "plain step"
    assert row["cached_seconds"] < row["trace_seconds"] + row["compile_seconds"]
    assert depths == [3, 1, 2]
    assert list(result["compile"]["plain step"]) == ["1", "2"]
    assert "| trace and compile, s | 1 layers | 2 layers |" in table
    assert result["seeds"] == []


def test_utilisation_is_of_what_has_to_be_computed(experiments):
    """Forward-backward passes from shapes, times what the clock and a matrix product of the same round say."""
    import benchmark
    import numpy as np

    costs = benchmark.Costs(pass_flops=100, matrix_flops=1000)
    # In the second round everything took four times as long: the utilisation was the same.
    assert costs.utilisation(4, np.array([2.0, 8.0]), np.array([1.0, 4.0])) == pytest.approx(0.2)


def test_a_seed_is_held_against_one_alone_in_the_same_round(experiments):
    import benchmark
    import numpy as np
    from benchmark_programs import Program

    costs = benchmark.Costs(pass_flops=100, matrix_flops=1000)
    bench = benchmark.Bench(lambda state: state, 400, 5, 1.0, 2.0, 3.0)
    program = Program(None, None, None, None, None, fb=4.0, single="one")
    seconds = {
        "4 seeds, one": np.array([2.0, 4.0]),
        "one": np.array([1.0, 2.0]),
        benchmark.MATRIX: np.array([1.0, 2.0]),
    }
    row = benchmark.seeds_row(program, "4 seeds, one", 4, bench, seconds, costs)
    assert (row["ratio"], row["ratio_quartiles"], row["seconds_per_seed"]) == (0.5, [0.5, 0.5], 0.75)
    assert (row["utilisation"], row["single_utilisation"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert "| one | 4 | 0.750 | 1.500 | 0.50 (0.50 to 0.50) | 2.0 |" in benchmark._seeds_line(row)


@pytest.mark.parametrize(("free", "runs"), [(1e9, True), (10, False)])
def test_seeds_that_the_memory_does_not_hold_are_not_run(experiments, monkeypatch, free, runs):
    import benchmark
    from benchmark_programs import Program

    def step(state, frozen, data):
        return state + frozen * data, None

    one = Program(step, step, jnp.ones(3), jnp.ones(3), jnp.ones(3), fb=1)
    lanes = jax.vmap(step, (0, None, 0))
    state = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    two = Program(lanes, lanes, state, one.frozen, jnp.ones((2, 3)), fb=2, single="one")
    monkeypatch.setattr(benchmark, "free_bytes", lambda: free)
    costs = benchmark.Costs(pass_flops=1, matrix_flops=1)
    row = benchmark.time_side_by_side({"one": one, "2": two}, {}, "2", 2, 3, costs, lambda: None)
    assert (row["program"], row["seeds"], "lacking" in row) == ("one", 2, not runs)
    assert ("seconds_per_seed" in row) == runs
    assert ("GB are free" in benchmark._seeds_line(row)) == (not runs)


def test_options_of_a_benchmark(experiments, monkeypatch):
    import benchmark

    gpu = benchmark.parse(["--preset", "gpu", "--batch", "16"])
    assert (gpu.device, gpu.shape, gpu.dtype, gpu.batch) == ("gpu", ["bert-base", "bert-large"], "bfloat16", 16)
    assert benchmark.parse([]).seeds == 4
    monkeypatch.setattr("sys.argv", ["benchmark", "--device", "tpu"])
    assert benchmark.main() == 2
