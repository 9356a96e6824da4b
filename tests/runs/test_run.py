"""Whole runs of every method on a tiny checkpoint: what they write, what they refuse, how they relate."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from agwm_jax.errors import AgwmError, Diverged
from agwm_jax.runs import run
from agwm_jax.runs.build import build
from agwm_jax.runs.finished import evaluate_run, export_run, predict_run
from agwm_jax.runs.folder import claimed, load_alpha, weights_digest
from agwm_jax.runs.run import train, train_seeds
from agwm_jax.settings.config import config_fingerprint, load_config


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def agwm_run(settings, tmp_path_factory):
    """A finished AGWM run over two splits: its config, folder and result."""
    folder = tmp_path_factory.mktemp("runs") / "agwm"
    overrides = ["--search.num_splits", "2", "--search.anchor", "0.1", "--run.tensorboard", "true"]
    config = load_config(None, [*settings, *overrides, "--output", str(folder)])
    return config, folder, train(config, progress=False)


def test_result_holds_what_a_reader_needs(agwm_run):
    config, folder, result = agwm_run
    assert result == json.loads((folder / "result.json").read_text())
    assert {"development", "validation", "test"} == result["scores"].keys()
    assert result["score"] == result["scores"]["test"]["matthews"]
    assert result["seconds"].keys() >= {"prepare", "compile", "search-0", "search-1", "finetune", "evaluate", "total"}
    assert result["num_parameters"]["alpha"] == 2 * (4 * 32 + 2 * 48) + 32
    assert result["peak_memory_bytes"] > 1e6
    assert sum(g["n"] for g in result["groups"]["test"].values()) == 40
    assert result["versions"]["jax"] == jax.__version__
    reloaded = load_config(folder / "config.yaml")
    assert config_fingerprint(reloaded) == config_fingerprint(config)
    assert list((folder / "tensorboard").iterdir())
    assert not list((folder / "checkpoints").glob("[0-9]*"))


def test_metrics_have_a_line_a_step(agwm_run):
    _, folder, _ = agwm_run
    lines = records(folder)
    assert [(r["phase"], r["step"]) for r in lines] == [
        *(("search-0", i) for i in range(12)),
        *(("search-1", i) for i in range(12)),
        *(("finetune", i) for i in range(10)),
    ]
    assert [r["global_step"] for r in lines] == list(range(34))
    assert all(r.keys() >= {"loss", "outer_loss", "hypergradient_norm"} for r in lines[:24])
    assert [r["step"] for r in lines[:12] if "alpha_mean" in r] == [2, 3, 6, 7, 10, 11]


def test_alpha_file_says_how_it_was_trained(agwm_run):
    config, folder, _ = agwm_run
    with safe_open(folder / "alpha.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata.pop("pretrained") == weights_digest(build(config).pretrained.params)
    assert metadata == {"format": "agwm_jax.alpha.v1", "complement": "convex", "rank": "1"}
    alpha = load_alpha(folder / "alpha.safetensors", complement="convex")
    start = build(config).initial.alpha
    assert alpha.keys() == start.keys()
    moved = [float(abs(np.asarray(alpha[path].left) - np.asarray(start[path].left)).max()) for path in alpha]
    assert min(moved) > 1e-3
    assert all(float(x.min()) >= 0 and float(x.max()) <= 1 for x in jax.tree.leaves(alpha))
    with pytest.raises(AgwmError, match="trained with complement='convex' and must not be mixed with 'factored'"):
        load_alpha(folder / "alpha.safetensors", complement="factored")


def test_finished_run_is_not_run_again_and_another_config_is_refused(agwm_run, settings):
    config, folder, result = agwm_run
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert train(config, progress=False) == result
    other = load_config(None, [*settings, "--search.anchor", "0.2", "--output", str(folder)])
    with pytest.raises(AgwmError, match=r"another config.*search\.anchor is 0\.1 there and 0\.2 here"):
        train(other, progress=False)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_folder_that_is_no_run_is_left_alone(configure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("dear")
    with pytest.raises(AgwmError, match="not empty and is no run folder"):
        train(configure(), progress=False)
    assert (tmp_path / "run" / "thesis.txt").read_text() == "dear"


def test_eval_repeats_the_reported_score(agwm_run, tmp_path):
    _, folder, result = agwm_run
    again = evaluate_run(folder)
    assert again["scores"] == pytest.approx(result["scores"]["test"])
    assert again["groups"] == result["groups"]["test"]
    with pytest.raises(AgwmError, match="no split 'dev': its splits are"):
        evaluate_run(folder, split="dev")


def test_eval_and_predict_of_a_file_agree(agwm_run, tmp_path):
    _, folder, _ = agwm_run
    rows = [
        {"id": "a", "text": "The key is here.", "label": 1},
        {"id": "b", "text": "The keys is here.", "label": "unacceptable"},
        {"id": "c", "text": "No author has ever laughed.", "label": 1},
    ]
    source, output = tmp_path / "texts.jsonl", tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps({**row, "label": str(row["label"])}) + "\n" for row in rows))
    assert predict_run(folder, source, output) == 3
    labelled = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in labelled] == ["a", "b", "c"]
    assert all(row["probability_acceptable"] + row["probability_unacceptable"] == pytest.approx(1) for row in labelled)
    truth = ["acceptable", "unacceptable", "acceptable"]
    hits = np.mean([row["prediction"] == t for row, t in zip(labelled, truth, strict=True)])
    assert evaluate_run(folder, file=source)["scores"]["accuracy"] == pytest.approx(hits)


def test_predicting_needs_no_training_data_but_the_same_checkpoint_and_alpha(agwm_run, tmp_path, tiny_checkpoint):
    _, finished, _ = agwm_run
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (tmp_path / "texts.csv").write_text("text\nThe key is here.\n")
    config = (folder / "config.yaml").read_text()
    moved = config.replace("source: agreement", "source: local\n  files: {train: gone.csv, validation: gone.csv}")
    kept = [
        line
        for line in moved.splitlines()
        if not line.startswith(("  seed: 0", "  pool_size", "  validation_size", "  test_size"))
    ]
    (folder / "config.yaml").write_text("\n".join(kept) + "\n")
    assert predict_run(folder, tmp_path / "texts.csv", tmp_path / "labelled.csv") == 1
    with pytest.raises(AgwmError, match=r"labelled\.csv exists"):
        predict_run(folder, tmp_path / "texts.csv", tmp_path / "labelled.csv")

    shutil.copytree(tiny_checkpoint, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["bert.encoder.layer.0.output.dense.bias"] += 1
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.yaml").write_text(config.replace(str(tiny_checkpoint), str(tmp_path / "other")))
    with pytest.raises(AgwmError, match="trained from another checkpoint"):
        evaluate_run(folder)

    (folder / "config.yaml").write_text(config)
    (folder / "alpha.safetensors").unlink()
    with pytest.raises(AgwmError, match=r"alpha\.safetensors cannot be read"):
        evaluate_run(folder)


def test_a_run_belongs_to_one_process(configure):
    config = configure()
    with claimed(_folder(config), config), pytest.raises(AgwmError, match="another process is running"):
        train(config, progress=False)


def test_export_gives_the_mixed_model(agwm_run, tmp_path):
    from agwm_jax.models.huggingface import load_pretrained
    from agwm_jax.runs.finished import load_run

    _, folder, _ = agwm_run
    assert export_run(folder, tmp_path / "export") is None
    exported = load_pretrained(tmp_path / "export")
    assert exported.label_names == ("unacceptable", "acceptable")
    params = load_run(folder)[3]
    assert exported.params.keys() == params.keys()
    for path, weight in params.items():
        np.testing.assert_array_equal(exported.params[path], weight, err_msg=path)
    pretrained, task = build(agwm_run[0]).pretrained.params, load_file(folder / "task.safetensors")
    kernel = "encoder.layers.query.kernel"
    low, high = np.minimum(pretrained[kernel], task[kernel]), np.maximum(pretrained[kernel], task[kernel])
    inside = (params[kernel] >= low - 1e-6) & (params[kernel] <= high + 1e-6)
    assert bool(inside.all()), "a convex mixture lies between W0 and W"


def test_alpha_fixed_at_one_is_plain_fine_tuning(configure):
    vanilla, control = configure("--method", "vanilla", output="v"), configure("--mixup.noise", "0", output="f")
    control = control.model_copy(update={"method": control.method.model_copy(update={"name": "frozen_alpha"})})
    results = [train(config, progress=False) for config in (vanilla, control)]
    curves = [[r["loss"] for r in records(_folder(config))] for config in (vanilla, control)]
    assert curves[0] == curves[1]
    assert results[0]["scores"] == results[1]["scores"]
    assert not (_folder(vanilla) / "alpha.safetensors").exists()


def test_same_seed_same_bits_other_seed_other_draw(configure):
    runs = [("--seed", "1", "a"), ("--seed", "1", "b"), ("--seed", "2", "c")]
    for flag, seed, output in runs:
        train(configure("--method", "vanilla", flag, seed, output=output), progress=False)
    a, b, c = ([r["loss"] for r in records(_folder(configure(output=output)))] for _, _, output in runs)
    assert a == b != c


CONJUGATE_GRADIENT = [
    *("--hypergradient.estimator", "conjugate_gradient", "--hypergradient.curvature", "gauss_newton"),
    *("--hypergradient.damping", "0.1", "--hypergradient.warm_start", "true"),
]


@pytest.mark.parametrize(
    "overrides",
    [
        ["--hypergradient.estimator", "first_order", "--search.rollback", "false", "--mixup.rank", "2"],
        ["--hypergradient.estimator", "unrolled", "--search.inner_steps", "2", "--mixup.rank", "full"],
        [*CONJUGATE_GRADIENT, "--search.anchor", "0.1", "--model.pooling", "mean"],
        ["--hypergradient.estimator", "penalty", "--hypergradient.growth", "1.0", "--search.anchor", "0.1"],
        ["--model.dtype", "bfloat16", "--mixup.complement", "factored", "--search.average", "alpha"],
        ["--mixup.frozen", r"embeddings\..*", "--search.outer.gradient_clip", "1.0", "--data.pad_to", "0.5"],
    ],
    ids=["first_order", "unrolled", "conjugate_gradient", "penalty", "bfloat16", "frozen"],
)
def test_settings_change_the_run_and_it_ends_finite(configure, agwm_run, overrides):
    result = train(configure(*overrides), progress=False)
    lines = records(_folder(configure()))
    usual = records(agwm_run[1])
    losses, usual_losses = ([r["loss"] for r in found if r["phase"] == "search-0"] for found in (lines, usual))
    assert losses != usual_losses[: len(losses)], "a setting that changes nothing is not read"
    assert all(np.isfinite([r["loss"] for r in lines]))
    # Warm-up starts at 0, so W is W0 when the first step ends, and alpha has no gradient there.
    assert all(r["hypergradient_norm"] > 0 for r in lines if r["phase"] == "search-0" and r["step"] > 0)
    assert 0 <= result["scores"]["test"]["accuracy"] <= 1


def test_a_solve_that_diverges_is_told_while_it_runs(configure, capfd):
    series = ["--hypergradient.estimator", "neumann", "--hypergradient.num_terms", "4", "--search.anchor", "0.1"]
    result = train(configure(*series, "--hypergradient.step_size", "100"), progress=False)
    assert all(line["residual"] > 1 for line in records(_folder(configure())) if line["phase"] == "search-0")
    assert "linear_solve_diverged" in {warning["name"] for warning in result["warnings"]}
    assert "hypergradient.curvature gauss_newton" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("estimator", ["neumann", "gradient_descent", "conjugate_gradient", "nystrom", "penalty"])
def test_implicit_without_an_anchor_is_warned_about(configure, estimator):
    config = configure("--hypergradient.estimator", estimator, "--model", "/nowhere")
    with (
        pytest.warns(UserWarning, match=f"{estimator} with search.anchor 0: .*the exact hypergradient .* is zero"),
        pytest.raises(AgwmError, match="/nowhere"),
    ):
        train(config, progress=False)


def test_a_regression_learns_from_pairs(configure, tmp_path, settings):
    rng = np.random.default_rng(0)
    words = ["key", "keys", "author", "authors"]
    for split, n in (("train", 60), ("validation", 30)):
        a, b = rng.choice(words, n), rng.choice(words, n)
        lines = [
            json.dumps({"s1": str(x), "s2": str(y), "score": 5.0 * x.startswith("key")})
            for x, y in zip(a, b, strict=True)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    kept = [word for pair in zip(settings[::2], settings[1::2], strict=True) for word in pair if "_size" not in pair[0]]
    task = {
        "task.source": "local",
        "task.files.train": tmp_path / "train.jsonl",
        "task.files.validation": tmp_path / "validation.jsonl",
        "task.text_columns": "[s1, s2]",
        "task.label_column": "score",
        "task.kind": "regression",
        "data.batch_size": 8,
        "finetune.epochs": 20,
        "finetune.optimizer.learning_rate": 1e-2,
        "method": "vanilla",
        "output": tmp_path / "stsb",
    }
    config = load_config(None, [*kept, *(w for name, value in task.items() for w in (f"--{name}", str(value)))])
    result = train(config, progress=False)
    assert result["metric"] == "spearman"
    assert result["score"] > 0.5


def test_seeds_side_by_side_get_a_folder_each_and_learn_what_they_would_alone(configure, settings):
    """A whole run: draws, heads, lengths, development splits and scores of its own for every seed."""
    options = ["--seeds", "[0, 1]", "--search.num_splits", "2", "--search.epochs", "1", "--data.pad_to", "0.9"]
    options += ["--hypergradient.estimator", "first_order", "--search.rollback", "false"]
    found = {}
    for vectorize in ("none", "all"):
        config = configure(*options, "--run.vectorize", vectorize, output=vectorize)
        found[vectorize] = train_seeds(config, progress=False)
        assert [result["seed"] for result in found[vectorize]] == [0, 1]
    for seed, (one, both) in enumerate(zip(found["none"], found["all"], strict=True)):
        folders = [_folder(configure(output=f"{vectorize}/seed-{seed}")) for vectorize in found]
        curves = [{(r["phase"], r["step"]): r["loss"] for r in records(folder)} for folder in folders]
        assert curves[0] == pytest.approx(curves[1], rel=1e-4)
        assert one["scores"].keys() == both["scores"].keys()
        assert both["side_by_side"] == {"seeds": 2, "splits": 2}
        assert evaluate_run(folders[1])["scores"] == pytest.approx(both["scores"]["test"])
    assert [r["loss"] for r in records(folders[0])] != [
        r["loss"] for r in records(_folder(configure(output="none/seed-0")))
    ]
    alone = config_fingerprint(load_config(folders[1] / "config.yaml"))
    assert alone == config_fingerprint(configure(*options[2:], "--seed", "1"))
    # More seeds are added to those that are there.
    more = configure("--seeds", "[0, 1, 2]", *options[2:], "--run.vectorize", "all", output="all")
    before = (folders[1] / "result.json").stat().st_mtime_ns
    assert [result["seed"] for result in train_seeds(more, progress=False)] == [0, 1, 2]
    assert (folders[1] / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("broken", "vectorize"), [(1, "all"), (0, "none")])
def test_a_seed_that_diverges_costs_the_others_nothing(configure, monkeypatch, broken, vectorize):
    member = run._member

    def not_a_number(seed):
        found = member(seed)
        if seed.config.run.seed != broken:
            return found
        task = {path: np.full_like(x, np.nan) for path, x in found.initial.task.items()}
        return found._replace(initial=found.initial._replace(task=task))

    config = configure("--method", "vanilla", "--seeds", "[0, 1]", "--run.vectorize", vectorize)
    with monkeypatch.context() as patched:
        patched.setattr(run, "_member", not_a_number)
        with pytest.raises(Diverged) as raised:
            train_seeds(config, progress=False)
    words = (
        f"1 of 2 seeds diverged, the results of the others stand. seed {broken}: finetune: loss became nan at step 0"
    )
    assert words in str(raised.value)
    results = [(_folder(config) / f"seed-{seed}" / "result.json").exists() for seed in (0, 1)]
    assert results == [broken != 0, broken != 1]
    assert not (_folder(config) / "checkpoints-0").exists()
    assert [result["seed"] for result in train_seeds(config, progress=False)] == [0, 1]


def test_no_loss_means_stop_with_the_last_good_state_kept(configure):
    config = configure(
        "--method", "vanilla", "--finetune.optimizer.learning_rate", "1e30", "--run.checkpoint_steps", "1"
    )
    with pytest.raises(AgwmError, match=r"finetune: .* became .* at step \d+; .*checkpoint"):
        train(config, progress=False)
    assert not (_folder(config) / "result.json").exists()
    assert records(_folder(config)), "the curve that led there is kept"


def _folder(config):
    from pathlib import Path

    return Path(config.run.output)
