"""Whole runs of the methods that fit a head, average with the start, or train nothing; what is made of them later."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny import words

from agwm_jax import fit, load_pretrained
from agwm_jax.errors import AgwmError
from agwm_jax.runs.build import build
from agwm_jax.runs.finished import evaluate, export, load_run
from agwm_jax.runs.run import train
from agwm_jax.settings import load_config

FINETUNE = {"epochs": 2, "optimizer": {"learning_rate": 1e-3}}
DATA = {"batch_size": 8, "max_length": 40}
NOUNS, PLACES = ("key", "author", "cabinet", "table"), ("here", "there", "near", "far", "old", "new")
TEXTS = [f"the {noun} is {place}" for noun in NOUNS for place in PLACES]
LABELS = [int(text.startswith(("the key", "the author"))) for text in TEXTS]
PAIRS = [(f"the {noun}", f"the {place} {noun}") for noun in NOUNS for place in PLACES]
SCORES = [float(5 + i % 7) for i in range(len(PAIRS))]


@pytest.fixture(scope="module")
def scorer(tiny_checkpoint):
    """With one output, and the mean over the tokens as features."""
    return load_pretrained(tiny_checkpoint, num_labels=1, pooling="mean")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """With a head of two classes."""
    return load_pretrained(tiny_checkpoint, num_labels=2, pooling="mean")


def phases(records):
    return list(dict.fromkeys(record["phase"] for record in records))


@pytest.mark.parametrize(
    ("method", "expected", "least"),
    [
        ("probe", ["features"], 0.6),
        ("lp_ft", ["features", "finetune"], 0),  # two passes are too few for this model
        ({"name": "setfit", "num_pairs": 4, "learning_rate": 1e-3}, ["contrast", "features"], 0.6),
        ("wise_ft", ["finetune", "choose"], 0),
        ("early_stopping", ["finetune"], 0),
    ],
)
def test_classes_are_learnt(model, method, expected, least):
    task = {"train": (TEXTS, LABELS), "development": (TEXTS[::2], LABELS[::2]), "test": (TEXTS, LABELS)}
    found = fit(model, method, task, finetune=FINETUNE, data=DATA)
    assert phases(found.records) == expected
    assert found.scores["test"]["accuracy"] > least
    assert set(found.predict(TEXTS).labels) <= {"0", "1"}


def test_one_pass_with_early_stopping_sees_the_dropout_of_plain_fine_tuning(model):
    """To the bit: what is read besides takes none of its random numbers."""
    task = {"train": (TEXTS, LABELS), "development": (TEXTS[::2], LABELS[::2])}
    once = {**FINETUNE, "epochs": 1}
    plain, stopped = (fit(model, name, task, finetune=once, data=DATA) for name in ("vanilla", "early_stopping"))
    for path, weight in plain.weights.items():
        np.testing.assert_array_equal(stopped.weights[path], weight, err_msg=path)
    losses = [record["loss"] for record in plain.records]
    assert [record["loss"] for record in stopped.records] == losses
    assert stopped.records[-1]["best_pass"] == 1


@pytest.mark.parametrize("method", ["probe", "lp_ft", {"name": "setfit", "num_pairs": 2}, "zero_shot"])
def test_scores_of_pairs_are_learnt(scorer, method):
    found = fit(scorer, method, {"train": (PAIRS, SCORES), "test": (PAIRS, SCORES)}, finetune=FINETUNE, data=DATA)
    assert found.scores["test"].keys() == {"spearman", "pearson"}
    labels = np.array(found.predict(PAIRS).labels)
    if method == "zero_shot":
        assert found.records == []
        assert (abs(labels) <= 1 + 1e-6).all(), "a cosine, not a score in the unit of the labels"
    else:
        assert 4 < labels.mean() < 12
    assert spearmanr(labels, SCORES).statistic == pytest.approx(found.scores["test"]["spearman"], abs=1e-6)


def test_wise_ft_without_a_development_split_says_how_to_have_one(model):
    with pytest.raises(AgwmError, match=r"reads the split 'development'.*task\.train_size draws one"):
        fit(model, "wise_ft", (TEXTS, LABELS), data=DATA)
    with pytest.raises(AgwmError, match="reads the split 'development'"):
        fit(model, "vanilla", (TEXTS, LABELS), data=DATA, techniques=["wise_ft"])
    fixed = fit(model, "vanilla", (TEXTS, LABELS), data=DATA, techniques={"wise_ft": {"a": 0.0}}, finetune=FINETUNE)
    query = "encoder.layers.query.kernel"
    np.testing.assert_array_equal(fixed.weights[query], model.params[query])


def test_what_does_not_fit_is_refused_before_training(model, scorer):
    with pytest.raises(AgwmError, match="this task has classes"):
        fit(model, "zero_shot", (TEXTS, LABELS), data=DATA)
    with pytest.raises(AgwmError, match="this task has single texts"):
        fit(scorer, "zero_shot", (TEXTS, [float(x) for x in LABELS]), data=DATA)
    with pytest.raises(AgwmError, match="one training text alone"):
        fit(model, "setfit", (TEXTS[:9], [0] * 8 + [1]), data=DATA)
    with pytest.raises(AgwmError, match=r"model\.frozen holds classifier\.kernel"):
        fit(model, "probe", (TEXTS, LABELS), data=DATA, frozen=r"classifier\.kernel")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("probe", {}),
        ("setfit", {"method.num_pairs": 2}),
        ("wise_ft", {}),
        ("swa", {"techniques.wise_ft": {}}),
        ("lora", {"techniques.early_stopping": {}}),
    ],
    ids=["probe", "setfit", "wise_ft", "swa and wise_ft", "lora and early_stopping"],
)
def test_a_run_folder_gives_what_the_run_gave(configure, tmp_path, method, changes):
    config = configure(method, {**changes, "finetune.epochs": 1})
    result = train(config, progress=False)
    folder = Path(config.run.output)
    assert evaluate(folder)["scores"] == pytest.approx(result["scores"][result["split"]])
    run = load_run(folder)
    texts = ["The key is here.", "The keys is here."]
    export(folder, tmp_path / "export")
    again = load_pretrained(tmp_path / "export", pooling=run.model.pretrained.pooling)
    plain = run.model._replace(pretrained=again, params=again.params)
    np.testing.assert_allclose(plain.predict(texts).probabilities, run.model.predict(texts).probabilities, atol=1e-5)
    if "wise_ft" in result["method"]:
        assert result["reads"] == {"development": 6}
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert (last["phase"], last["a"] in np.float32(np.arange(11) / 10)) == ("choose", True)


def test_a_run_without_training_is_read_again_but_not_exported(settings, tmp_path):
    rows = [{"a": a, "b": b, "score": score} for (a, b), score in zip(PAIRS, SCORES, strict=True)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {name: x for name, x in settings.items() if not name.startswith("task.")}
    task = {"source": "local", "text_columns": "[a, b]", "label_column": "score", "kind": "regression"}
    task |= {f"files.{split}": tmp_path / f"{split}.jsonl" for split in ("train", "validation")}
    changes = {**{f"task.{name}": x for name, x in task.items()}, "model.pooling": "mean", "output": tmp_path / "run"}
    config = load_config(None, words({**kept, **changes}, "zero_shot"))
    result = train(config, progress=False)
    folder = Path(config.run.output)
    assert result["num_parameters"] == {"task": 0}
    assert (folder / "metrics.jsonl").read_text() == ""
    assert evaluate(folder)["scores"] == pytest.approx(result["scores"]["validation"])
    run = load_run(folder)
    found = run.model.predict(PAIRS).labels
    assert max(map(abs, found)) <= 1 + 1e-6
    assert spearmanr(found, SCORES).statistic == pytest.approx(result["score"], abs=1e-6)
    with pytest.raises(AgwmError, match="does not score with the model's head"):
        export(folder, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_seeds_that_draw_texts_of_other_lengths_share_a_program(settings, tmp_path):
    """A development split with the one long text in it, and one without: the tables of both seeds are as wide."""
    long = " ".join(["the key"] * 14)
    rows = [f"{long if i == 0 else 'the key'},{'ab'[i % 2]}\n" for i in range(30)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    (tmp_path / "held_out.csv").write_text("text,label\n" + "".join(rows[1:]))
    kept = {name: x for name, x in settings.items() if not name.startswith("task.")}
    files = {"task.source": "local", "task.files.train": tmp_path / "train.csv", "task.train_size": 12}
    files |= {"task.files.validation": tmp_path / "held_out.csv", "data.pad_to": 0.9}
    config = load_config(None, words({**kept, **files, "output": tmp_path / "run"}, "wise_ft"))
    drawn = build(config, seeds=range(8))
    longest = {int(one.draw.encoded["development"]["attention_mask"].sum(1).max()) for one in drawn}
    assert len(longest) > 1
    assert len({one.table["input_ids"].shape for one in drawn}) == 1
