"""A tiny checkpoint for whole comparisons."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "runs" / "tiny.py")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """Folder of a random BERT of two layers."""
    assert _spec
    assert _spec.loader
    tiny = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(tiny)
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"))
