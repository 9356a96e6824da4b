"""The examples in the core's docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import agwm_jax.core

MODULES = [module.name for module in pkgutil.walk_packages(agwm_jax.core.__path__, "agwm_jax.core.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), globs={})  # what a user can paste
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 2
