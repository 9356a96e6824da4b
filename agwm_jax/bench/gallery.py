"""What the scripts of experiments/gallery share: answers beside their references, and a figure."""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.report.style import headline, save


class Answer(NamedTuple):
    """One figure beside what it should be."""

    quantity: str
    found: Any
    expected: Any
    source: str
    """Where `expected` comes from."""
    holds: bool


class Solved(NamedTuple):
    """What a problem's script computes."""

    answers: list[Answer]
    headline: str
    draw: Callable[[Any], None]
    """``draw(figure)``."""


def equal(quantity: str, found: Any, expected: Any, source: str, *, rtol: float) -> Answer:
    """Found and expected agree to `rtol` of the norm of what is expected."""
    error = np.linalg.norm(np.asarray(found) - np.asarray(expected)) / np.linalg.norm(np.asarray(expected))
    return Answer(f"{quantity} (to {rtol:g})", _short(found), _short(expected), source, bool(error <= rtol))


def below(quantity: str, found: float, bound: float, source: str) -> Answer:
    """Found is below a bound."""
    return Answer(quantity, _short(found), f"below {_short(bound)}", source, bool(found < bound))


def above(quantity: str, found: float, bound: float, source: str) -> Answer:
    """Found is above a bound."""
    return Answer(quantity, _short(found), f"above {_short(bound)}", source, bool(found > bound))


def run(name: str, document: str, solve: Callable[[], Solved], arguments: Sequence[str] | None = None) -> int:
    """Solve in float64, print the answers, write them and the figure; 1 where an answer is not as expected.

    Args:
        name: of the files that are written.
        document: the script's docstring, shown by ``--help``.
        solve: computes everything.
        arguments: of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=document.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/gallery"), help="folder (default: %(default)s)")
    output = parser.parse_args(arguments).output
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        solved = solve()

        def draw(figure: Any) -> None:
            solved.draw(figure)
            headline(figure, solved.headline)

        figure = save(output / f"{name}.png", 3.6, draw)
    seconds = time.perf_counter() - began
    record = {"seconds": round(seconds, 1), "answers": [answer._asdict() for answer in solved.answers]}
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for answer in solved.answers:
        mark = "ok  " if answer.holds else "WRONG"
        print(f"{mark} {answer.quantity}: {answer.found}; expected {answer.expected} ({answer.source})")
    print(f"{seconds:.0f} s; {figure}")
    return 0 if all(answer.holds for answer in solved.answers) else 1


def _short(value: Any) -> str:
    numbers = [f"{number:.6g}" for number in np.ravel(np.asarray(value, float))]
    return numbers[0] if np.ndim(value) == 0 else f"[{', '.join(numbers[:4])}{', ...' if len(numbers) > 4 else ''}]"
