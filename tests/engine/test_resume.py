"""A run that is killed at any chunk ends with the bits of one that was left alone."""

import os
import signal
import subprocess
import sys

import chex
import numpy as np
import pytest

from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.lanes import Programs
from agwm_jax.engine.observer import InMemory
from tests.engine.methods import build_members, mixed, train

OPTIONS = {"checkpoint_minutes": 1e-9, "chunk_steps": 2}  # as often as can be
CHUNKS = 9


class Cut(Exception):
    """Ends a run where it stands."""


class CutAt(InMemory):
    def __init__(self, chunks):
        super().__init__(1)
        self.left = chunks

    def chunk(self, member, phase, infos, *, step, offset):
        super().chunk(member, phase, infos, step=step, offset=offset)
        self.left -= 1
        if not self.left:
            raise Cut


@pytest.fixture(scope="module")
def undisturbed():
    programs, members = Programs(), build_members(mixed, (3,))
    outcome, observer = train(members, programs=programs, **OPTIONS)
    assert len(observer.records[0]) == 2 * CHUNKS
    return members, programs, outcome.learnt, observer.records


@pytest.mark.parametrize("chunks", range(1, CHUNKS + 1))
def test_cut_short_at_any_chunk_and_continued_it_is_the_same_run(undisturbed, tmp_path, chunks):
    members, programs, learnt, records = undisturbed
    options = {"programs": programs, **OPTIONS}
    first = CutAt(chunks)
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    with pytest.raises(Cut):
        train(members, observer=first, checkpoints=checkpoints, **options)
    checkpoints.close()
    second = InMemory(1)
    second.records = first.records
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="toy")
    outcome, _ = train(members, observer=second, checkpoints=checkpoints, **options)
    checkpoints.close()
    chex.assert_trees_all_equal(outcome.learnt, learnt)
    assert second.records == records
    assert len(second.said) == (chunks > 1), "it continues, except where nothing was saved yet"


def worker(folder, *options):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **cache}
    command = [sys.executable, "-m", "tests.engine.worker", str(folder), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_sigkill_while_checkpoints_are_written_changes_no_bit(tmp_path):
    done = worker(tmp_path / "alone")
    assert done.returncode == 0, done.stderr
    for chunks in (2, 3):
        killed = worker(tmp_path / "run", "--kill-at", chunks)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "run" / "learnt.npz").exists()
    done = worker(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "continuing in search-" in done.stdout
    ours, theirs = (np.load(tmp_path / name / "learnt.npz") for name in ("run", "alone"))
    assert ours.files == theirs.files
    for name in ours.files:
        one = theirs[name][-len(ours[name]) :] if name == "losses" else theirs[name]
        assert ours[name].tobytes() == one.tobytes(), name
