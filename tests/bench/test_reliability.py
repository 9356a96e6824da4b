"""What counts as the same result, and that a command is really killed."""

import json
import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from agwm_jax.bench.reliability import Command, campaign, content


def write(folder, *, seconds=1.0, value=1.0, score=0.5):
    folder.mkdir()
    save_file({"w": np.full(3, value)}, folder / "variables.safetensors", metadata={"a": "1", "b": "2", "c": "3"})
    (folder / "result.json").write_text(json.dumps({"score": score, "seconds": seconds, "peak_memory_bytes": 7}))
    (folder / "report.md").write_text(f"runs in {folder}")
    return content(folder)


def test_the_clock_and_the_place_do_not_count_and_all_else_does(tmp_path):
    first = write(tmp_path / "first")
    assert write(tmp_path / "second", seconds=2.0) == first
    assert write(tmp_path / "third", value=2.0) != first
    assert write(tmp_path / "fourth", score=0.6) != first
    (tmp_path / "second" / "left-over").touch()
    assert content(tmp_path / "second") != first


def test_a_command_is_killed_and_given_again(tmp_path):
    found = campaign(Command("settings", lambda at: ["settings"]), tmp_path / "own", kills=1, rng=random.Random(0))
    assert (found.kills, found.same, found.faults) == (1, 1, [])
    with pytest.raises(RuntimeError, match=r"report fails undisturbed: agwm: .* is not a folder"):
        campaign(Command("report", lambda at: ["report", str(at)]), tmp_path / "other", kills=1, rng=random.Random(0))
