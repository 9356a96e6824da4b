"""Tiny programs run for microseconds: their time goes into compiling them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_programs):
    """For what runs in this process."""
