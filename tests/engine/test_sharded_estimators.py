"""Every estimator computes on a mesh of both axes, two of them on any, what it computes on one device."""

import pytest

from agwm_jax import ESTIMATORS, hypergrad
from tests.core.problems import ALL, registered
from tests.engine.meshes import assert_equal, attention, on_mesh, on_one_device

# `dense` builds the matrix of its system, 7 000 rows square here, and its exact solve enlarges rounding beyond 1e-5.
NAMES = [name for name in registered(ESTIMATORS) if "dense" not in name]
NAMES += ["unrolled last", "neumann resample", "conjugate_gradient warm"]
CASES = [(name, 4, 2) for name in NAMES] + [
    (name, *mesh) for name in ("unrolled", "neumann") for mesh in ((8, 1), (2, 4))
]


class Case:
    """An estimator, the search that suits it and what it gives on one device."""

    def __init__(self, name):
        # Batches beyond the first matter to these two; one estimator is tried with the inner update taken anew.
        inner_steps = 2 if name in ("unrolled last", "neumann resample") else 1
        self.search = attention(inner_steps=inner_steps, rollback=name == "penalty")
        # Its 448 outer numbers are too many for exact tangents.
        self.estimator = hypergrad.forward_mode(directions=2) if name == "forward_mode" else ALL[name]
        (self.expected,) = on_one_device(self.search, self.estimator)


@pytest.fixture(scope="module")
def case(request):
    return Case(request.param)


@pytest.mark.parametrize(
    ("case", "data", "model"),
    CASES,
    indirect=["case"],
    ids=[f"{name}-{data}x{model}" for name, data, model in CASES],
)
def test_a_mesh_gives_the_single_device_result(case, data, model):
    (found,) = on_mesh(case.search, case.estimator, data=data, model=model)
    assert_equal(found, case.expected)
