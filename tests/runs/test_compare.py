"""Several methods over several seeds: Ctrl-C reaches the runs, which save; the same command finishes them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from tiny import QUICK

from agwm_jax.settings import load_config


@pytest.fixture
def command(settings, tmp_path):
    """The script on the tiny checkpoint."""
    config = tmp_path / "config.yaml"
    said: dict = {}
    for name, value in settings.items():
        if name.startswith("method."):
            continue
        *sections, last = {"model": "model.path"}.get(name, name).split(".")
        place = said
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(str(value))
    said["run"]["compilation_cache"] = str(tmp_path / "xla")
    config.write_text(yaml.safe_dump(said))
    script = ["experiments/compare_methods.py", "--config", str(config), "--methods", "vanilla", "agwm"]
    own = ["--agwm.search.epochs", "3", "--agwm.estimator", "first_order", "--finetune.epochs", "4"]
    return [sys.executable, *script, "--seeds", "0", "1", "--equal-passes", "--output", str(tmp_path / "runs"), *own]


def test_ctrl_c_saves_and_the_same_command_finishes(command, tmp_path, request):
    options = {
        "cwd": request.config.rootpath,
        "env": {**os.environ, **QUICK, "PYTHONPATH": str(request.config.rootpath)},
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
    }
    folder = tmp_path / "runs"
    process = subprocess.Popen(command, start_new_session=True, **options)
    metrics = folder / "vanilla" / "seed-0" / "metrics.jsonl"
    deadline = time.monotonic() + 600
    while not (metrics.exists() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "Traceback" not in text
    assert "run the same command again" in text

    done = subprocess.run(command, **options, check=False)
    assert done.returncode == 0, done.stdout
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/seed-[01]/result.json"))]
    assert [(result["method"], result["seed"]) for result in results] == [
        ("agwm", 0),
        ("agwm", 1),
        ("vanilla", 0),
        ("vanilla", 1),
    ]
    epochs = [load_config(folder / method / "seed-0" / "config.yaml").finetune.epochs for method in ("vanilla", "agwm")]
    assert epochs == [7, 4], "equal passes: 4 epochs and the search's 3"
    assert (folder / "report" / "overview.png").stat().st_size > 10_000
