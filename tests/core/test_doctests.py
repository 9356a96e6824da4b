"""The examples in the core's docstrings."""

import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import optax
import pytest

import agwm_jax.core

CONVENTIONAL = {"jax": jax, "jnp": jnp, "optax": optax}
"""Names that an example may use without importing them; a module's own imports are no part of its examples."""

MODULES = [f"agwm_jax.core.{module.name}" for module in pkgutil.iter_modules(agwm_jax.core.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    result = doctest.testmod(importlib.import_module(name), extraglobs=CONVENTIONAL)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    assert sum(bool(test.examples) for module in modules for test in finder.find(module)) >= 2
