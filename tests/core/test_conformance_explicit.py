"""The conformance suite over the estimators that solve no linear system."""

import pytest

from tests.core.conformance import Conformance, ten_steps
from tests.core.problems import EXPLICIT


@pytest.fixture(scope="module", params=EXPLICIT)
def run(request):
    return ten_steps(request.param)


class TestExplicit(Conformance):
    pass
