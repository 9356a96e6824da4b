"""A real process, killed in the middle of search and of finetune, ends with the bits of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tiny import QUICK, words

# The direction of the largest eigenvalue, found by power iterations, is carried from step to step.
LONG = {
    "method.estimator": {"name": "implicit", "solver": {"name": "neumann", "num_terms": 2, "step_size": "auto"}},
    "method.search.anchor": 0.1,
    "method.search.num_splits": 2,
    "method.search.epochs": 8,
    "method.search.leverage": "false",
    "finetune.epochs": 8,
    "run.checkpoint_minutes": 0.001,
}
SECONDS = 600  # a process that takes longer hangs, however busy the machine


def start(settings, folder):
    cache = {"run.compilation_cache": folder.parents[1] / "agwm-test-xla"}  # one compile serves all processes
    typed = words({**settings, **LONG, **cache, "output": folder})
    command = [sys.executable, "-m", "agwm_jax", "train", *typed]
    environment = {**os.environ, **QUICK, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process) -> str:
    text = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 0, text
    return text


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(process, folder, phase, step):
    """Return once the run has recorded that step, and a checkpoint is there."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended before {phase} {step}: {process.communicate()[0]}")
        saved = list((folder / "checkpoints").glob("[0-9]*")) if (folder / "checkpoints").exists() else []
        if saved and any(r["phase"] == phase and r["step"] >= step for r in records(folder)[-1:]):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"{phase} {step} was not reached: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """The same run, never stopped."""
    folder = tmp_path_factory.mktemp("resume") / "undisturbed"
    finish(start(settings, folder))
    return folder


def assert_same_end(folder, undisturbed):
    assert (folder / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    ours, theirs = (load_file(each / "variables.safetensors") for each in (folder, undisturbed))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    ours, theirs = (json.loads((each / "result.json").read_text()) for each in (folder, undisturbed))
    assert (ours["scores"], ours["groups"]) == (theirs["scores"], theirs["groups"])


def test_killed_in_both_stages_and_stopped_by_ctrl_c_it_ends_with_the_same_bits(settings, undisturbed, tmp_path):
    folder = tmp_path / "run [1]? {*}"  # what a glob reads
    process = start(settings, folder)
    wait_for(process, folder, "search-0", 8)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=SECONDS)[0]
    assert process.returncode == 130, text
    assert text.index("heard SIGINT: stopping after the steps that run now") < text.index("run the same command again")
    assert "Traceback" not in text
    for phase, step in (("search-1", 12), ("finetune", 12)):
        process = start(settings, folder)
        wait_for(process, folder, phase, step)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "result.json").exists()
    assert "continuing in" in finish(start(settings, folder))
    assert_same_end(folder, undisturbed)
