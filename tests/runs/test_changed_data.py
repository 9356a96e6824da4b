"""Files that are corrected after a run, and texts that are too long for one: said at the terminal."""

import json

import pytest
from tiny import words

from agwm_jax.cli import main


@pytest.fixture
def command(settings, tmp_path):
    """A training command on files, whose texts are longer than the model reads."""
    for split in ("train", "validation"):
        rows = [{"text": "the key is here " * (1 + 9 * (i % 4 == 0)), "label": f"l{i % 2}"} for i in range(16)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "task.source": "local",
        "task.files.train": tmp_path / "train.jsonl",
        "task.files.validation": tmp_path / "validation.jsonl",
        "data.max_length": 32,
        "output": tmp_path / "run",
    }
    kept = {name: x for name, x in settings.items() if not name.startswith("task.")}
    return ["train", *words({**kept, **files, "finetune.epochs": 1}, "vanilla")]


@pytest.mark.filterwarnings("always::UserWarning")
def test_a_corrected_file_is_noticed_and_cut_texts_are_told(command, tmp_path, capsys):
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "4 of 16 texts of split train (25%) were cut to 32 tokens" in told
    assert main(command) == 0, "a finished run is not run again"
    predict = ["predict", str(tmp_path / "run"), str(tmp_path / "validation.jsonl"), str(tmp_path / "out.jsonl")]
    capsys.readouterr()
    assert main(predict) == 0
    assert "4 of 16 texts of validation.jsonl (25%) were cut" in capsys.readouterr().err

    train = tmp_path / "train.jsonl"
    before = train.read_text()
    train.write_text(before.replace("l1", "l0", 1))
    result = (tmp_path / "run" / "result.json").read_text()
    assert main(command) == 2
    said = capsys.readouterr().err
    assert [part for part in ("train.jsonl changed since", "another --run.output") if part not in said] == []
    assert (tmp_path / "run" / "result.json").read_text() == result
    train.write_text(before)
    assert main(command) == 0
