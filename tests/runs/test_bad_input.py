"""Bad input at the command line: exit code 2, one clear message on stderr, no traceback, nothing left behind."""

import json
import shutil

import pytest

from agwm_jax.cli import main

ROWS = [{"text": f"key number {i}", "label": i % 2} for i in range(60)]


@pytest.fixture
def case(tmp_path, tiny_checkpoint):
    """A training command that would run, and the files it reads, for a test to spoil."""
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", ROWS)
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    settings = {
        "task.source": "local",
        "task.files.train": tmp_path / "train.jsonl",
        "task.files.validation": tmp_path / "validation.jsonl",
        "model": tmp_path / "model",
        "data.max_length": 40,
        "data.batch_size": 8,
        "output": tmp_path / "run",
    }
    return tmp_path, settings


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def relabel(path, label):
    write_rows(path, [*ROWS[:-1], {**ROWS[-1], "label": label}])


def regression(folder, settings, label):
    settings["task.kind"] = "regression"
    (folder / "train.jsonl").write_text("".join(f'{{"text": "key {i}", "label": {i}.5}}\n' for i in range(60)))
    with (folder / "train.jsonl").open("a") as file:
        file.write(f'{{"text": "key", "label": {label}}}\n')


def pickle_only(folder):
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "pytorch_model.bin").write_bytes(b"never opened")


def without_tokenizer(folder):
    for name in ("vocab.txt", "tokenizer_config.json"):
        (folder / "model" / name).unlink()


CASES = {
    "missing file": (lambda f, s: (f / "train.jsonl").unlink(), ["train.jsonl"]),
    "empty file": (lambda f, s: (f / "train.jsonl").write_text(""), ["train.jsonl", "empty"]),
    "bytes": (lambda f, s: (f / "train.jsonl").write_bytes(b'{"text": "\xff", "label": 0}\n'), ["line 1", "UTF-8"]),
    "column": (lambda f, s: s.update({"task.label_column": "labl"}), ["'labl'", "did you mean 'label'"]),
    "label outside": (
        lambda f, s: (s.update({"task.label_names": "[no, yes]"}), relabel(f / "train.jsonl", 7)),
        ["line 60", "7", "'no', 'yes'"],
    ),
    "one class": (
        lambda f, s: (
            s.update({"task.label_names": "[no, yes]"}),
            write_rows(f / "train.jsonl", [{**row, "label": 0} for row in ROWS]),
        ),
        ["all 60 training rows are of the class 'no'"],
    ),
    "NaN score": (lambda f, s: regression(f, s, "NaN"), ["train.jsonl", "61"]),
    "text score": (lambda f, s: regression(f, s, '"good"'), ["line 61", "'good'"]),
    "train_size": (lambda f, s: s.update({"task.train_size": 60}), ["train_size 60", "51 or less"]),
    "split below a batch": (
        lambda f, s: s.update({"task.train_size": 35}),
        ["validation split of the search has 7 examples", "batch"],
    ),
    "no safetensors": (lambda f, s: pickle_only(f), ["pickle", "safetensors"]),
    "config and weights": (
        lambda f, s: change_json(f / "model" / "config.json", intermediate_size=48, num_hidden_layers=3),
        ["intermediate.dense", "encoder.layer.2"],
    ),
    "model type": (lambda f, s: change_json(f / "model" / "config.json", model_type="t5"), ["'t5'", "bert"]),
    "truncated": (lambda f, s: truncate(f / "model" / "model.safetensors"), ["model.safetensors"]),
    "no tokenizer": (lambda f, s: without_tokenizer(f), ["tokenizer"]),
    "too long": (lambda f, s: s.update({"data.max_length": 64}), ["data.max_length", "64", "40"]),
    "no model": (lambda f, s: s.update({"model": "./nowhere"}), ["nowhere"]),
    "hub model": (lambda f, s: s.update({"model": "bert-base-uncased"}), ["bert-base-uncased", "local folder"]),
    "pattern": (lambda f, s: s.update({"method.mixup.mixed": "nothing"}), ["method.mixup.mixed 'nothing' matches no"]),
    "setting": (
        lambda f, s: s.update({"method.search.epoch": 1}),
        ["method.search.epoch", "did you mean method.search.epochs?"],
    ),
    "output is a file": (lambda f, s: (f / "run").write_text("x"), ["run"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gets_one_clear_message_and_leaves_no_run(case, capsys, name):
    folder, settings = case
    spoil, expected = CASES[name]
    spoil(folder, settings)
    code = main(["train", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])
    message = capsys.readouterr().err
    assert code == 2, message
    assert "Traceback" not in message
    assert [part for part in expected if part not in message] == [], message
    assert not (folder / "run").is_dir()
