"""A whole comparison of one file by real processes: what it says, writes, goes on with and refuses."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agwm_jax import AgwmError, load_exported, predict
from agwm_jax.cli import main
from agwm_jax.data.agreement import agreement_task
from agwm_jax.selection.compare import MODEL, compare
from agwm_jax.selection.rounds import RUNS

ROWS, FOLDS = 48, 3
WORDS = ("--model.unroll_layers", "1", "--data.max_length", "40", "--data.batch_size", "8")
ENOUGH = ["text,label", *(f"the text {row},{'ab'[row % 2]}" for row in range(12))]
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Tickets with a class whose name is hostile."""
    path = tmp_path_factory.mktemp("data") / "tickets.csv"
    split = agreement_task(train_size=ROWS).splits["train"]
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "body", "queue"])
        for row, (text, label) in enumerate(zip(split["text"], split["label"], strict=True)):
            writer.writerow([f"T-{row}", f"{text} <b>&" if row == 0 else text, ["fine", HOSTILE][label]])
    return path


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def found(file, tiny_checkpoint, tmp_path_factory, told):
    """``(comparison, output)`` of two methods in too little time for more than one rate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        output = tmp_path_factory.mktemp("compared") / "out"
        return run(file, tiny_checkpoint, output, told), output


def run(file, checkpoint, output, told, **options):
    given = {"methods": ("probe", "vanilla"), "folds": FOLDS, "budget": 1.0, "settings": WORDS}
    return compare(file, str(checkpoint), output=output, tell=told.append, **(given | options))


def test_every_text_is_held_out_once_and_scored_by_what_did_not_see_it(found, file):
    comparison, output = found
    assert sorted(comparison.rows) == list(range(ROWS))
    assert (comparison.columns.text, comparison.columns.label) == (("body",), "queue")
    assert {each.method for each in comparison.scored} == {"probe", "vanilla"}
    labels = np.asarray(comparison.task.splits["train"]["label"])
    for each in comparison.scored:
        assert each.scores["accuracy"] == pytest.approx(np.mean(each.logits.argmax(1) == labels[comparison.rows]))
        cells = sorted((output / RUNS / "tickets" / each.method).glob("*/seed-*/result.json"))
        assert len(cells) == FOLDS
        by_fold = [json.loads(cell.read_text())["scores"]["validation"]["accuracy"] for cell in cells]
        assert each.by_fold == pytest.approx(by_fold)
        assert {json.loads(cell.read_text())["train_size"] for cell in cells} == {ROWS - ROWS // FOLDS}


def test_what_was_left_out_for_want_of_time_is_said(found, told):
    comparison, _ = found
    assert any("too short for other learning rates" in note for note in comparison.notes)
    assert any("texts in body, labels in queue (classification)" in line for line in told)
    assert comparison.sentences[0].startswith(f"Take {comparison.recommended.method}: accuracy ")


def test_the_model_is_read_anywhere_and_gives_calibrated_probabilities(found, file, tmp_path):
    comparison, output = found
    texts = comparison.task.splits["train"]["text"][:5]
    ours = comparison.model.predict(texts)
    again = predict(output / MODEL, texts)
    assert again.labels == ours.labels
    np.testing.assert_allclose(again.probabilities, ours.probabilities, atol=1e-5)
    exported = load_exported(output / MODEL)
    assert exported.temperature == comparison.calibration.temperature != 1
    plain = exported._replace(temperature=1.0).predict(texts).probabilities
    sharpened = plain ** (1 / exported.temperature)
    np.testing.assert_allclose(again.probabilities, sharpened / sharpened.sum(1, keepdims=True), atol=1e-5)

    assert main(["predict", str(output / MODEL), str(file), str(tmp_path / "labelled.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "labelled.csv").read_text().splitlines()))
    assert [row["prediction"] for row in rows[:5]] == again.labels
    assert [row["id"] for row in rows] == [f"T-{row}" for row in range(ROWS)]
    other = tmp_path / "other.csv"
    other.write_text("id;body\nT-0;One text.\n")
    assert main(["predict", str(output / MODEL), str(other), str(tmp_path / "a.csv"), "--separator", ";"]) == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 2
    for name in ("model.safetensors", "config.json", "README.md", "training.yaml", "agwm.json"):
        assert (output / MODEL / name).stat().st_mode & 0o077 == (output / MODEL / "config.json").stat().st_mode & 0o077
    assert json.loads((output / MODEL / "tokenizer_config.json").read_text())["model_max_length"] == 40


def test_the_pages_say_it_and_nothing_in_the_data_becomes_html(found):
    comparison, output = found
    page = (output / "report.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1
    assert "http" not in page.replace("http://www.w3.org", "")
    card, report = (output / MODEL / "README.md").read_text(), (output / "report.md").read_text()
    for text in (card, report):
        assert comparison.sentences[0] in text
        assert comparison.findings[0] in text
    answer = json.loads((output / "compare.json").read_text())
    assert answer["recommended"]["method"] == comparison.recommended.method
    assert set(answer["methods"]) == {"probe", "vanilla"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_a_browser_runs_the_page_without_an_error(found, tmp_path):
    _, output = found
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    page = f"file://{output / 'report.html'}"
    done = subprocess.run(
        [*command, "--enable-logging=stderr", "--dump-dom", page], capture_output=True, text=True, timeout=300
    )
    assert "CONSOLE" not in done.stderr
    assert "<button>recall</button>" in done.stdout  # the heads of tables sort them
    assert "<script>alert" not in done.stdout


def test_the_same_call_trains_nothing_anew(found, file, tiny_checkpoint, monkeypatch):
    comparison, output = found
    monkeypatch.setattr("agwm_jax.runs.sweep._run", None)
    monkeypatch.setattr("agwm_jax.selection.compare.fit", None)
    told = []
    again = run(file, tiny_checkpoint, output, told)
    assert (again.sentences, again.recommended.scores) == (comparison.sentences, comparison.recommended.scores)
    assert told[-1] == f"model: {output / MODEL} (as it was)"


def test_an_edited_file_and_a_folder_of_something_else_are_refused(found, file, tiny_checkpoint, tmp_path):
    _, output = found
    before = file.read_text()
    try:
        file.write_text(before.replace("T-3,", "T-3b,"))
        with pytest.raises(AgwmError, match=r"is finished, and .*tickets\.csv changed since"):
            run(file, tiny_checkpoint, output, [])
    finally:
        file.write_text(before)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(AgwmError, match="is not empty and holds no comparison"):
        run(file, tiny_checkpoint, tmp_path, [])
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"


def test_pairs_with_scores_in_memory_and_a_test_file(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    split = agreement_task(train_size=40).splits["train"]
    pairs = list(zip(split["text"], split["text"][::-1], strict=True))
    scores = [len(first) / 10 - len(second) / 20 for first, second in pairs]
    test = tmp_path / "test.jsonl"
    rows = [{"text": a, "text_pair": b, "label": score} for (a, b), score in zip(pairs, scores, strict=True)]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"methods": ("probe",), "folds": 2, "budget": None, "test": test, "settings": WORDS[:4]}
    comparison = run((pairs, scores), tiny_checkpoint, tmp_path / "out", [], **options)
    assert (comparison.columns.kind, comparison.columns.text) == ("regression", ("text", "text_pair"))
    assert comparison.calibration is None
    assert comparison.notes == []
    predicted = comparison.model.predict(pairs).labels
    order = [np.argsort(np.argsort(x)) for x in (predicted, scores)]
    assert comparison.test_scores["spearman"] == pytest.approx(np.corrcoef(order)[0, 1], abs=0.02)  # but for ties
    np.testing.assert_allclose(predict(tmp_path / "out" / MODEL, pairs).labels, predicted, atol=1e-4)
    assert "Final model on the test file: spearman" in (tmp_path / "out" / "report.md").read_text()


def test_a_method_that_cannot_be_trained_says_why_and_the_others_go_on(file, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    told = []
    comparison = run(file, tiny_checkpoint, tmp_path / "out", told, methods=("probe", "top_k"), folds=2)
    assert comparison.recommended.method == "probe"
    (why,) = (note for note in comparison.notes if "failed" in note)
    assert re.fullmatch(r"top_k failed at \d+ times its rate: top_k\.k: got 3 layers, and the model has 2: .*", why)
    assert why in told


def test_another_comparison_does_not_take_its_place(found, file, tiny_checkpoint):
    _, output = found
    with pytest.raises(AgwmError, match=r"holds a run of another config .*data.batch_size"):
        run(file, tiny_checkpoint, output, [], settings=(*WORDS, "--data.batch_size", "4"))
    with pytest.raises(AgwmError, match=r"holds another comparison .* choose another --output"):
        run(file, tiny_checkpoint, output, [], folds=4)


@pytest.mark.parametrize(
    ("rows", "options", "sentence"),
    [
        (["text,label", "one two,a", "three four,b"], {}, "has 2 different texts, which 3 folds cannot share"),
        (["text,label", "one two,a", "three four,a", "five six,a"], {}, "are of the class 'a'"),
        (["text,label", "one two,a", "three four,b"], {"group": "author"}, "no column 'author'"),
        (["text,label", "one two,a", "three four,b"], {"test": "none.csv"}, "no file .*none.csv"),
        (["text,label", "one two,a", "three four,b"], {"methods": ("vanila",)}, "vanilla"),
        (
            ENOUGH,
            {"methods": ("probe", "wise_ft")},
            "wise_ft reads a development split, which the folds of one file lack",
        ),
        (ENOUGH, {"settings": ("--finetune.epoch", "2")}, "finetune.epochs"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(rows, options, sentence, tiny_checkpoint, tmp_path):
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(AgwmError, match=sentence):
        run(tmp_path / "data.csv", tiny_checkpoint, tmp_path / "out", [], **options)
    assert not (tmp_path / "out" / RUNS).exists()


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(AgwmError, match="is no run folder"):
        predict(tmp_path, ["a text"])
    (tmp_path / "agwm.json").write_text("{}")
    with pytest.raises(AgwmError, match=r"agwm.json cannot be read .*: export the model again"):
        load_exported(tmp_path)
    (tmp_path / "agwm.json").write_text('{"format": 2}')
    with pytest.raises(AgwmError, match="has format 2, this version of agwm_jax reads 1: install a newer one"):
        load_exported(tmp_path)
