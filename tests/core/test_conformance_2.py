"""The conformance suite over one half of the estimators."""

import pytest

from tests.core.conformance import Conformance, ten_steps
from tests.core.problems import ALL


@pytest.fixture(scope="module", params=sorted(ALL)[1::2])
def run(request):
    return ten_steps(request.param)


class TestHalf(Conformance):
    pass
