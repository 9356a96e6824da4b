"""Fixtures of the core's tests."""

import jax
import jaxtyping
import pytest

pytest.register_assert_rewrite("tests.core.conformance")


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """All of these programs are small."""


@pytest.fixture
def full_optimization(quick_compilation):
    """For one test, the programs that users run."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def x64():
    """Double precision for the duration of one test: for figures that are exact."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def without_type_checks():
    """As users run it, for the errors that the type checks of the tests would forestall."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
