"""The conformance suite over the estimators that solve a linear system."""

import pytest

from tests.core.conformance import Conformance, ten_steps
from tests.core.problems import IMPLICIT


@pytest.fixture(scope="module", params=IMPLICIT)
def run(request):
    return ten_steps(request.param)


class TestImplicit(Conformance):
    pass
