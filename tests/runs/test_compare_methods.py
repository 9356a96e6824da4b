"""The experiment script: Ctrl-C reaches the runs, which save; the same command finishes, and the report pairs seeds."""

import os
import signal
import subprocess
import sys
import time

from tests.runs.conftest import QUICK


def command(settings, folder, config):
    script = [
        "experiments/compare_methods.py",
        "--config",
        str(config),
        "--methods",
        "vanilla",
        "agwm",
        "--seeds",
        "0",
        "1",
    ]
    kept = [
        x for pair in zip(settings[::2], settings[1::2], strict=True) for x in pair if pair[0] != "--finetune.epochs"
    ]
    return [sys.executable, *script, "--equal-passes", "--output", str(folder), *kept, "--finetune.epochs", "4"]


def test_ctrl_c_saves_and_the_same_command_finishes(settings, tmp_path, request):
    config, folder = tmp_path / "config.yaml", tmp_path / "runs"
    config.write_text(f"run: {{compilation_cache: {tmp_path / 'xla'}}}\n")
    settings = [x for pair in zip(settings[::2], settings[1::2], strict=True) for x in pair if "cache" not in pair[0]]
    options = {
        "cwd": request.config.rootpath,
        "env": {**os.environ, **QUICK, "PYTHONPATH": str(request.config.rootpath)},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    process = subprocess.Popen(command(settings, folder, config), start_new_session=True, **options)
    metrics = folder / "vanilla" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "run the same command again" in text

    done = subprocess.run(command(settings, folder, config), **options, check=False)
    assert done.returncode == 0, done.stdout
    assert len(list(folder.glob("*/seed-[01]/result.json"))) == 4
    assert "vanilla 7, agwm 4" in done.stdout, "equal passes: 4 epochs and the search's 3"
    assert (folder / "report" / "overview.png").stat().st_size > 10_000
