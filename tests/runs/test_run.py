"""Whole runs on a tiny checkpoint: what they write, what they refuse, and what is made of a finished one."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from short_settings import options
from tiny import words

from agwm_jax.cli import main
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.errors import AgwmError, Diverged
from agwm_jax.methods.interface import METHODS
from agwm_jax.models.huggingface import load_pretrained
from agwm_jax.runs.finished import evaluate, export, load_run, predict_file
from agwm_jax.runs.folder import claimed, weights_digest
from agwm_jax.runs.run import train, train_seeds
from agwm_jax.settings import deciding_settings, load_config

SEARCH = {"method.search.num_splits": 2, "method.search.anchor": 0.1, "method.estimator": "first_order"}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in records(folder)]


def folder_of(config):
    return Path(config.run.output)


@pytest.fixture(scope="module")
def agwm_run(settings, tmp_path_factory):
    """A finished AGWM run over two splits: its config, folder and result. The folder's name holds what globs read."""
    folder = tmp_path_factory.mktemp("runs") / "agwm [0]? {*}"
    config = load_config(None, words({**settings, **SEARCH, "run.tensorboard": "true", "output": folder}))
    return config, folder, train(config, progress=False)


@pytest.fixture
def copied(agwm_run, tmp_path):
    """A copy of the finished run, to be spoilt."""
    return Path(shutil.copytree(agwm_run[1], tmp_path / "copied"))


@pytest.fixture
def texts(tmp_path):
    """A file of texts to label."""
    path = tmp_path / "texts.csv"
    path.write_text("id,text\na,The key is here.\nb,The keys is here.\n")
    return path


def test_result_holds_what_a_reader_needs(agwm_run):
    config, folder, result = agwm_run
    assert result == json.loads((folder / "result.json").read_text())
    assert {"development", "validation", "test"} == result["scores"].keys()
    assert result["score"] == result["scores"]["test"]["matthews"]
    assert result["seconds"].keys() >= {"prepare", "compile", "search-0", "search-1", "finetune", "evaluate", "total"}
    assert result["num_parameters"]["alpha"] == 2 * (4 * 32 + 2 * 48) + 32
    assert result["peak_memory_bytes"] > 1e6
    assert sum(group["n"] for group in result["groups"]["test"].values()) == 40
    assert result["versions"]["jax"] == jax.__version__
    assert deciding_settings(load_config(folder / "config.yaml")) == deciding_settings(config)
    assert list((folder / "tensorboard").iterdir())
    assert not list((folder / "checkpoints").glob("[0-9]*"))


def test_metrics_have_a_line_a_step(agwm_run):
    lines = records(agwm_run[1])
    assert [(r["phase"], r["step"]) for r in lines] == [
        *(("search-0", i) for i in range(12)),
        *(("search-1", i) for i in range(12)),
        *(("leverage", i) for i in range(2)),
        *(("finetune", i) for i in range(10)),
    ]
    assert [r["global_step"] for r in lines] == list(range(36))
    assert all(r.keys() >= {"loss", "outer_loss", "hypergradient_norm"} for r in lines[:24])
    assert [r["step"] for r in lines[:12] if "alpha_mean" in r] == [2, 5, 8, 11], "once a chunk"


def test_variables_say_what_they_belong_to(agwm_run, settings):
    config, folder, _ = agwm_run
    model = load_run(folder).model
    with safe_open(folder / "variables.safetensors", framework="numpy") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["pretrained"] == weights_digest(model.pretrained.params)
    assert json.loads(metadata["method"]) == config.method.model_dump(mode="json")
    assert json.loads(metadata["weights"]) == list(model.pretrained.model.weights)
    kernel = "encoder.layers.query.kernel"
    assert names >= {f"task/{kernel}", f"alpha/{kernel}/left", f"alpha/{kernel}/right"}
    assert {name.split("/")[1] for name in names if name.startswith("task/")} == set(model.params)


def test_a_finished_run_is_left_alone_and_another_config_is_refused(agwm_run, settings):
    config, folder, result = agwm_run
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "checkpoints" / "4").mkdir(parents=True)  # of a process that was killed after it wrote the result
    assert train(config, progress=False) == result
    other = load_config(None, words({**settings, **SEARCH, "method.search.anchor": 0.2, "output": folder}))
    with pytest.raises(AgwmError, match=r"another config.*method\.search\.anchor is 0\.1 there and 0\.2 here"):
        train(other, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_folders_of_something_else_are_left_alone(configure, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("dear")
    with pytest.raises(AgwmError, match="not empty and is no run folder"):
        train(configure(), progress=False)
    (folder / "config.yaml").write_text("method: {name: agwm}\nsearch: {epochs: 3}\n")
    for use in (lambda: train(configure(), progress=False), lambda: evaluate(folder)):
        with pytest.raises(AgwmError, match=r"config\.yaml: settings of version 0\.3: search is now .*train again"):
            use()
    assert {path.name for path in folder.iterdir()} == {"thesis.txt", "config.yaml"}


def test_a_run_belongs_to_one_process(configure):
    config = configure()
    with claimed(folder_of(config), config), pytest.raises(AgwmError, match="another process is running"):
        train(config, progress=False)


def test_eval_repeats_the_reported_score(agwm_run):
    _, folder, result = agwm_run
    again = evaluate(folder)
    assert again["scores"] == pytest.approx(result["scores"]["test"])
    assert again["groups"] == result["groups"]["test"]
    assert evaluate(folder, "development")["scores"] == pytest.approx(result["scores"]["development"])
    with pytest.raises(AgwmError, match="no split 'dev': its splits are"):
        evaluate(folder, "dev")


def test_eval_and_predict_of_a_file_agree(agwm_run, tmp_path):
    rows = [
        {"id": "a", "text": "The key is here.", "label": "1"},
        {"id": "b", "text": "The keys is here.", "label": "unacceptable"},
        {"id": "c", "text": "No author has ever laughed.", "label": "1"},
    ]
    source, output = tmp_path / "texts.jsonl", tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict_file(agwm_run[1], source, output) == 3
    labelled = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in labelled] == ["a", "b", "c"]
    assert all(row["probability_acceptable"] + row["probability_unacceptable"] == pytest.approx(1) for row in labelled)
    truth = ["acceptable", "unacceptable", "acceptable"]
    hits = np.mean([row["prediction"] == wanted for row, wanted in zip(labelled, truth, strict=True)])
    assert evaluate(agwm_run[1], file=source)["scores"]["accuracy"] == pytest.approx(hits)
    with pytest.raises(AgwmError, match=r"labelled\.jsonl exists"):
        predict_file(agwm_run[1], source, output)


def test_a_moved_model_is_named_at_eval_predict_and_export(copied, tiny_checkpoint, texts, tmp_path, capsys):
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace(str(tiny_checkpoint), str(tmp_path / "gone")))
    commands = [["eval", copied], ["predict", copied, texts, tmp_path / "out.csv"], ["export", copied, tmp_path / "hf"]]
    for command in commands:
        assert main([str(word) for word in command]) == 2
        assert "say --model PATH" in capsys.readouterr().err
        assert main([*map(str, command), "--model", str(tiny_checkpoint)]) == 0
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    tensors = load_file(moved / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.bias"] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AgwmError, match="trained from another checkpoint"):
        evaluate(copied, model=str(moved))


def test_variables_are_refused_by_another_method_and_when_damaged(copied):
    config, file = copied / "config.yaml", copied / "variables.safetensors"
    text = config.read_text()
    config.write_text(text.replace("complement: convex", "complement: factored"))
    with pytest.raises(AgwmError, match=r"method\.mixup\.complement is 'convex' there and 'factored' here"):
        load_run(copied)
    config.write_text(text)
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    kernel = "alpha/pooler.kernel"
    spoilt = {name: x for name, x in tensors.items() if name != f"{kernel}/left"} | {"alpha/odd": np.zeros(1)}
    spoilt[f"{kernel}/right"] = np.zeros((1, 3), np.float32)
    save_file(spoilt, file, metadata=metadata)
    with pytest.raises(
        AgwmError, match=r"left is missing; alpha/odd is unknown; .*right is \[1, 3\], expected \[1, 16\]"
    ):
        load_run(copied)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(AgwmError, match=r"variables\.safetensors cannot be read"):
        load_run(copied)


def test_export_gives_the_mixed_model(agwm_run, tmp_path):
    _, folder, _ = agwm_run
    assert export(folder, tmp_path / "export") is None
    exported = load_pretrained(tmp_path / "export")
    assert exported.label_names == ("unacceptable", "acceptable")
    model = load_run(folder).model
    assert exported.params.keys() == model.params.keys()
    for path, weight in model.params.items():
        np.testing.assert_array_equal(exported.params[path], weight, err_msg=path)
    learnt = load_file(folder / "variables.safetensors")
    kernel = "encoder.layers.query.kernel"
    ends = (model.pretrained.params[kernel], learnt[f"task/{kernel}"])
    mixed = np.asarray(model.params[kernel])
    assert ((mixed >= np.minimum(*ends) - 1e-6) & (mixed <= np.maximum(*ends) + 1e-6)).all()
    assert np.abs(mixed - ends[1]).max() > 1e-5, "not W alone"


ELSEWHERE = {"agwm", "zero_shot"}  # the tests above; a score of pairs, which is no classifier to be exported


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ELSEWHERE])
def test_every_method_leaves_by_the_same_door(configure, tmp_path, method):
    config = configure(method, {"finetune.epochs": 1, **options(method)})
    result = train(config, progress=False)
    again = evaluate(folder_of(config))
    assert again["scores"] == pytest.approx(result["scores"]["test"])
    export(folder_of(config), tmp_path / "export")
    exported, model = load_pretrained(tmp_path / "export"), load_run(folder_of(config)).model
    for path, weight in model.params.items():
        np.testing.assert_array_equal(exported.params[path], weight, err_msg=path)
    moved = [path for path, x in model.params.items() if (np.asarray(x) != model.pretrained.params[path]).any()]
    assert moved, "nothing was learnt"


def test_a_seed_alone_and_beside_others_learns_the_same(configure):
    options = {**SEARCH, "method.search.epochs": 1, "method.search.leverage": "false", "data.pad_to": 0.9}
    beside = configure("agwm", {**options, "run.seeds": "[0, 2]", "run.vectorize": "all"}, output="beside")
    alone = configure("agwm", {**options, "run.seed": 2}, output="alone")
    both, one = train_seeds(beside, progress=False), train(alone, progress=False)
    assert [result["side_by_side"] for result in (*both, one)] == [{"seeds": 2, "phases": 2}] * 2 + [
        {"seeds": 1, "phases": 1}
    ]
    folders = [folder_of(alone), folder_of(beside) / "seed-2", folder_of(beside) / "seed-0"]
    curves = [{(r["phase"], r["step"]): r["loss"] for r in records(folder)} for folder in folders]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[1] != pytest.approx(curves[2], rel=1e-2), "draws, heads and orders are the seed's own"
    assert evaluate(folders[1])["scores"] == pytest.approx(both[1]["scores"]["test"])
    first, second = (deciding_settings(load_config(folder / "config.yaml")) for folder in folders[:2])
    assert first == second
    # More seeds are added to those that are there.
    before = (folders[1] / "result.json").stat().st_mtime_ns
    more = configure("agwm", {**options, "run.seeds": "[0, 1, 2]", "run.vectorize": "all"}, output="beside")
    assert [result["seed"] for result in train_seeds(more, progress=False)] == [0, 1, 2]
    assert (folders[1] / "result.json").stat().st_mtime_ns == before


def test_a_seed_that_diverges_costs_the_others_nothing(configure, monkeypatch):
    from agwm_jax.runs import build

    member = build.Prepared.member.fget

    def not_a_number(prepared):
        found = member(prepared)
        if prepared.seed != 1:
            return found
        head = {"classifier.bias": np.full_like(found.pretrained["classifier.bias"], np.nan)}
        return found._replace(pretrained={**found.pretrained, **head})

    config = configure("vanilla", {"run.seeds": "[0, 1]", "run.vectorize": "all"})
    with monkeypatch.context() as patched:
        patched.setattr(build.Prepared, "member", property(not_a_number))
        with pytest.raises(Diverged, match=r"1 of 2 seeds diverged, .* seed 1: finetune: loss became nan at step 0"):
            train_seeds(config, progress=False)
    assert [(folder_of(config) / f"seed-{seed}" / "result.json").exists() for seed in (0, 1)] == [True, False]
    assert not (folder_of(config) / "checkpoints-0").exists()
    assert [result["seed"] for result in train_seeds(config, progress=False)] == [0, 1]


def test_a_hypergradient_that_is_not_finite_stops_the_run(configure):
    solver = {"name": "neumann", "num_terms": 40, "step_size": 1e30}
    estimator = {"method.estimator": {"name": "implicit", "solver": solver}, "method.search.anchor": 0.1}
    config = configure("agwm", estimator)
    with pytest.raises(
        Diverged, match=r"search-0: \w*(hypergradient|residual)\w* became (nan|inf) at step \d+; .* solver"
    ):
        train(config, progress=False)
    assert not (folder_of(config) / "result.json").exists()
    assert records(folder_of(config)), "the curve that led there is kept"


def test_weights_that_are_not_kept_are_missed_in_a_sentence(configure):
    config = configure("frozen_alpha", {"run.save_weights": "false", "finetune.epochs": 1})
    train(config, progress=False)
    names = load_file(folder_of(config) / "variables.safetensors")
    assert {name.split("/")[0] for name in names} == {"alpha"}, "for the report"
    with pytest.raises(AgwmError, match=r"made with run\.save_weights false"):
        evaluate(folder_of(config))


@pytest.mark.parametrize("minutes", ["null", 0])
def test_checkpoints_are_written_unless_there_shall_be_none(configure, monkeypatch, minutes):
    saved = []
    save = Checkpoints.save

    def noted(self, step, *rest):
        saved.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", noted)
    config = configure("vanilla", {"run.checkpoint_minutes": minutes})
    assert np.isfinite(train(config, progress=False)["score"])
    assert bool(saved) == (minutes == 0)
    assert not (folder_of(config) / "checkpoints").exists()
