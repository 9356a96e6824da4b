"""Several real processes on the loopback are one run: they learn what one learns, stop together and go on together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from agwm_jax.cli import main
from agwm_jax.engine import processes
from agwm_jax.errors import AgwmError
from tests.runs.conftest import QUICK

COUNT = 2
OPTIONS = [
    *("--hypergradient.estimator", "first_order", "--search.rollback", "false"),
    *("--search.epochs", "4", "--finetune.epochs", "20", "--run.chunk_steps", "4", "--run.checkpoint_steps", "24"),
]


ONE_DEVICE = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}


def free_port():
    """One of those that JAX takes for a SLURM job by its number."""
    for port in np.random.default_rng().permutation(np.arange(61440, 65535)):
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", int(port)))
            return int(port)
    return pytest.fail("no free port")


def by_hand(number, port):
    address = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(COUNT), "--process-id", str(number)]
    return address, {}


def by_slurm(number, port):
    """What `srun` tells a task."""
    names = {"JOB_ID": port - 61440, "STEP_NODELIST": "127.0.0.1", "NTASKS": COUNT, "PROCID": number, "LOCALID": number}
    return ["--coordinator", "auto"], {f"SLURM_{name}": str(value) for name, value in names.items()}


def start(settings, folder, launch=by_hand):
    """One process a device: each reads half of every batch."""
    command = [sys.executable, "-m", "agwm_jax", "train", *settings, *OPTIONS, "--mesh.data", "all"]
    command += ["--run.compilation_cache", str(folder.parents[1] / "agwm-test-xla"), "--output", str(folder)]
    launched = [launch(number, port) for port in [free_port()] for number in range(COUNT)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen([*command, *own], env={**os.environ, **QUICK, **ONE_DEVICE, **variables}, **options)
        for own, variables in launched
    ]


def finish(started, seconds=240):
    """Exit codes and what was printed; a process that hangs fails the test."""
    texts = []
    try:
        for process in started:
            texts.append(process.communicate(timeout=seconds)[0])
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        pytest.fail(f"a process hangs; the others said: {texts}")
    return [process.returncode for process in started], texts


def records(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def wait_for(started, folder, phase, step):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if any(r["phase"] == phase and r["step"] >= step for r in records(folder)[-1:]):
            return
        if any(process.poll() is not None for process in started):
            break
        time.sleep(0.02)
    for process in started:
        process.kill()
    pytest.fail(f"{phase} {step} was not reached: {[process.communicate()[0] for process in started]}")


def single(settings, folder):
    environment = {**os.environ, **QUICK, **ONE_DEVICE}
    cache = ["--run.compilation_cache", str(folder.parents[1] / "agwm-test-xla")]
    command = [sys.executable, "-m", "agwm_jax", "train", *settings, *OPTIONS, *cache, "--output", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The same run in one process on one device."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    done = single(settings, folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_end(folder, alone):
    ours, theirs = records(folder), records(alone)
    assert [(r["phase"], r["step"]) for r in ours] == [(r["phase"], r["step"]) for r in theirs]
    for name in ("loss", "outer_loss", "hypergradient_norm"):
        values = [[r[name] for r in lines if name in r] for lines in (ours, theirs)]
        np.testing.assert_allclose(*values, rtol=1e-2, atol=1e-4, err_msg=name)
    # The first steps, before rounding has grown.
    np.testing.assert_allclose([r["loss"] for r in ours[:6]], [r["loss"] for r in theirs[:6]], rtol=1e-5)
    weights = [load_file(path / "task.safetensors") for path in (folder, alone)]
    for path, value in weights[1].items():
        if not path.endswith("key.bias"):  # has no gradient but rounding, of which Adam makes whole steps
            np.testing.assert_allclose(weights[0][path], value, atol=3e-3, err_msg=path)
    results = [json.loads((path / "result.json").read_text()) for path in (folder, alone)]
    assert results[0]["scores"]["test"] == pytest.approx(results[1]["scores"]["test"], abs=0.06)


def test_two_processes_give_the_result_of_one_and_only_the_first_reports(settings, alone, tmp_path):
    folder = tmp_path / "run"
    codes, texts = finish(start(settings, folder))
    assert codes == [0, 0], texts
    assert_same_end(folder, alone)
    assert json.loads((folder / "result.json").read_text())["mesh"] == "data 2"
    assert "matthews on test" in texts[0]
    assert "matthews on test" not in texts[1]
    assert not list((folder / "checkpoints").glob("[0-9]*"))


def test_one_is_told_to_stop_and_all_do_one_dies_and_all_end_and_another_mesh_goes_on(settings, alone, tmp_path):
    folder = tmp_path / "run"
    started = start(settings, folder)
    wait_for(started, folder, "search-0", 4)
    started[1].send_signal(signal.SIGINT)
    codes, texts = finish(started, 60)
    assert codes == [130, 130], texts
    assert all("the state is saved: run the same command again" in text for text in texts)

    started = start(settings, folder, by_slurm)
    wait_for(started, folder, "finetune", 26)
    os.kill(started[1].pid, signal.SIGKILL)
    began = time.monotonic()
    codes, texts = finish(started, 90)
    assert time.monotonic() - began < 60
    assert codes == [2, -signal.SIGKILL], texts
    assert "another process of this run died or cannot be reached" in texts[0]
    assert "start the same command on all processes again" in texts[0]
    assert "Traceback" not in texts[0]

    # Written by two processes on two devices, read by one on one.
    done = single(settings, folder)
    assert done.returncode == 0, done.stderr
    assert "continuing in finetune after step" in done.stderr
    assert_same_end(folder, alone)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--num-processes", "2"], "need --coordinator HOST:PORT"),
        (
            ["--coordinator", "node0"],
            "--coordinator node0: expected host:port of process 0, such as node0:1234",
        ),
        (["--coordinator", "node0:1"], "needs --num-processes N and --process-id I"),
        (
            ["--coordinator", "node0:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id 2 is outside 0 to 1, the numbers of --num-processes 2",
        ),
        (["--coordinator", "auto", "--process-id", "1"], "takes the number of processes from the cluster"),
        (["--coordinator", "auto"], "no cluster was recognised"),
    ],
)
def test_a_mistake_in_the_launch_gets_a_sentence(options, words, capsys, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    assert main(["train", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_a_process_does_not_see_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "any_of", bool)
    monkeypatch.setattr(processes, "_SHARED_FILE_SECONDS", 0)
    assert not processes.all_see(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").touch()
    assert processes.all_see(tmp_path / "config.yaml")


def test_an_error_of_a_lost_peer_is_told_from_others(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    gone = processes.lost(RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore"))
    assert isinstance(gone, AgwmError)
    assert "(UNKNOWN: Gloo AllGather failed: Connection reset by peer)" in str(gone)
    assert processes.lost(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) is None
    assert processes.lost(ValueError("Connection reset by peer")) is None
    monkeypatch.setattr(processes, "several", lambda: False)
    assert processes.lost(RuntimeError("Gloo")) is None
