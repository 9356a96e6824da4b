"""The code of the page on writing an estimator, and what it registers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import ESTIMATORS, AgwmError
from agwm_jax.section import section_of
from tests.core.problems import estimate_at, ridge

PAGE = Path(__file__).parents[2] / "docs" / "write_your_own" / "estimator.md"


@pytest.fixture(scope="module")
def page():
    """The names that its blocks define, run in order."""
    names = {"__name__": "a_package_of_someone"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(block, names)
    yield names
    ESTIMATORS._entries.pop("t1_t2")


def test_the_page_gives_what_it_says(page):
    assert float(page["at_the_solution"].hypergradient) == pytest.approx(-2.25)
    assert np.isfinite(page["info"]["hypergradient_norm"])
    entry = ESTIMATORS["t1_t2"]
    assert entry.facts == {"cost": "k + 4", "paper": "arXiv 1511.06727"}
    assert entry.summary.startswith("``d_o g - J x``")


def test_it_is_chosen_by_name_from_outside_the_package(page, x64):
    case = ridge()
    w = case.solution()
    estimate = estimate_at(case.problem, page["chosen"], jnp.asarray(w), jnp.asarray(case.penalty))
    np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(w, 0.5 * case.outer_gradient(w)), rtol=1e-10)
    moved = estimate_at(case.problem, page["chosen"], jnp.asarray(w), jnp.asarray(case.penalty), tx=optax.sgd(0.1))
    jax.tree.map(np.testing.assert_array_equal, moved.inner.opt_state, optax.sgd(0.1).init(jnp.asarray(w)))
    with pytest.raises((AgwmError, ValueError), match=r"step_size=-1\.0"):
        section_of(ESTIMATORS["t1_t2"].value, "t1_t2")(name="t1_t2", step_size=-1.0)
