"""The command line: which call is made, what is printed, and the exit code."""

import errno
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest

from agwm_jax.cli import main
from agwm_jax.errors import AgwmError

RESULT = {"task": "cola", "metric": "matthews", "split": "validation", "score": 0.25, "seed": 1}


@pytest.fixture
def library(monkeypatch):
    """Stands in for the library: notes each call, answers or raises what `answer` holds under its name."""
    calls, answer = [], {}

    def module(path: str, *names: str) -> None:
        def function(name):
            def noted(*arguments, **options):
                calls.append((name, *arguments, *options.values()))
                if isinstance(answer.get(name), BaseException):
                    raise answer[name]
                return answer.get(name)

            return noted

        stand_in = types.ModuleType(path)
        for name in names:
            setattr(stand_in, name, function(name))
        monkeypatch.setitem(sys.modules, path, stand_in)

    module("agwm_jax.runs.run", "train_seeds")
    module("agwm_jax.runs.finished", "evaluate", "predict_file", "export")
    module("agwm_jax.report", "write_report")
    module("agwm_jax.selection.compare", "compare")
    sys.modules["agwm_jax.selection.compare"].MODEL = "model"
    return types.SimpleNamespace(calls=calls, answer=answer)


def agwm(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "agwm_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_train_gets_the_config_with_its_overrides(library, capsys, tmp_path):
    library.answer["train_seeds"] = [RESULT]
    path = tmp_path / "c.yaml"
    path.write_text("run: {seed: 1}")
    assert (
        main(["train", "--config", str(path), "--method.search.num_splits", "5", "--output", str(tmp_path / "run")])
        == 0
    )
    ((name, config),) = library.calls
    assert (name, config.run.seed, config.method.search.num_splits) == ("train_seeds", 1, 5)
    printed = capsys.readouterr().out
    assert "matthews on validation = 0.2500" in printed
    assert str(tmp_path / "run") in printed


def test_train_without_a_config_takes_the_defaults(library):
    library.answer["train_seeds"] = [RESULT]
    assert main(["train", "--seed", "3"]) == 0
    assert library.calls[0][1].run.seed == 3


def test_several_seeds_are_summed_up(library, capsys):
    library.answer["train_seeds"] = [RESULT, {**RESULT, "seed": 4, "score": 0.35}]
    assert main(["train", "--seeds", "[1, 4]"]) == 0
    assert library.calls[0][1].run.seeds == (1, 4)
    assert "matthews on validation = 0.3000 +- 0.0707 (by seed 1: 0.2500, 4: 0.3500)" in capsys.readouterr().out
    assert main(["train", "--seeds", "[1, 1]"]) == 2
    assert "run.seeds: got [1, 1]; a seed may occur once" in capsys.readouterr().err


def test_a_negative_value_is_a_value(library, capsys):
    assert main(["train", "--method.search.anchor", "-0.1"]) == 2
    assert "method.search.anchor: got -0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        (["eval", "r"], ("evaluate", Path("r"), None, None, None)),
        (["eval", "r", "--split", "test"], ("evaluate", Path("r"), "test", None, None)),
        (["eval", "r", "--file", "f.csv"], ("evaluate", Path("r"), None, Path("f.csv"), None)),
        (["eval", "r", "--model", "m"], ("evaluate", Path("r"), None, None, "m")),
        (["predict", "[r]*", "i{}", "o?"], ("predict_file", Path("[r]*"), Path("i{}"), Path("o?"), None, None)),
        (
            ["predict", "r", "i", "o", "--model", "m", "--separator", ";"],
            ("predict_file", Path("r"), Path("i"), Path("o"), "m", ";"),
        ),
        (["export", "r", "f"], ("export", Path("r"), Path("f"), None)),
        (["export", "r", "f", "--model", "m"], ("export", Path("r"), Path("f"), "m")),
        (["report", "r", "s"], ("write_report", [Path("r"), Path("s")], Path("report"), "vanilla")),
        (["report", "r", "--output", "o", "--baseline", "b"], ("write_report", [Path("r")], Path("o"), "b")),
    ],
)
def test_each_command_makes_its_call(library, arguments, call):
    library.answer["evaluate"] = {"accuracy": 0.5}
    library.answer["write_report"] = types.SimpleNamespace(markdown="", files=[Path("report/report.md")])
    assert main(arguments) == 0
    assert library.calls == [call]


def test_the_help_of_compare_names_the_methods_that_are_tried(capsys):
    from agwm_jax.selection.trials import METHODS_TRIED

    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert f"default: {' '.join(METHODS_TRIED)}" in " ".join(capsys.readouterr().out.split())


def test_compare_hands_on_its_options_and_the_settings(library, capsys):
    words = ["--text", "a", "b", "--label", "c", "--budget", "2min", "--methods", "probe", "--finetune.epochs", "2"]
    assert main(["compare", "f.csv", *words, "--output", "o"]) == 0
    ((name, *given),) = library.calls
    defaults = (None, None)  # no group, no test file
    settings = ["--finetune.epochs", "2"]
    expected = [Path("f.csv"), "minilm", Path("o"), ["a", "b"], "c", *defaults, ["probe"], 5, 120.0, ",", settings]
    assert (name, given) == ("compare", expected)
    assert "label texts: agwm predict o/model TEXTS.csv LABELLED.csv" in capsys.readouterr().out
    library.calls.clear()
    assert main(["compare", "f.csv", "--budget", "none"]) == 0
    assert library.calls[0][10] is None
    assert main(["compare", "f.csv", "--all", "--methods", "probe"]) == 2
    assert main(["compare", "f.csv", "--budget", "soon"]) == 2
    assert len(library.calls) == 1


def test_a_report_is_printed_with_its_place(library, capsys):
    library.answer["write_report"] = types.SimpleNamespace(markdown="| agwm |", files=[Path("report/report.md")])
    main(["report", "r"])
    assert capsys.readouterr().out == "| agwm |\nreport: report/report.md\n"


def test_a_warning_is_one_sentence_without_a_place_in_the_code(library, capsys):
    library.answer["export"] = "mean pooling"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["export", "r", "f"]) == 0
    assert capsys.readouterr().err == "agwm: warning: transformers will not give the same logits: mean pooling\n"


def test_scores_are_a_table(library, capsys):
    library.answer["evaluate"] = {"accuracy": 0.51234, "groups": {"reflexive": {"accuracy": 1.0, "n": 12}}}
    main(["eval", "r"])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["accuracy", "0.5123"],
        ["groups.reflexive.accuracy", "1.0000"],
        ["groups.reflexive.n", "12"],
    ]


def chained(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (AgwmError("the file is empty"), 2, "the file is empty"),
        (chained(RuntimeError("loading failed"), AgwmError("no label column")), 2, "no label column"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 2, "/x/y: the disk is full"),
        (chained(ValueError("save"), OSError(errno.ENOSPC, "No space")), 2, "the disk is full"),
        (RuntimeError("INTERNAL: write failed: No space left on device [/x]"), 2, "the disk is full"),
        (OSError(errno.EROFS, "Read-only", "/x"), 2, "/x: the disk is read-only"),
        (PermissionError(errno.EACCES, "denied", "/x"), 2, "/x: no permission"),
        (FileNotFoundError(errno.ENOENT, "none", "/x"), 2, "/x: no such file"),
        (OSError("host unreachable\nat all"), 2, "host unreachable at all"),
        (MemoryError(), 2, "out of memory"),
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), 2, "agwm-jax[train]"),
        (KeyError("b"), 1, "unexpected KeyError: 'b'; run again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("saved at step 3"), 130, "saved at step 3"),
    ],
)
def test_what_goes_wrong_is_one_line_and_an_exit_code(library, capsys, error, code, expected):
    library.answer["train_seeds"] = error
    assert main(["train"]) == code
    printed = capsys.readouterr().err
    assert expected in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(library, capsys, place):
    library.answer["train_seeds"] = AgwmError("the file is empty")
    arguments = ["train", "--seed", "1"]
    arguments.insert(place, "--debug")
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("agwm: the file is empty\n")


@pytest.mark.parametrize("arguments", [["eval"], ["eval", "r", "--spilt", "x"], ["trian"], ["report"]])
def test_a_command_that_is_not_understood_ends_with_2(library, capsys, arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert library.calls == []
    assert "usage: agwm" in capsys.readouterr().err


def test_a_split_and_a_file_exclude_each_other(library, capsys):
    assert main(["eval", "r", "--split", "test", "--file", "f"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_help_of_train_fits_a_screen_and_names_every_section(capsys):
    from agwm_jax.settings import Config

    assert main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert set(Config.model_fields) <= {line.split()[0] for line in lines if line.strip()}


def test_settings_lists_all_and_those_that_match(capsys):
    from agwm_jax.settings import all_settings

    assert main(["settings"]) == 0
    printed = capsys.readouterr().out
    assert [s.path for s in all_settings() if f"  --{s.path} ({s.default})\n" not in printed] == []
    assert "with method.name=agwm, method.estimator.name=implicit, method.estimator.solver.name=neumann:" in printed
    assert main(["settings", "^finetune", "LEARNING"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "--" in line] == [
        "  --finetune.optimizer.learning_rate (2.0e-05)"
    ]
    assert main(["settings", "no_such_setting"]) == 2
    assert main(["settings", "(a"]) == 2
    assert "not a regular expression" in capsys.readouterr().err


def test_list_shows_what_is_registered(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.replace("\n  ", " ").splitlines()
    kinds = dict(line.split(": ", 1) for line in lines)
    assert set(kinds) == {"methods", "estimators", "solvers", "families", "tasks", "metrics"}
    assert {"agwm", "vanilla"} <= set(kinds["methods"].split(", "))
    for kind in kinds:
        assert main(["list", kind]) == 0
        first = capsys.readouterr().out.split()[0]
        assert first == kinds[kind].split(", ")[0]


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    assert "train" in capsys.readouterr().out


def test_a_wrong_setting_in_a_real_process_leaves_no_traceback(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {epoch: 3}")
    answer = agwm("train", "--config", path)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.splitlines()[-1].startswith(f"agwm: {path}: finetune.epoch: unknown setting; did you mean")
    assert "Traceback" not in answer.stderr
    assert "Traceback" in agwm("train", "--config", path, "--debug").stderr


def test_a_reader_that_closes_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "agwm_jax", "train", "--help"]
        answer = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert answer.stderr == ""


def test_ctrl_c_in_a_real_process_ends_with_130():
    program = (
        "import sys, types, time\n"
        "from agwm_jax.cli import main\n"
        "def train_seeds(config):\n    print('started', flush=True); time.sleep(60)\n"
        "sys.modules['agwm_jax.runs.run'] = types.SimpleNamespace(train_seeds=train_seeds)\n"
        "sys.exit(main(['train']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == "agwm: interrupted\n"


def test_a_stream_that_cannot_print_a_character_prints_something():
    program = "from agwm_jax.cli import main; main([]); print('ä±')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert (answer.returncode, answer.stdout.splitlines()[-1]) == (0, r"\xe4\xb1")


def test_a_platform_that_is_not_there_is_named_with_those_that_are():
    program = (
        "import sys, types\n"
        "from agwm_jax.cli import main\n"
        "def export(*arguments, **options):\n    import jax; jax.devices()\n"
        "sys.modules['agwm_jax.runs.finished'] = types.SimpleNamespace(export=export)\n"
        "sys.exit(main(['export', 'r', 'f']))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert answer.returncode == 2
    assert "JAX_PLATFORMS=cuda asks for devices that JAX does not find here; it finds cpu: unset" in answer.stderr


def test_deterministic_kernels_are_asked_for_before_a_device_starts(library, monkeypatch, capsys):
    from jax._src import xla_bridge

    library.answer["train_seeds"] = [RESULT]
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    assert main(["train"]) == 0
    assert os.environ["XLA_FLAGS"] == "--xla_x=1"
    for _ in range(2):
        assert main(["train", "--run.deterministic", "true"]) == 0
        assert os.environ["XLA_FLAGS"] == "--xla_x=1 --xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: True)
    assert main(["train", "--run.deterministic", "true"]) == 2
    assert "started its devices already" in capsys.readouterr().err


def test_help_needs_no_library():
    program = "import sys; from agwm_jax.cli import main; main(['--help']); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(answer.stdout.splitlines()[-1].split())
    assert not loaded & {"jax", "numpy", "pydantic", "yaml", "optax"}


def test_methods_lists_each_with_cost_and_paper(capsys):
    assert main(["methods"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "llrd + Plain fine-tuning whose learning rate falls" in out
    assert "(cost search: of the estimator; leverage: 4; finetune: 1; arXiv 2403.12918)" in out
