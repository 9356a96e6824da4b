"""Fine-tuning in memory: the very path of a run folder, on texts and labels that are at hand."""

import json
import re

import numpy as np
import pytest
from tiny import SETTINGS, words

from agwm_jax import fit, load_pretrained
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS
from agwm_jax.runs.finished import evaluate, export, load_run
from agwm_jax.runs.run import train
from agwm_jax.settings import load_config

FINETUNE = {"epochs": 2, "optimizer": {"learning_rate": 1e-3}}
DATA = {"batch_size": 8, "max_length": 40}


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """With a head of two classes."""
    return load_pretrained(tiny_checkpoint, num_labels=2)


@pytest.fixture(scope="module")
def fitted(model, settings):
    """A run in memory on the data of a run folder, and the config of the latter."""
    config = load_config(
        None, words({**settings, "run.seed": 3, "task.train_size": "null", "task.pool_size": 40}, "vanilla")
    )
    return config, fit(model, "vanilla", config.task.load(), seed=3, finetune=FINETUNE, data=DATA)


def test_it_is_the_run_of_a_folder(fitted, tmp_path):
    config, found = fitted
    config = config.model_copy(update={"run": config.run.model_copy(update={"output": str(tmp_path / "run")})})
    result = train(config, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == found.records
    assert (result["scores"], result["groups"]) == (found.scores, found.groups)
    weights = load_run(tmp_path / "run").model.params
    for path, weight in found.weights.items():
        np.testing.assert_array_equal(weights[path], weight, err_msg=path)


def test_it_predicts_and_is_saved(fitted, tmp_path):
    _, found = fitted
    texts = ["The key is here.", "The keys is here.", "The key is here."]
    predicted = found.predict(texts)
    assert set(predicted.labels) <= {"acceptable", "unacceptable"}
    assert predicted.labels[0] == predicted.labels[2]
    np.testing.assert_allclose(predicted.probabilities.sum(axis=1), 1, rtol=1e-6)
    found.save(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert again.label_names == ("unacceptable", "acceptable")
    np.testing.assert_array_equal(again.params["pooler.kernel"], found.weights["pooler.kernel"])
    with pytest.raises(AgwmError, match=r"text 1 is \('a', 'b'\), expected a text"):
        found.predict(["a", ("a", "b")])


def test_texts_and_labels_of_any_kind(model, tiny_checkpoint):
    texts = [f"the {noun} is {word}" for noun in ("key", "author") for word in ("here", "there", "near", "far")]
    labels = np.array([0, 1] * 4)
    alone = fit(model, METHODS["vanilla"].value(), (texts, labels), finetune=FINETUNE, data=DATA)
    assert alone.scores == {}
    assert set(alone.predict(texts).labels) <= {"0", "1"}
    one = load_pretrained(tiny_checkpoint, num_labels=1)
    pairs = list(zip(texts, reversed(texts), strict=True))
    scores = [float(i) for i in range(8)]
    found = fit(one, "vanilla", {"train": (pairs, scores), "dev": (pairs, scores)}, finetune=FINETUNE, data=DATA)
    assert found.scores["dev"].keys() == {"spearman", "pearson"}
    with pytest.raises(AgwmError, match=r"the model's head has 2 outputs, the task needs 1: .*num_labels=1"):
        fit(model, "vanilla", (texts, scores))
    with pytest.raises(AgwmError, match=r"no method.*vanila|vanila.*vanilla"):
        fit(model, "vanila", (texts, labels))
    with pytest.raises(AgwmError, match="8 texts and 7 labels"):
        fit(model, "vanilla", (texts, labels[:7]))


@pytest.fixture(scope="module")
def scored(settings, tmp_path_factory):
    """A finished regression whose labels are far from 0: its folder, its result and the texts."""
    folder = tmp_path_factory.mktemp("scored")
    rng = np.random.default_rng(0)
    for split, n in (("train", 64), ("validation", 32)):
        first, second = rng.choice(["key", "keys", "author", "authors"], (2, n))
        rows = [
            {"s1": a, "s2": b, "score": 500 + 5.0 * a.startswith("key")}
            for a, b in zip(first.tolist(), second.tolist(), strict=True)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task.source": "local",
        "task.files.train": folder / "train.jsonl",
        "task.files.validation": folder / "validation.jsonl",
        "task.text_columns": "[s1, s2]",
        "task.label_column": "score",
        "task.kind": "regression",
        "finetune.epochs": 20,
        "finetune.optimizer.learning_rate": 1e-2,
        "output": folder / "run",
    }
    kept = {name: x for name, x in settings.items() if not name.startswith("task.")}
    config = load_config(None, words({**kept, **task}, "vanilla"))
    return folder / "run", train(config, progress=False)


def test_scores_are_learnt_in_their_own_unit(scored, tmp_path):
    folder, result = scored
    assert result["metric"] == "spearman"
    assert result["score"] > 0.5
    assert result["label_scale"]["mean"] == pytest.approx(502.5, abs=1)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] < 5, "of standardised labels, not of 500 squared"
    run = load_run(folder)
    pairs = [("key", "author"), ("author", "key")]
    predicted = run.model.predict(pairs)
    assert predicted.probabilities is None
    assert predicted.labels[0] - predicted.labels[1] > 1
    assert all(490 < label < 515 for label in predicted.labels)
    assert evaluate(folder)["scores"] == pytest.approx(result["scores"]["validation"])
    # The exported head gives the user's unit by itself, and can be trained on from there.
    export(folder, tmp_path / "export")
    exported = load_pretrained(tmp_path / "export")
    plain = run.model._replace(pretrained=exported, params=exported.params, scale=None)
    np.testing.assert_allclose(plain.predict(pairs).labels, predicted.labels, rtol=1e-5)
    first = fit(exported, "vanilla", (pairs * 4, predicted.labels * 4), data=DATA).records[0]
    assert first["loss"] < 1, "a head that fits already is put into the unit of training"


def test_the_page_shows_what_works(tiny_checkpoint, tmp_path, monkeypatch, request, capsys):
    (code,) = re.findall(r"```py\n(.*?)```", (request.config.rootpath / "docs/library.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("minilm", str(tiny_checkpoint)), {})
    assert re.match(r"[01]\.\d+ \['(good|bad)'\]", capsys.readouterr().out)
    assert load_pretrained(tmp_path / "my-model").label_names == ("bad", "good")


def test_sections_are_those_of_a_config(model):
    with pytest.raises(AgwmError, match=r"finetune\.epoch"):
        fit(model, "vanilla", (["a", "b"], [0, 1]), finetune={"epoch": 2})
    assert SETTINGS["data.batch_size"] == DATA["batch_size"]
