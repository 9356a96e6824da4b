"""Settings: what is read, what is refused and in which words."""

import ast
from pathlib import Path

import pytest
import yaml

import agwm_jax
from agwm_jax.errors import AgwmError
from agwm_jax.settings.config import Config, config_fingerprint, dump_config, load_config
from agwm_jax.settings.words import all_settings

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refused(path, *overrides) -> str:
    with pytest.raises(AgwmError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_the_defaults_are_the_design_documents():
    config = load_config(None)
    search, finetune = config.search, config.finetune
    assert (search.inner.learning_rate, search.inner.weight_decay, search.inner.schedule) == (2e-5, 0.01, "linear")
    assert (search.outer.learning_rate, search.outer.weight_decay, search.outer.schedule) == (2e-3, 0.0, "cosine")
    assert (search.inner.gradient_clip, search.outer.gradient_clip) == (5.0, None)
    assert (finetune.optimizer.learning_rate, finetune.optimizer.gradient_clip) == (2e-5, 1.0)
    assert {part.warmup_fraction for part in (search.inner, search.outer, finetune.optimizer)} == {0.1}
    assert (search.epochs, finetune.epochs, search.validation_fraction, search.rollback) == (3, 3, 0.2, True)
    assert (config.data.batch_size, config.data.max_length) == (16, 128)
    assert (config.mixup.rank, config.mixup.noise, config.mixup.complement) == (1, 0.005, "convex")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_of_the_repository_loads_and_comes_back_from_its_dump(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "elsewhere" / "config.yaml"
    copy.parent.mkdir()
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert config_fingerprint(load_config(copy)) == config_fingerprint(config)
    head = path.read_text().split("\n\n")[0]
    assert all(word in head for word in ("Command:", "Hardware:", "Time:", "Expected:"))


def test_there_are_configs_to_test():
    assert CONFIGS


def test_a_dump_is_complete_and_keeps_texts_that_look_like_other_things(write):
    names = ["no", "2e-5", "null", "true", "12", "1.5", "~", "1:30", "ä: b", "0o7", "", "2024-01-01", "x # y"]
    config = load_config(None, ["--task.source", "local", "--task.files.train", "a", "--task.files.validation", "b"])
    task = config.task.model_copy(update={"label_names": tuple(names)})
    config = config.model_copy(update={"task": task})
    dumped = write(dump_config(config))
    assert load_config(dumped) == config
    assert set(yaml.safe_load(dump_config(config))) == set(Config.model_fields)


def test_a_number_without_a_point_is_a_number(write):
    path = write("search: {inner: {learning_rate: 2e-5, eps: 1E-8}, anchor: .5, outer: {learning_rate: 1}}")
    search = load_config(path).search
    assert (search.inner.learning_rate, search.inner.eps, search.anchor) == (2e-5, 1e-8, 0.5)
    assert load_config(None, ["--finetune.optimizer.learning_rate", "3e-4"]).finetune.optimizer.learning_rate == 3e-4
    assert load_config(write("run: {seed: 010}")).run.seed == 10  # YAML 1.1 reads 8


def test_words_that_yaml_1_1_takes_for_booleans_are_texts(write):
    task = "task: {source: local, files: {train: a, validation: b}, label_names: [no, yes]}"
    assert load_config(write(task)).task.label_names == ("no", "yes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('search: {inner: {learning_rate: "3"}}', ["search.inner.learning_rate", "'3' (text)", "a number > 0"]),
        ("run: {seed: true}", ["run.seed", "true (true or false)", "a whole number >= 0"]),
        ("run: {seed: 1.0}", ["run.seed", "1.0 (a number)", "a whole number"]),
        ("run: {tensorboard: 1}", ["run.tensorboard", "1 (a whole number)", "true or false"]),
        ("search: {anchor: true}", ["search.anchor", "a number >= 0"]),
        ("search: {validation_fraction: 1.0}", ["search.validation_fraction", "1.0", "> 0 and < 1"]),
        ("finetune: {optimizer: {gradient_clip: 0}}", ["finetune.optimizer.gradient_clip", "a number > 0 or null"]),
        ("search: {inner: {learning_rate: .nan}}", ["search.inner.learning_rate", "a number > 0"]),
        ("search: {anchor: .inf}", ["search.anchor", "a number >= 0"]),
        ("data: {pad_to: 2}", ["data.pad_to", "2", "a number > 0 and <= 1 or longest"]),
        ("mixup: {rank: 0}", ["mixup.rank", "0", "a whole number >= 1 or full"]),
        ("mixup: {mixed: '(a'}", ["mixup.mixed", "'(a'", "regular expression"]),
        ("method: {name: vanila}", ["method.name", "'vanila'", "agwm, vanilla, frozen_alpha", "did you mean vanilla?"]),
        ("hypergradient: {estimator: neuman}", ["hypergradient.estimator", "'neuman'", "did you mean neumann?"]),
        (
            "search: {lerning_rate: 1}",
            ["search.lerning_rate: unknown setting", "did you mean search.inner.learning_rate"],
        ),
        ("serach: {}", ["serach: unknown setting", "did you mean search?"]),
        ("hypergradient: {num_terms: 2}", ["hypergradient.num_terms", "hypergradient.estimator=neumann"]),
        ("task: {source: local, files: {train: a}}", ["task.files.validation: missing", "text"]),
        ("task: {source: local}", ["task.files: missing", "with task.source: local", "train, validation, test"]),
        ("task: 3", ["task: got 3", "agreement, glue, hub, local"]),
        ("search: {inner: 3}", ["search.inner: got 3", "a section with learning_rate"]),
        ("1: 2", ["unknown setting"]),
        ("[1]", ["[1] (a list)", "a mapping"]),
        ("task: {source: hub, path: x, metrics: [acc]}", ["task.metrics[0]", "'acc'", "accuracy, f1"]),
        ("task: {source: hub, path: x, kind: regression, metrics: [f1]}", ["task.metrics: f1", "pearson, spearman"]),
        ("task: {source: hub, path: x, text_columns: [a, b, c]}", ["task.text_columns", "[a, b, c]"]),
        ("task: {source: hub, path: x, report_split: test}", ["task.report_split", "splits.test"]),
        ("mixup: {complement: factored, rank: 2}", ["mixup.rank: got 2", "factored"]),
        (
            "hypergradient: {estimator: unrolled, num_steps: 2}",
            ["hypergradient.num_steps: got 2", "search.inner_steps"],
        ),
    ],
)
def test_a_refusal_names_the_path_the_value_and_what_is_allowed(write, text, expected):
    message = refused(write(text))
    assert "config.yaml" in message
    assert [part for part in expected if part not in message] == []
    assert message.count("\n") == 0


def test_all_faults_come_in_one_report(write):
    message = refused(write("run: {seed: x, sede: 1}\ndata: {batch_size: 0}"), "--mixup.noise", "-1")
    assert "4 faults" in message
    assert all(path in message for path in ("run.seed", "run.sede", "data.batch_size", "mixup.noise"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run:\n  seed: [\n", "line 3"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3, column 3: not valid YAML: the key seed is given twice"),
        ("run: !!python/object/apply:os.getcwd []", "line 1"),
        (b"run: {output: '\xff'}", "byte 15"),
        ("a\x00b", "not valid YAML"),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_place(write, text, expected):
    assert expected in refused(write(text))


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path):
    assert "no such config file" in refused(tmp_path / "none.yaml")
    assert "a folder" in refused(tmp_path)


def test_an_empty_file_and_an_empty_section_mean_the_defaults(write):
    assert load_config(write("")) == load_config(write("search:\n  inner:\nrun:\n")) == load_config(None)


def test_overrides_win_over_the_file_and_leave_the_rest_of_a_section(write):
    path = write("run: {seed: 1}\nsearch: {inner: {learning_rate: 1e-3, b1: 0.5}}")
    config = load_config(
        path, ["--run.seed", "3", "--search.inner.learning-rate=1e-4", "--search.outer", "{eps: 1e-6}"]
    )
    assert (config.run.seed, config.search.inner.learning_rate, config.search.inner.b1) == (3, 1e-4, 0.5)
    assert (config.search.outer.eps, config.search.outer.schedule) == (1e-6, "cosine")


def test_short_names_stand_for_full_ones():
    config = load_config(None, ["--seed", "7", "--model", "x/y", "--output", "123", "--method", "vanilla"])
    assert (config.run.seed, config.model.path, config.run.output) == (7, "x/y", "123")
    assert config.method.name == "vanilla"
    assert load_config(None, ["--model", "{dropout: 0.2}"]).model.dropout == 0.2


def test_a_text_setting_takes_its_characters_as_they_stand():
    overrides = ["--mixup.mixed", "[ab]: {1,2}", "--mixup.frozen", "null", "--model.revision", "12345"]
    config = load_config(None, overrides)
    assert (config.mixup.mixed, config.mixup.frozen, config.model.revision) == ("[ab]: {1,2}", None, "12345")


@pytest.mark.parametrize("overrides", [["--seed"], ["seed"], ["--"], ["--seed", "--output", "x"], ["-s", "1"]])
def test_an_override_that_is_none_is_refused(overrides):
    assert overrides[0] in refused(None, *overrides)


def test_another_kind_of_task_or_estimator_drops_the_settings_of_the_old_one(write):
    path = write(
        "task: {source: glue, name: cola, train_size: 300}\n"
        "hypergradient: {estimator: neumann, num_terms: 2, step_size: 0.1}"
    )
    config = load_config(path, ["--hypergradient.hvp", "jvp", "--hypergradient.estimator", "unrolled"])
    assert config.hypergradient.hvp == "jvp"
    task = load_config(path, ["--task.source", "agreement"]).task
    assert (task.source, task.train_size) == ("agreement", 300)
    # What is given together with the choice is not dropped but refused, in either order.
    assert "unknown setting" in refused(path, "--task.source", "agreement", "--task.name", "cola")
    assert "unknown setting" in refused(path, "--task.name", "cola", "--task.source", "agreement")


def test_paths_in_a_file_are_relative_to_it_and_on_the_command_line_to_the_working_directory(
    write, tmp_path, monkeypatch
):
    path = write("task: {source: local, files: {train: a.csv, validation: ../b.csv}}\nmodel: {path: ./m}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(path, ["--task.files.test", "c.csv"])
    assert config.task.files.train == str(tmp_path / "a.csv")
    assert config.task.files.validation == str(tmp_path.parent / "b.csv")
    assert config.task.files.test == str(elsewhere / "c.csv")
    assert config.model.path == str(tmp_path / "m")
    assert load_config(path, ["--model", "minilm"]).model.path == "minilm"


def test_the_fingerprint_follows_what_changes_a_result_and_nothing_else():
    plain = config_fingerprint(load_config(None))
    same = [
        "--output",
        "elsewhere",
        "--run.tensorboard",
        "false",
        "--run.checkpoint_steps",
        "7",
        "--run.export",
        "true",
    ]
    assert config_fingerprint(load_config(None, same)) == plain
    for different in (["--seed", "1"], ["--search.anchor", "0.1"], ["--method", "vanilla"], ["--task.seed", "1"]):
        assert config_fingerprint(load_config(None, different)) != plain


def test_settings_cannot_be_changed_after_they_are_checked():
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).run.seed = 3


def test_every_setting_is_described():
    settings = list(all_settings())
    assert len({setting.path for setting in settings}) > 60
    assert [setting.path for setting in settings if not setting.description or not setting.allowed] == []


def test_every_setting_is_read_by_some_code():
    package = Path(agwm_jax.__file__).parent
    sources = [path.read_text() for path in package.rglob("*.py") if path.parent != package or path.stem == "build"]
    readers = [source for source in sources if "agwm_jax.settings.config" in source]
    nodes = [node for source in readers for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    read = {node.attr for node in nodes}
    # A section that is handed on whole: `source.files.model_dump()`.
    dumped = {getattr(node.value, "attr", None) for node in nodes if node.attr == "model_dump"}
    unread = {
        s.path for s in all_settings() if not {s.path.split(".")[-1]} & read and s.path.split(".")[-2] not in dumped
    }
    assert unread == set()
