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

from tests.runs.conftest import QUICK

# The solution of the linear system and the direction of its largest eigenvalue are carried from step to step.
LONG = [
    "--hypergradient.estimator",
    "gradient_descent",
    "--search.anchor",
    "0.1",
    "--search.num_splits",
    "2",
    "--search.epochs",
    "8",
    "--finetune.epochs",
    "8",
    "--run.keep_checkpoints",
    "3",
    "--run.checkpoint_steps",
    "8",
]


def start(settings, folder):
    cache = ["--run.compilation_cache", str(folder.parents[1] / "agwm-test-xla")]  # one compile serves all processes
    command = [sys.executable, "-m", "agwm_jax", "train", *settings, *LONG, *cache, "--output", str(folder)]
    environment = {**os.environ, **QUICK}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return [json.loads(line) for line in whole]


def wait_for(process, folder, phase, step):
    """Return once the run has recorded that step."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the run ended before {phase} {step}: {process.communicate()[0]}")
        if any(r["phase"] == phase and r["step"] >= step for r in records(folder)[-1:]):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"{phase} {step} was not reached: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory) -> Path:
    """The same run, never stopped."""
    folder = tmp_path_factory.mktemp("resume") / "undisturbed"
    process = start(settings, folder)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    return folder


def assert_same_end(folder, undisturbed):
    assert (folder / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
    for name in ("task.safetensors", "alpha.safetensors"):
        ours, theirs = load_file(folder / name), load_file(undisturbed / name)
        assert ours.keys() == theirs.keys()
        assert [path for path in ours if ours[path].tobytes() != theirs[path].tobytes()] == []
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (folder, undisturbed))
    assert ours["scores"] == theirs["scores"]
    assert ours["groups"] == theirs["groups"]


def test_sigkill_in_search_and_in_finetune_changes_no_bit(settings, undisturbed, tmp_path):
    folder = tmp_path / "run"
    for phase, step in (("search-1", 12), ("finetune", 12)):
        process = start(settings, folder)
        wait_for(process, folder, phase, step)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (folder / "result.json").exists()
    process = start(settings, folder)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "continuing in finetune after step" in text
    assert_same_end(folder, undisturbed)


def test_ctrl_c_saves_and_says_how_to_go_on_and_a_damaged_checkpoint_costs_no_bit(settings, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = start(settings, folder)
    wait_for(process, folder, "search-0", 16)
    process.send_signal(signal.SIGINT)
    text = process.communicate()[0]
    assert process.returncode == 130
    assert "run the same command again to continue" in text
    assert "Traceback" not in text
    newest = max((p for p in (folder / "checkpoints").iterdir() if p.is_dir()), key=lambda p: int(p.name))
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    process = start(settings, folder)
    text = process.communicate()[0]
    assert process.returncode == 0, text
    assert "damaged" in text
    assert "continuing in search-0 after step" in text
    assert_same_end(folder, undisturbed)
