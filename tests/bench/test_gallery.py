"""The gallery's scripts: those that take seconds, whole; each says where an answer is wrong."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from agwm_jax.bench.gallery import Solved, equal, run

FOLDER = Path(__file__).parents[2] / "experiments/gallery"
QUICK = ("ridge", "loss_weights", "cell", "penalties")


def script(name):
    spec = importlib.util.spec_from_file_location(f"gallery_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", QUICK)
def test_answers_are_those_that_are_known(name, tmp_path, capsys):
    module = script(name)
    assert run(name, module.__doc__, module.solve, ["--output", str(tmp_path)]) == 0
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    answers = json.loads((tmp_path / f"{name}.json").read_text())["answers"]
    assert len(answers) >= 2
    assert all(answer["holds"] for answer in answers)
    assert "WRONG" not in capsys.readouterr().out


def test_a_wrong_answer_fails_the_script(tmp_path, capsys):
    def solve():
        return Solved([equal("x", np.ones(2), [1, 1.1], "made up", rtol=1e-3)], "nothing", lambda figure: None)

    assert run("wrong", "A page.", solve, ["--output", str(tmp_path)]) == 1
    assert "WRONG x (to 0.001): [1, 1]; expected [1, 1.1] (made up)" in capsys.readouterr().out


def test_the_page_shows_every_problem():
    page = (FOLDER.parents[1] / "docs/gallery.md").read_text()
    for path in FOLDER.glob("*.py"):
        assert f"experiments/gallery/{path.name}" in page
        assert f"gallery/{path.stem}.png" in page
