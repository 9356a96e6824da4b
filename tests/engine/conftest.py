"""Tiny programs, whose time goes into compiling them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """For what runs in this process."""
