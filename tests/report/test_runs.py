"""Run folders: which are found, which are refused and which are compared."""

import json

import pytest

from agwm_jax.errors import AgwmError
from agwm_jax.report.comparisons import collect
from agwm_jax.report.runs import read_records, read_run


def test_found_at_any_depth_and_once(write_run, tmp_path):
    write_run("vanilla", 0, root=tmp_path / "a" / "b")
    write_run("vanilla", 1, root=tmp_path / "a")
    (comparison,) = collect([tmp_path, tmp_path / "a", tmp_path / "a" / "b" / "agreement-vanilla-0"]).comparisons
    assert [run.seed for run in comparison.methods["vanilla"]] == [0, 1]


def test_no_runs(tmp_path):
    with pytest.raises(AgwmError, match=r"No run folder found .*config\.yaml"):
        collect([tmp_path])
    with pytest.raises(AgwmError, match="nowhere is not a folder"):
        collect([tmp_path / "nowhere"])


def test_unfinished_runs_are_listed_and_not_counted(write_run, tmp_path):
    write_run("vanilla", 0)
    folder = write_run("vanilla", 1, finished=False)
    (folder / "metrics.jsonl").write_text('{"phase": "finetune", "st')  # it may be writing this line right now
    collection = collect([tmp_path])
    assert [run.folder for run in collection.unfinished] == [folder]
    assert len(collection.comparisons[0].methods["vanilla"]) == 1


def test_only_unfinished_runs(write_run, tmp_path):
    write_run("vanilla", 1, finished=False)
    with pytest.raises(AgwmError, match=r"None of the 1 runs found is finished .*continues where it stopped"):
        collect([tmp_path])


def test_corrupt_result_names_file_and_line(write_run, tmp_path):
    folder = write_run("vanilla", 0)
    (folder / "result.json").write_text('{\n  "score": 0.5,\n  "seed": \n')
    with pytest.raises(AgwmError, match=r"result\.json, line 4, column 1: not valid JSON"):
        collect([tmp_path])
    (folder / "result.json").write_text("[1]")
    with pytest.raises(AgwmError, match=r"result\.json holds a list"):
        collect([tmp_path])
    (folder / "result.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(AgwmError, match=r"result\.json cannot be read"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"phase": "finetune", "step": 0}\n{"phase": "fine', r"metrics\.jsonl, line 2, column 11: not valid JSON"),
        ('\n{"phase": "finetune"}\n', r"metrics\.jsonl, line 2: an object with `phase`"),
    ],
)
def test_corrupt_metrics_name_file_and_line(write_run, content, message):
    folder = write_run("vanilla", 0)
    (folder / "metrics.jsonl").write_text(content)
    run = read_run(folder)
    assert run is not None
    with pytest.raises(AgwmError, match=message):
        read_records(run)


def test_corrupt_config_names_file_and_line(write_run, tmp_path):
    folder = write_run("vanilla", 0)
    (folder / "config.yaml").write_text("method:\n  name: [vanilla\ntask: {}\n")
    with pytest.raises(AgwmError, match=r"config\.yaml, line \d+ cannot be read as YAML"):
        collect([tmp_path])


def test_a_config_of_something_else_is_left_out_with_a_word(write_run, tmp_path):
    write_run("vanilla", 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("colour: red\n")
    collection = collect([tmp_path])
    assert [warning.name for warning in collection.warnings] == ["not_a_run"]
    assert len(collection.comparisons) == 1


def test_a_run_without_a_finite_score_counts_in_no_mean(write_run, tmp_path):
    write_run("vanilla", 0, 0.7)
    write_run("vanilla", 1, result={"score": None})
    collection = collect([tmp_path])
    assert [warning.name for warning in collection.warnings] == ["score_not_finite"]
    assert len(collection.comparisons[0].methods["vanilla"]) == 1


def test_a_repeated_seed_counts_once(write_run, tmp_path):
    write_run("vanilla", 0, 0.7, name="first")
    write_run("vanilla", 0, 0.7, name="second")
    collection = collect([tmp_path])
    assert [warning.name for warning in collection.warnings] == ["repeated_run"]
    assert len(collection.comparisons[0].methods["vanilla"]) == 1


def test_resumed_steps_count_once_and_phases_stay_in_the_order_in_which_they_began(write_run):
    folder = write_run("agwm", 0)
    lines = [
        ("search-2", 0, 4.0),
        ("search-10", 0, 1.0),
        ("search-2", 1, 3.0),
        ("finetune", 0, 2.0),
        ("search-2", 1, 5.0),
    ]
    text = "".join(json.dumps({"phase": phase, "step": step, "loss": loss}) + "\n" for phase, step, loss in lines)
    (folder / "metrics.jsonl").write_text(text)
    assert [record["loss"] for record in read_records(read_run(folder))] == [4.0, 5.0, 1.0, 2.0]


def test_comparisons_by_task_size_and_shared_settings(write_run, tmp_path):
    write_run("vanilla", 0)
    write_run("vanilla", 0, task="rte")
    write_run("vanilla", 0, name="big", train_size=1000)
    write_run("vanilla", 0, name="mean", settings={"model": {"pooling": "mean"}})
    titles = sorted(each.title for each in collect([tmp_path]).comparisons)
    assert titles == [
        "agreement, minilm, 1000 training examples",
        "agreement, minilm, 300 training examples (model.pooling = absent)",
        "agreement, minilm, 300 training examples (model.pooling = mean)",
        "rte, minilm, 300 training examples",
    ]
    assert len({each.slug for each in collect([tmp_path]).comparisons}) == 4


def test_variants_of_a_method_stand_side_by_side(write_run, tmp_path):
    write_run("vanilla", 0)
    write_run("agwm", 0)
    write_run("agwm", 0, name="r8", settings={"method": {"mixup": {"rank": 8}}})
    (comparison,) = collect([tmp_path]).comparisons
    assert list(comparison.methods) == ["vanilla", "agwm (rank = 1)", "agwm (rank = 8)"]
    assert comparison.rival("agwm (rank = 8)") == "vanilla"


def test_finetune_settings_choose_the_baseline_and_are_told(write_run, tmp_path):
    write_run("vanilla", 0)
    write_run("agwm", 0, settings={"finetune": {"epochs": 6}})
    (comparison,) = collect([tmp_path]).comparisons
    assert comparison.rival("agwm") == "vanilla"
    assert comparison.differing == {"finetune.epochs": {"vanilla": "3", "agwm": "6"}}
    write_run("vanilla", 0, name="v6", settings={"finetune": {"epochs": 6}})
    (comparison,) = collect([tmp_path]).comparisons
    assert comparison.rival("agwm") == "vanilla (epochs = 6)"
    write_run("agwm", 0, name="a9", settings={"finetune": {"epochs": 9}})
    (comparison,) = collect([tmp_path]).comparisons
    assert comparison.rival("agwm (epochs = 9)") is None


def test_any_method_may_be_the_baseline(write_run, tmp_path):
    for method in ("vanilla", "agwm"):
        write_run(method, 0)
    (comparison,) = collect([tmp_path], baseline="agwm").comparisons
    assert list(comparison.methods) == ["agwm", "vanilla"]
    assert comparison.rival("vanilla") == "agwm"


def test_a_run_of_version_0_3_is_left_out_with_a_word(write_run, tmp_path):
    write_run("vanilla", 0)
    write_run("vanilla", 1, settings={"mixup": {"rank": 1}, "search": {"anchor": 0.0}})
    collection = collect([tmp_path])
    assert [warning.name for warning in collection.warnings] == ["run_of_another_version"]
    assert [run.seed for run in collection.comparisons[0].methods["vanilla"]] == [0]
    with pytest.raises(AgwmError, match=r"vanilla-1 is a run of version 0\.3 .*mixup"):
        collect([tmp_path / "runs" / "agreement-vanilla-1"])
