"""Two real processes on the loopback are one run: they learn what one learns, stop together and go on together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from agwm_jax.engine import processes
from agwm_jax.errors import AgwmError

SECONDS = 240


def free_port():
    for port in np.random.default_rng().permutation(np.arange(20000, 30000)):
        with socket.socket() as listening, contextlib.suppress(OSError):
            listening.bind(("127.0.0.1", int(port)))
            return int(port)
    return pytest.fail("no free port")


def environment(folder):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    one_device = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return {**os.environ, **one_device, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **cache}


def command(folder, *options):
    return [sys.executable, "-m", "tests.engine.worker", str(folder), *map(str, options)]


def both(folder, *options_of_second):
    """Exit codes and what was printed; nothing is left running."""
    port = free_port()
    own = ((), options_of_second)
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(
                    command(folder, "--port", port, "--process", number, *options),
                    env=environment(folder),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for number, options in enumerate(own)
        ]
        try:
            texts = [process.communicate(timeout=SECONDS)[0] for process in started]
        finally:
            for process in started:
                process.kill()
    return [process.returncode for process in started], texts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process on one device learns."""
    folder = tmp_path_factory.mktemp("processes") / "alone"
    done = subprocess.run(command(folder), env=environment(folder), capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "learnt.npz")


def test_one_stops_all_one_dies_and_all_end_and_they_go_on_to_the_result_of_one(alone, tmp_path):
    folder = tmp_path / "run"
    codes, texts = both(folder, "--interrupt-at", 2)
    assert codes == [130, 130], texts
    assert all("the state is saved: run the same command again" in text for text in texts)

    codes, texts = both(folder, "--kill-at", 3)
    assert codes == [2, -signal.SIGKILL], texts
    assert "another process of this run died or cannot be reached" in texts[0]
    assert "start the same command on all processes again" in texts[0]
    assert "Traceback" not in texts[0]

    codes, texts = both(folder)
    assert codes == [0, 0], texts
    assert all("continuing in " in text for text in texts)
    found = np.load(folder / "learnt.npz")
    for name in alone.files:
        expected = alone[name][-len(found[name]) :] if name == "losses" else alone[name]
        np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        (("node0",), "--coordinator node0: expected host:port of process 0, such as node0:1234"),
        (("node0:1",), "needs --num-processes N and --process-id I"),
        (("node0:1", 2, 2), "--process-id 2 is outside 0 to 1, the numbers of --num-processes 2"),
        (("auto", None, 1), "takes the number of processes from the cluster"),
        (("auto",), "no cluster was recognised"),
    ],
)
def test_a_mistake_in_the_launch_gets_a_sentence(launch, words, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(AgwmError) as caught:
        processes.connect(processes.Launch(*launch))
    assert words in str(caught.value)


def test_a_folder_that_a_process_does_not_see_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "any_of", bool)
    monkeypatch.setattr(processes, "_SHARED_FILE_SECONDS", 0)
    assert not processes.all_see(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").touch()
    assert processes.all_see(tmp_path / "config.yaml")


def caused(error, cause):
    error.__cause__ = cause
    return error


def runtime_error(text):
    return jax.errors.JaxRuntimeError(text)


@pytest.mark.parametrize(
    "error",
    [
        runtime_error("UNKNOWN: Gloo AllGather failed: Connection reset by peer\nmore"),
        runtime_error("FAILED_PRECONDITION: Buffer Definition Event: Error dispatching computation"),
        runtime_error("DEADLINE_EXCEEDED: Barrier timed out"),
        runtime_error("INTERNAL: whatever it was waiting for"),
        ValueError("UNAVAILABLE: failed to connect to all addresses"),
        caused(AttributeError("of a library"), runtime_error("CANCELLED: RPC cancelled")),
    ],
)
def test_whatever_is_raised_when_a_peer_is_lost_is_one_sentence(monkeypatch, error):
    monkeypatch.setattr(processes, "several", lambda: True)
    gone = processes.lost(error)
    assert isinstance(gone, AgwmError)
    assert str(gone).startswith("process 0 of 1: another process of this run died or cannot be reached (")
    assert "\n" not in str(gone)
    monkeypatch.setattr(processes, "several", lambda: False)
    assert processes.lost(error) is None


@pytest.mark.parametrize(
    "error",
    [
        runtime_error("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes"),
        runtime_error("INVALID_ARGUMENT: shapes"),
        AgwmError("another process of this run died"),
        KeyError("loss"),
    ],
)
def test_what_else_goes_wrong_is_not_blamed_on_a_peer(monkeypatch, error):
    monkeypatch.setattr(processes, "several", lambda: True)
    assert processes.lost(error) is None
