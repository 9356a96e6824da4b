"""Commands killed at random moments and given again: is what they leave the same as if nothing had happened?"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

_CHANGES = ("seconds", "compile_seconds", "peak_memory_bytes", "git_commit", "commit")
"""Of result.json and of a study's table: what two runs of one command do not share."""


class Command(NamedTuple):
    """A command of `agwm`, and where its result lies."""

    name: str
    words: Callable[[Path], Sequence[str]]
    """``words(folder)``: what to give to `agwm` so that it writes below that folder."""


class Outcome(NamedTuple):
    """What a number of kills did."""

    name: str
    seconds: float
    """That the command takes undisturbed."""
    kills: int
    """That hit it; others came after its end."""
    same: int
    """Of those, after which the command given again ended with the same content."""
    faults: list[str]
    """What was seen after the others."""


def campaign(command: Command, folder: Path, *, kills: int, rng: random.Random) -> Outcome:
    """Kill a command at moments drawn evenly over the time that it takes, and give it again each time.

    Args:
        command: deterministic.
        folder: of everything that is written.
        kills: how many.
        rng: draws the moments.

    Raises:
        RuntimeError: the command fails undisturbed.
    """
    folder.mkdir(parents=True)
    began = time.perf_counter()
    failed = _run(command.words(folder / "undisturbed"))
    if failed:
        raise RuntimeError(f"{command.name} fails undisturbed: {failed}")
    whole, expected = time.perf_counter() - began, content(folder / "undisturbed")
    hits, same, faults = 0, 0, []
    while hits < kills:
        moment = rng.uniform(0, whole)
        own = folder / f"killed-{hits}"
        shutil.rmtree(own, ignore_errors=True)
        if not _kill(command.words(own), moment):
            continue
        hits += 1
        failed = _run(command.words(own))
        found = {} if failed else content(own)
        if found == expected:
            same += 1
            shutil.rmtree(own, ignore_errors=True)
        else:
            differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            faults.append(f"killed after {moment:.1f} s: {failed or 'other content in ' + ', '.join(differing)}")
    return Outcome(command.name, whole, hits, same, faults)


def content(folder: Path) -> dict[str, Any]:
    """All files below a folder by name, without what depends on the clock and the place."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.name == "result.json":
            found[name] = {key: value for key, value in json.loads(data).items() if key not in _CHANGES}
        elif path.suffix == ".safetensors":  # whose metadata are written in no order
            size = int.from_bytes(data[:8], "little")
            found[name] = (json.loads(data[8 : 8 + size]), data[8 + size :])
        elif path.suffix == ".parquet":
            found[name] = pq.read_table(path).drop_columns([x for x in pq.read_schema(path).names if x in _CHANGES])
        elif path.name != "log.txt":  # what a process of a sweep printed, times included
            found[name] = data.replace(os.fsencode(folder), b"")
    return found


def _start(words: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "agwm_jax", *words]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _run(words: Sequence[str]) -> str:
    """Run to the end; what it said where it failed, else nothing."""
    process = _start(words)
    _, said = process.communicate()
    return said.decode(errors="replace").strip().splitlines()[-1] if process.returncode else ""


def _kill(words: Sequence[str], moment: float) -> bool:
    """Kill it and all that it started at that moment; whether it still ran."""
    process = _start(words)
    try:
        process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    return False
