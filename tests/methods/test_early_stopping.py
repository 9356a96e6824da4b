"""Early stopping: the pass that NumPy finds best among those of plain fine-tuning, with patience and without."""

import chex
import jax
import numpy as np
import pytest
from harness import EXAMPLES, run
from three_weights import DATA, PRETRAINED, flat, setup

from agwm_jax.methods.early_stopping import EarlyStopping
from agwm_jax.methods.frozen_alpha import FrozenAlpha
from agwm_jax.methods.technique import compose
from agwm_jax.methods.vanilla import Vanilla

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVELOPMENT = np.arange(EXAMPLES - 5, EXAMPLES)
PASSES = 8


def train(build, *, epochs=PASSES, rate=0.4):
    data = {name: jax.numpy.asarray(column) for name, column in DATA.items()}
    return run(build(setup(learning_rate=rate, epochs=epochs)), PRETRAINED, jax.random.key(0), data=data)


def development_loss(weights) -> float:
    """By NumPy."""
    return 0.5 * np.mean((DATA["x"][DEVELOPMENT] @ flat(weights) - DATA["y"][DEVELOPMENT]) ** 2)


@pytest.fixture(scope="module")
def passes():
    """Weights after every pass of plain fine-tuning at a constant rate, whose first passes a shorter run takes too."""
    return [train(Vanilla().build, epochs=epochs).weights for epochs in range(1, PASSES + 1)]


@pytest.fixture(scope="module")
def losses(passes):
    return np.array([development_loss(weights) for weights in passes])


def test_the_best_pass_is_the_one_that_numpy_finds(passes, losses):
    best = int(np.argmin(losses))
    assert 0 < best < PASSES - 1, "the case would show nothing"
    trained = train(EarlyStopping().build)
    chex.assert_trees_all_close(trained.weights, passes[best], rtol=1e-5)
    infos = trained.infos["finetune"]
    looks = len(infos["loss"]) // PASSES * np.arange(1, PASSES + 1) - 1
    changes = np.flatnonzero(np.diff(infos["development"])) + 1
    np.testing.assert_array_equal(changes, looks)
    np.testing.assert_allclose(infos["development"][looks], losses, rtol=1e-4)
    so_far = [np.argmin(losses[: count + 1]) + 1 for count in range(PASSES)]
    np.testing.assert_array_equal(infos["best_pass"][looks], so_far)


def test_patience_ends_the_search_at_the_first_hollow(passes, losses):
    worse = int(np.flatnonzero(np.diff(losses) > 0)[0])  # the first pass after which the next one is worse
    assert losses[worse] > losses.min() + 1e-3, "the case would show nothing"
    chex.assert_trees_all_close(train(EarlyStopping(patience=1).build).weights, passes[worse], rtol=1e-5)


def test_one_pass_is_vanilla_bit_for_bit():
    chex.assert_trees_all_equal(*(train(x.build, epochs=1).weights for x in (EarlyStopping(), Vanilla())))


def test_what_is_judged_and_kept_is_what_the_method_evaluates():
    """A mixture's own loss, and its gate beside the weights of the best pass."""
    own = FrozenAlpha(mixup={"start": 0.5})
    trained = train(lambda given: compose(own.build, (EarlyStopping(),), given))
    assert trained.learnt.keys() == train(own.build).learnt.keys()
    infos = trained.infos["finetune"]
    np.testing.assert_allclose(min(infos["development"]), development_loss(trained.weights), rtol=1e-4)


def test_the_look_after_the_first_step_does_not_count():
    """At a rate this large every pass ends worse than it stood after one step, and one of the passes is kept."""
    weights = [train(Vanilla().build, epochs=epochs, rate=1.2).weights for epochs in range(1, 3)]
    ends = [development_loss(each) for each in weights]
    trained = train(EarlyStopping().build, epochs=2, rate=1.2)
    assert trained.infos["finetune"]["development"][0] < min(ends) - 1e-3, "the case would show nothing"
    chex.assert_trees_all_close(trained.weights, weights[int(np.argmin(ends))], rtol=1e-5)
