"""The page that says how a method is written: its code runs, and is what it says."""

import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from harness import pretrained_weights, run, setup_of

from agwm_jax.methods.interface import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "write_your_own" / "method.md"


@pytest.fixture(scope="module")
def registered():
    """The page's methods are in the registry, as from a file outside the package."""
    entries, namespace = dict(METHODS._entries), {"__name__": "my_package.my_methods"}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), namespace)
    yield
    METHODS._entries = entries


def train(name, **settings):
    method = METHODS[name].value.model_validate({"name": name, **settings}).build(setup_of())
    return run(method, pretrained_weights(), jax.random.key(3))


def test_the_methods_of_the_page_are_vanilla_at_0_and_themselves_at_their_defaults(registered):
    settings = {"weight_noise": "std", "moving_average": "decay", "sign_gradient": "share"}
    assert settings.keys() <= set(METHODS)
    vanilla = train("vanilla")
    for name, setting in settings.items():
        reduced = train(name, **{setting: 0.0})
        np.testing.assert_array_equal(reduced.losses, vanilla.losses)
        chex.assert_trees_all_equal(reduced.weights, vanilla.weights)
    for name in ("weight_noise", "sign_gradient"):
        assert not np.array_equal(train(name).losses, vanilla.losses)
    averaged = train("moving_average", decay=0.5)
    np.testing.assert_array_equal(averaged.losses, vanilla.losses)  # it trains as usual,
    path = "pooler.kernel"  # and what it leaves is closer to the start
    start = pretrained_weights()[path]
    assert np.linalg.norm(averaged.weights[path] - start) < np.linalg.norm(vanilla.weights[path] - start)
