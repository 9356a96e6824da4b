"""The tiny checkpoint and configs of runs that take seconds."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import SETTINGS, words, write_checkpoint

from agwm_jax.settings import Config, load_config


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """The model is tiny: time would go into compiling."""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random BERT of two layers."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def settings(tiny_checkpoint) -> dict:
    """Of a run of a few seconds on the generated task."""
    return {**SETTINGS, "model": tiny_checkpoint}


@pytest.fixture
def configure(settings, tmp_path):
    """``configure("vanilla", {"run.seed": 1}, output="a") -> Config``; its run folder lies in the test's own folder."""

    def make(method: str = "agwm", changes: dict | None = None, *, output: str = "run") -> Config:
        return load_config(None, words({**settings, "output": tmp_path / output, **(changes or {})}, method))

    return make
