"""Settings: what is read, what is refused and in which words."""

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import agwm_jax
from agwm_jax.errors import AgwmError
from agwm_jax.methods.technique import Technique
from agwm_jax.section import Choice, Section, _Several, inside, marks
from agwm_jax.settings import Config, all_settings, deciding_settings, dump_config, load_config, seed_configs

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
    search, finetune = config.method.search, config.finetune
    assert (search.inner.learning_rate, search.inner.weight_decay, search.inner.schedule) == (2e-5, 0.01, "linear")
    assert (search.outer.learning_rate, search.outer.weight_decay, search.outer.schedule) == (2e-3, 0.0, "cosine")
    assert (search.inner.gradient_clip, search.outer.gradient_clip) == (5.0, None)
    assert (finetune.optimizer.learning_rate, finetune.optimizer.gradient_clip) == (2e-5, 1.0)
    assert {part.warmup_fraction for part in (search.inner, search.outer, finetune.optimizer)} == {0.1}
    assert (search.epochs, finetune.epochs, search.validation_fraction, search.rollback) == (3, 3, 0.2, True)
    assert (config.data.batch_size, config.data.max_length) == (16, 128)
    assert (config.method.mixup.rank, config.method.mixup.noise, config.method.mixup.complement) == (1, 0.005, "convex")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_config_of_the_repository_loads_and_comes_back_from_its_dump(path, tmp_path):
    config = load_config(path)
    copy = tmp_path / "elsewhere" / "config.yaml"
    copy.parent.mkdir()
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert deciding_settings(load_config(copy)) == deciding_settings(config)
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
    path = write("method: {search: {inner: {learning_rate: 2e-5, eps: 1E-8}, anchor: .5, outer: {learning_rate: 1}}}")
    search = load_config(path).method.search
    assert (search.inner.learning_rate, search.inner.eps, search.anchor) == (2e-5, 1e-8, 0.5)
    assert load_config(None, ["--finetune.optimizer.learning_rate", "3e-4"]).finetune.optimizer.learning_rate == 3e-4
    assert load_config(write("run: {seed: 010}")).run.seed == 10  # YAML 1.1 reads 8


def test_words_that_yaml_1_1_takes_for_booleans_are_texts(write):
    task = "task: {source: local, files: {train: a, validation: b}, label_names: [no, yes]}"
    assert load_config(write(task)).task.label_names == ("no", "yes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'finetune: {optimizer: {learning_rate: "3"}}',
            ["finetune.optimizer.learning_rate", "'3' (text)", "a number > 0"],
        ),
        ("run: {seed: true}", ["run.seed", "true (true or false)", "a whole number >= 0"]),
        ("run: {seed: 1.0}", ["run.seed", "1.0 (a number)", "a whole number"]),
        ("run: {tensorboard: 1}", ["run.tensorboard", "1 (a whole number)", "true or false"]),
        ("run: {seeds: [1, x]}", ["run.seeds[1]: got 'x' (text)", "a list of whole numbers, like [0, 1]"]),
        ("run: {seeds: [1, 1]}", ["run.seeds: got [1, 1]", "a seed may occur once"]),
        ("run: {checkpoint_steps: 9}", ["run.checkpoint_steps: unknown", "did you mean run.checkpoint_minutes?"]),
        ("data: {pad_to: 2}", ["data.pad_to", "2", "a number > 0 and <= 1 or longest"]),
        ("data: {pad_to: longst}", ["data.pad_to", "'longst'", "did you mean longest?"]),
        ("data: {accumulate: 3}", ["data.accumulate: got 3", "a divisor of batch_size (16)"]),
        ("model: {dtype: float16}", ["model.dtype", "one of float32, bfloat16, float64", "did you mean bfloat16?"]),
        ("model: {frozen: '(a'}", ["model.frozen", "'(a'", "not a regular expression"]),
        ("model: 3", ["model: got 3 (a whole number)", "a section with path"]),
        ("method: {search: {anchor: true}}", ["method.search.anchor", "a number >= 0"]),
        ("method: {search: {validation_fraction: 1.0}}", ["method.search.validation_fraction", "1.0", "> 0 and < 1"]),
        ("finetune: {optimizer: {gradient_clip: 0}}", ["finetune.optimizer.gradient_clip", "a number > 0 or null"]),
        ("method: {search: {anchor: .inf}}", ["method.search.anchor", "a number >= 0"]),
        ("finetune: {optimizer: {learning_rate: .nan}}", ["finetune.optimizer.learning_rate", "a number > 0"]),
        ("method: {mixup: {rank: 0}}", ["method.mixup.rank", "0", "a whole number >= 1"]),
        ("method: {mixup: {complement: factored, rank: 2}}", ["method.mixup.rank: got 2", "factored"]),
        ("method: {name: vanila}", ["method.name: got 'vanila'", "one of agwm, ", "did you mean vanilla?"]),
        ("method: vanila", ["method.name: got 'vanila'", "did you mean vanilla?"]),
        ("method: {search: {inner: 3}}", ["method.search.inner: got 3", "a section with learning_rate"]),
        ("method: {lerning_rate: 1}", ["method.lerning_rate: unknown setting", "method.search.inner.learning_rate"]),
        (
            "method: {name: vanilla, search: {epochs: 1}}",
            [
                "method.search: unknown setting with method.name: vanilla",
                "did you mean method.search (with method.name=agwm)",
            ],
        ),
        ("serach: {}", ["serach: unknown setting", "did you mean method.search?"]),
        ("modle: {}", ["modle: unknown setting", "did you mean model?"]),
        ("1: 2", ["unknown setting"]),
        ("[1]", ["[1] (a list)", "a mapping"]),
        (
            "method: {estimator: {name: neumann}}",
            [
                "method.estimator.name: got 'neumann'",
                "method.estimator.name=implicit, method.estimator.solver.name=neumann?",
            ],
        ),
        (
            "method: {estimator: {num_terms: 2}}",
            [
                "method.estimator.num_terms: unknown setting",
                "method.estimator.solver.num_terms (with method.name=agwm,",
            ],
        ),
        ("method: {estimator: implicit}", ["method.estimator.solver: missing", "with method.estimator.name: implicit"]),
        (
            "method: {estimator: {name: implicit, solver: {name: neumann, num_terms: 0}}}",
            ["method.estimator.solver: neumann(num_terms=0): expected 1 term or more"],
        ),
        (
            "method: {estimator: {name: implicit, solver: {name: neumann, step_size: true}}}",
            ["method.estimator.solver.step_size: got true (true or false); allowed: a number or auto"],
        ),
        (
            "method: {estimator: {name: implicit, solver: neumann, resample: true}}",
            ["method.estimator: implicit(resample=True, hvp='linearize')"],
        ),
        ("task: {source: local, files: {train: a}}", ["task.files.validation: missing", "text"]),
        ("task: {source: local}", ["task.files: missing", "with task.source: local", "train, validation, test"]),
        ("task: 3", ["task: got 3", "agreement, file, glue, hub, local"]),
        ("task: {source: glu}", ["task.source: got 'glu'", "did you mean glue?"]),
        ("task: {source: hub, path: x, text_columns: [a, b, c]}", ["task.text_columns", "[a, b, c]"]),
    ],
)
def test_a_refusal_names_the_path_the_value_and_what_is_allowed(write, text, expected):
    message = refused(write(text))
    assert "config.yaml" in message
    assert [part for part in expected if part not in message] == []
    assert message.count("\n") == 0


def test_all_faults_come_in_one_report(write):
    message = refused(write("run: {seed: x, sede: 1}\ndata: {batch_size: 0}"), "--method.mixup.noise", "-1")
    assert "4 faults" in message
    assert all(path in message for path in ("run.seed", "run.sede", "data.batch_size", "method.mixup.noise"))


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
    assert (
        load_config(write(""))
        == load_config(write("method:\n  search:\n    inner:\nrun:\ntask:\n"))
        == load_config(None)
    )


def test_overrides_win_over_the_file_and_leave_the_rest_of_a_section(write):
    path = write("run: {seed: 1}\nmethod: {search: {inner: {learning_rate: 1e-3, b1: 0.5}}}")
    overrides = ["--run.seed", "3", "--method.search.inner.learning-rate=1e-4", "--method.search.outer", "{eps: 1e-6}"]
    config = load_config(path, overrides)
    search = config.method.search
    assert (config.run.seed, search.inner.learning_rate, search.inner.b1) == (3, 1e-4, 0.5)
    assert (search.outer.eps, search.outer.schedule) == (1e-6, "cosine")


def test_short_names_stand_for_full_ones():
    config = load_config(None, ["--seed", "7", "--model", "x/y", "--output", "123", "--method", "vanilla"])
    assert (config.run.seed, config.model.path, config.run.output) == (7, "x/y", "123")
    assert config.method.name == "vanilla"
    assert load_config(None, ["--model", "{dropout: 0.2}"]).model.dropout == 0.2
    assert load_config(None, ["--output", "{a}[b]*?"]).run.output == "{a}[b]*?"


def test_a_text_setting_takes_its_characters_as_they_stand():
    overrides = ["--method.mixup.mixed", "[ab]: {1,2}", "--model.frozen", "null", "--model.revision", "12345"]
    config = load_config(None, overrides)
    assert (config.method.mixup.mixed, config.model.frozen, config.model.revision) == ("[ab]: {1,2}", None, "12345")
    local = ["--task", "local", "--task.files", "{train: a, validation: b}", "--task.label_names", "[no, 2e-5x]"]
    assert load_config(None, local).task.label_names == ("no", "2e-5x")


@pytest.mark.parametrize("overrides", [["--seed"], ["seed"], ["--"], ["--seed", "--output", "x"], ["-s", "1"]])
def test_an_override_that_is_none_is_refused(overrides):
    assert overrides[0] in refused(None, *overrides)


def test_another_choice_drops_the_settings_that_it_does_not_know(write):
    path = write(
        "task: {source: glue, name: cola, train_size: 300}\n"
        "method:\n  mixup: {noise: 0.1}\n  search: {epochs: 9}\n"
        "  estimator: {name: implicit, hvp: jvp, solver: {name: neumann, num_terms: 2, step_size: 0.1}}"
    )
    estimator = load_config(path, ["--method.estimator", "unrolled"]).method.estimator
    assert estimator.model_dump() == {"name": "unrolled", "num_steps": None, "hvp": "jvp", "states": None}
    solver = ["--method.estimator.solver.num_steps", "4", "--method.estimator.solver", "gradient_descent"]
    chosen = load_config(path, solver).method.estimator.solver
    assert (chosen.name, chosen.num_steps, chosen.step_size) == ("gradient_descent", 4, 0.1)
    frozen = load_config(path, ["--method", "frozen_alpha"]).method
    assert (frozen.name, frozen.mixup.noise) == ("frozen_alpha", 0.1)
    assert load_config(path, ["--method.name", "agwm"]) == load_config(path)
    task = load_config(path, ["--task.source", "agreement"]).task
    assert (task.source, task.train_size) == ("agreement", 300)
    # What is given together with the choice is not dropped but refused, in either order.
    assert "unknown setting" in refused(path, "--task.source", "agreement", "--task.name", "cola")
    assert "unknown setting" in refused(path, "--task.name", "cola", "--task.source", "agreement")


@pytest.mark.parametrize(
    ("section", "place"),
    [("mixup", "method.mixup"), ("search", "method.search"), ("hypergradient", "method.estimator")],
)
def test_a_config_of_version_0_3_is_told_where_its_sections_are(write, section, place):
    message = refused(write(f"{section}: {{}}\nmethod: {{name: agwm}}"))
    assert f"settings of version 0.3: {section} is now {place}" in message
    assert message.count("\n") == 0
    assert f"{section} is now {place}" in refused(None, f"--{section}.x", "1")


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


def test_a_model_is_a_folder_where_there_is_one_and_a_name_elsewhere(write, tmp_path, monkeypatch):
    path = write("model: {path: org/name}")
    assert load_config(path).model.path == "org/name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert load_config(path).model.path == str(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path / "org")
    assert load_config(path, ["--model", "name"]).model.path == str(tmp_path / "org" / "name")
    assert load_config(None, ["--model", "~/m"]).model.path == str(Path.home() / "m")


def test_the_fingerprint_follows_what_changes_a_result_and_nothing_else():
    plain = deciding_settings(load_config(None))
    same = ["--output", "elsewhere", "--run.tensorboard", "false", "--run.checkpoint_minutes", "7", "--mesh.data", "2"]
    assert deciding_settings(load_config(None, same)) == plain
    for different in (
        ["--seed", "1"],
        ["--method.search.anchor", "0.1"],
        ["--method", "vanilla"],
        ["--task.seed", "1"],
    ):
        assert deciding_settings(load_config(None, different)) != plain


def test_each_seed_has_the_config_of_a_run_of_its_own():
    config = load_config(None, ["--seeds", "[3, 1]", "--output", "r"])
    alone = [load_config(None, ["--seed", str(seed), "--output", f"r/seed-{seed}"]) for seed in (3, 1)]
    assert seed_configs(config) == tuple(alone)
    assert seed_configs(alone[0]) == (alone[0],)


def test_settings_cannot_be_changed_after_they_are_checked():
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).run.seed = 3


def test_every_setting_is_described():
    settings = list(all_settings())
    assert len({setting.path for setting in settings}) > 60
    assert [setting.path for setting in settings if not setting.description or not setting.allowed] == []


def sections(
    section: type[Section] = Config, name: str = "config", key: str = ""
) -> Iterator[tuple[type[Section], str, str]]:
    """Every section below one, with the name of the setting that holds it and the key that chose it."""
    if not issubclass(section, _Several):  # a technique's name stands before its settings, as a key
        yield section, name, "name" if issubclass(section, Technique) else key
    for inner_name, field in section.model_fields.items():
        choice = next(marks(field, Choice), None)
        held = [choice.section(option) for option in choice.registry] if choice else [inside(field, {})]
        for inner in held:
            if inner is not None:
                yield from sections(inner, inner_name, choice.key if choice else "")


def reads(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Pairs of what is read as `owner.attribute`, checks of the settings themselves left out."""
    for node in ast.iter_child_nodes(tree):
        if any("validator" in ast.dump(decorator) for decorator in getattr(node, "decorator_list", ())):
            continue
        if isinstance(node, ast.Attribute):
            owner = node.value
            yield getattr(owner, "id", getattr(owner, "attr", "")).lstrip("_"), node.attr
        yield from reads(node)


def test_every_setting_is_read_by_some_code():
    package = Path(agwm_jax.__file__).parent
    read = {path: set(reads(ast.parse(path.read_text()))) for path in package.rglob("*.py")}
    outside = set().union(*(pairs for path, pairs in read.items() if package / "settings" not in path.parents))
    unread, checked = [], Counter()
    for section, holder, key in sections():
        if hasattr(section, "factory"):
            continue  # all of its settings are arguments of the factory: ruff says which of those nothing reads
        bases = [Path(inspect.getfile(base)) for base in section.__mro__ if issubclass(base, Section)]
        own = set().union(*(read[path] for path in bases))
        for name in section.model_fields:
            within = {(owner, name) for owner in ("self", "settings", "source")} & own
            whole = (holder, "model_dump") in outside | own
            if not (name == key or within or whole or (holder, name) in outside):
                unread.append(f"{section.__name__}.{name}")
            checked[section.__name__] += 1
    assert len(checked) > 15
    assert unread == []


def test_a_path_is_no_key_of_a_file(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("run.seed: 3\n")
    with pytest.raises(AgwmError, match=r"run\.seed: unknown setting; did you mean run: \{seed: \.\.\.\}\?"):
        load_config(file)


def test_techniques_are_a_section_a_list_or_a_name(tmp_path):
    said = ["--techniques.llrd.decay", "0.9", "--techniques.swa", "{}"]
    llrd, swa = load_config(None, said).techniques.chosen
    assert (llrd.name, llrd.decay, swa.name) == ("llrd", 0.9, "swa")
    assert [each.name for each in load_config(None, ["--techniques", "[swa, llrd]"]).techniques.chosen] == [
        "llrd",
        "swa",
    ]
    config = load_config(None, ["--techniques", "llrd"])
    assert config.techniques.chosen[0].decay == 0.95
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (["--techniques.lrd.decay", "0.9"], "techniques.lrd: unknown setting; did you mean techniques.llrd?"),
        (
            ["--techniques.llrd.decay", "2"],
            "techniques.llrd.decay: got 2 (a whole number); allowed: a number > 0 and <= 1",
        ),
        (["--techniques.agwm", "{}"], "techniques.agwm: unknown setting"),
        (["--method", "lora", "--techniques", "[mixout]"], "the method lora has nothing of the kind"),
        (["--method", "llrd", "--techniques", "[llrd]"], "it is the method already"),
        (["--techniques", "[r_drop, smart]"], "r_drop and smart each replace the training objective"),
        (["--techniques", "3"], "techniques: got 3 (a whole number); allowed: a section with any of"),
    ],
)
def test_techniques_that_do_not_fit_are_refused_in_a_sentence(said, sentence):
    with pytest.raises(AgwmError) as caught:
        load_config(None, said)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("value", "got"), [("balancd", "'balancd' (text)"), ("{rare: -1}", "-1 (a whole number)"), ("[1]", "[1] (a list)")]
)
def test_a_wrong_value_of_a_setting_of_several_kinds_is_told_once(value, got):
    with pytest.raises(AgwmError) as raised:
        load_config(None, ["--loss.class_weights", value])
    assert str(raised.value).count("allowed:") == 1
    assert f"got {got}; allowed: balanced or numbers > 0 by name, like {{a: 0.5, b: 2}} or null" in str(raised.value)
