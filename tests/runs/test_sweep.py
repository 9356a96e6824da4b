"""A study: what it plans and refuses; real processes that fail, are stopped and go on; the table of results."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import QUICK, SETTINGS

from agwm_jax import AgwmError
from agwm_jax.runs.sweep import plan, read_study, rows, select

SECONDS = 600
ARMS = {
    "vanilla": {},
    # The checks of its settings know no data: that five folds of 40 examples are short of a batch shows in its run.
    "folds": {"method": "agwm", "method.search": {"splits": "folds", "num_splits": 5, "epochs": 1}},
    "half": {"method": "fixed_gate", "method.gate": 0.5},
}


@pytest.fixture
def study(tmp_path, tiny_checkpoint):
    """``study(changes) -> Path`` of a study on the generated task."""
    (tmp_path / "task.yaml").write_text("task: {source: agreement}\n")
    own = {name: value for name, value in SETTINGS.items() if not name.startswith("method.")}
    own |= {name: "${rate}" for name in own if name == "finetune.optimizer.learning_rate"}
    own |= {"model": str(tiny_checkpoint), "data.batch_size": 16, "run.compilation_cache": str(tmp_path / "xla")}

    def write(**changes):
        said = {
            "tasks": {"agreement": "task.yaml"},
            "settings": {
                n: yaml.safe_load(v) if isinstance(v, str) and v[0] not in "$/" else v for n, v in own.items()
            },
            "arms": ARMS,
            "grid": {"rate": [1e-3, 1e-2]},
            "seeds": [0, 1],
            "tuning_seeds": [7],
        }
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False))
        return path

    return write


def planned(path, *overrides):
    return plan(read_study(path), path.parent, overrides)


def test_every_arm_at_every_point_with_all_seeds(study):
    cells = planned(study())
    names = [f"agreement/{arm}/rate={rate}" for rate in ("0.001", "0.01") for arm in ARMS]
    assert [cell.name for cell in cells] == names
    assert {cell.seeds for cell in cells} == {(0, 1, 7)}
    words = cells[-1].words
    assert words[words.index("--finetune.optimizer.learning_rate") + 1] == "0.01"
    assert words[words.index("--method.gate") + 1] == "0.5"
    (kept,) = select(planned(study(), "--run.compilation_cache", "of-${task}"), ["*/half/*=0.001"])
    assert kept.name == "agreement/half/rate=0.001"
    assert kept.words[-2:] == ("--run.compilation_cache", "of-agreement")


def test_the_plan_of_the_study_is_one_that_can_be_run(request):
    cells = planned(request.config.rootpath / "docs" / "study" / "gate.yaml")
    assert len(cells) == 3 * 3 * 10
    controls = {cell.arm: cell.control for cell in cells}
    assert controls["agwm"] == "restart"
    assert controls["agwm_after_one"] == "soup"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arm": {}}, r"study.yaml: no study\n  arm: .* did you mean arms\?"),
        ({"seeds": []}, "seeds: "),
        ({"tuning_seeds": [1]}, "one is given twice"),
        ({"grid": {"seed": [1, 2]}}, "grid: seed is a column of the table of results"),
        ({"arms": {"vanilla": {"finetune.epochs": "${rat}"}}}, r"arm vanilla: \$\{rat\} is no variable .* mean rate\?"),
        ({"arms": {"vanilla": {"finetune.epoch": 2}}}, r"finetune.epoch: .* did you mean finetune.epochs\?"),
        ({"arms": {"a/b": {}}}, "arms"),
        ({"controls": {"half": "vanila"}}, r"controls: .*vanila.* is no arm; did you mean vanilla\?"),
        ({"tasks": {"agreement": "other.yaml"}}, "other.yaml: no such config file"),
    ],
)
def test_a_study_with_a_fault_is_refused_before_anything_runs(study, changes, sentence):
    with pytest.raises(AgwmError, match=sentence):
        planned(study(**changes))


def test_a_study_that_is_no_file_or_names_no_cell(study, tmp_path):
    with pytest.raises(AgwmError, match=r"none.yaml: No such file"):
        read_study(tmp_path / "none.yaml")
    with pytest.raises(AgwmError, match=r"--only x/\*: no cell of the 6 is so named, such as agreement/vanilla"):
        select(planned(study()), ["x/*"])


def test_it_goes_on_after_ctrl_c_and_past_a_failure_and_leaves_one_table(study, tmp_path):
    arms = {**ARMS, "vanilla": {"finetune.epochs": 80}}  # long enough to be stopped in the middle
    path, output = study(grid={"rate": [1e-3]}, arms=arms), tmp_path / "runs"
    command = [sys.executable, "-m", "agwm_jax", "sweep", str(path), "--output", str(output), "--workers", "2"]
    options = {
        "env": {**os.environ, **QUICK},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    process = subprocess.Popen(command, start_new_session=True, **options)
    metrics = output / "agreement" / "vanilla" / "rate=0.001" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 130, text
    assert "stopping: the runs that are under way save their state first" in text
    assert "run the same command again to continue" in text
    assert "Traceback" not in text
    assert not (metrics.parent / "result.json").exists()
    assert "run the same command again to continue" in (metrics.parents[1] / "log.txt").read_text()

    done = subprocess.run(command, **options, check=False, timeout=SECONDS)
    assert done.returncode == 2, done.stdout
    assert "1 of 3 cells failed" in done.stdout
    log = output / "agreement" / "folds" / "rate=0.001" / "log.txt"
    assert str(log) in done.stdout.replace("\n", "")
    assert "5 folds of 40 training examples" in log.read_text()

    table = pq.read_table(output / "results.parquet").to_pylist()
    assert [(row["arm"], row["seed"]) for row in table] == [(a, s) for a in ("vanilla", "half") for s in (0, 1, 7)]
    assert table == list(rows(planned(path), output))
    assert {row["rate"] for row in table} == {1e-3}
    assert {(row["arm"], row["control"]) for row in table} == {("vanilla", ""), ("half", "vanilla")}
    assert [row["seed"] for row in table if row["tuning"]] == [7, 7]
    assert all(-100 <= row[row["reported"]] <= 100 and row["seconds"] > 0 for row in table)

    finished = (output / "agreement" / "half" / "rate=0.001" / "log.txt").stat().st_mtime_ns
    report = [sys.executable, "-m", "agwm_jax", "report", str(output / "results.parquet"), "--output", str(tmp_path)]
    told = subprocess.run(report, **options, check=False, timeout=SECONDS)
    assert told.returncode == 0, told.stdout
    assert "| `half` | rate 0.001 |" in told.stdout

    again = subprocess.run([*command, "--only", "*/half/*"], **options, check=False, timeout=SECONDS)
    assert again.returncode == 0, again.stdout
    assert (output / "agreement" / "half" / "rate=0.001" / "log.txt").stat().st_mtime_ns == finished
    assert pq.read_table(output / "results.parquet").to_pylist() == table  # of all cells, not of that one alone

    study(grid={"rate": [1e-3]}, arms={**arms, "half": {**ARMS["half"], "finetune.epochs": 1}})
    edited = subprocess.run(command, **options, check=False, timeout=SECONDS)
    assert edited.returncode == 2, edited.stdout
    assert "holds a run of another config (finetune.epochs" in edited.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process can be bound to its parent")
def test_what_a_killed_sweep_started_does_not_outlive_it(study, tmp_path):
    """Else it would go on writing, and the same command would find its folder taken."""
    path, output = study(grid={"rate": [1e-3]}, arms={"vanilla": {"finetune.epochs": 2000}}), tmp_path / "runs"
    command = [sys.executable, "-m", "agwm_jax", "sweep", str(path), "--output", str(output)]
    process = subprocess.Popen(command, env={**os.environ, **QUICK}, stdout=subprocess.DEVNULL)
    metrics = output / "agreement" / "vanilla" / "rate=0.001" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    tasks = Path(f"/proc/{process.pid}/task")
    children = [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]
    process.kill()
    process.wait()
    assert children
    deadline = time.monotonic() + 30
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, children))


def runs(number: str) -> bool:
    """Whether there is a process of that number that is no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
