"""Alpha fitted on a labelled file of the user's own, from the command line."""

import json

import pytest
from tiny import words

from agwm_jax.cli import main
from agwm_jax.runs.build import build, files_read
from agwm_jax.settings import load_config


def table(labels, number: int, *, column: str = "label") -> str:
    rows = [f"the key is here {index},{labels[index % len(labels)]}\n" for index in range(number)]
    return f"text,{column}\n" + "".join(rows)


@pytest.fixture
def files(settings, tmp_path, monkeypatch):
    """Settings of a run on CSV files; the validation file is said relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.csv").write_text(table("ab", 16))
    (tmp_path / "clean.csv").write_text(table("ba", 9))
    (tmp_path / "held_out.csv").write_text(table("ab", 12))
    kept = {name: x for name, x in settings.items() if not name.startswith("task.")}
    return {
        **kept,
        "task.source": "local",
        "task.files.train": tmp_path / "train.csv",
        "task.files.validation": tmp_path / "held_out.csv",
        "method.search.validation": "clean.csv",
        "method.search.epochs": 1,
        "method.estimator": "first_order",
        "method.mixup.gate": "layer",
        "finetune.epochs": 1,
        "output": tmp_path / "run",
    }


@pytest.mark.parametrize("when", ["during", "after"])
def test_a_run_reads_the_file_and_notices_a_change(files, tmp_path, when, capsys):
    command = ["train", *words({**files, "method.search.when": when})]
    config = load_config(None, command[1:])
    path = str(tmp_path / "clean.csv")
    assert config.method.search.validation == path
    assert files_read(config) == (path,)
    (prepared,) = build(config)
    assert prepared.rows == {path: range(16, 25)}
    phases = {phase.name: phase.plan for phase in prepared.method.phases}
    fitted = phases["search"]["outer"] if when == "after" else phases["search-0"]["outer"]
    trained = phases["weights"]["train"] if when == "after" else phases["search-0"]["inner"]
    assert {row for row in fitted.ravel().tolist() if row >= 0} <= set(range(16, 25))
    assert {row for row in trained.ravel().tolist() if row >= 0} == set(range(16))

    assert main(command) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["num_parameters"]["alpha"] == 3  # two layers and the pooler
    capsys.readouterr()
    (tmp_path / "clean.csv").write_text(table("bb", 9))
    assert main(command) == 2
    assert "clean.csv changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (table("ab", 9, column="class"), ["clean.csv", "label", "class"]),
        (table("ac", 9), ["clean.csv", "'c'"]),
        (table("ab", 3), ["validation split of the search has 3 examples, fewer than one batch of 8"]),
        (None, ["clean.csv"]),
    ],
)
def test_a_file_that_does_not_serve_is_one_sentence(files, tmp_path, text, said, capsys):
    path = tmp_path / "clean.csv"
    path.unlink() if text is None else path.write_text(text)
    assert main(["train", *words(files)]) == 2
    told = capsys.readouterr().err
    assert [part for part in said if part not in told] == []
    assert "Traceback" not in told
