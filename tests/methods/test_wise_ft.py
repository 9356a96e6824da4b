"""WiSE-FT: the share that NumPy finds best, the mixture at it, and what it is together with other methods."""

import chex
import jax
import numpy as np
import pytest
from harness import EXAMPLES, abstract_step, pretrained_weights, run, setup_of
from three_weights import DATA, PRETRAINED, flat, setup

from agwm_jax.errors import AgwmError
from agwm_jax.methods.frozen_alpha import FrozenAlpha
from agwm_jax.methods.lora import Lora
from agwm_jax.methods.swa import SWA
from agwm_jax.methods.technique import check_techniques, compose
from agwm_jax.methods.vanilla import Vanilla
from agwm_jax.methods.wise_ft import GRID, WiseFT

pytestmark = pytest.mark.usefixtures("quick_compilation")

W0 = flat(PRETRAINED)
DEVELOPMENT = np.arange(EXAMPLES - 5, EXAMPLES)


def quadratic_losses(task, rows) -> np.ndarray:
    """Of all shares on these rows, by NumPy."""
    mixed = [W0 + a * (task - W0) for a in np.arange(11) / 10]
    return np.array([0.5 * np.mean((DATA["x"][rows] @ w - DATA["y"][rows]) ** 2) for w in mixed])


@pytest.mark.parametrize("rate", [0.05, 0.8])
def test_the_share_is_the_one_that_numpy_finds_best_and_shows_in_the_records(rate):
    data = {name: jax.numpy.asarray(column) for name, column in DATA.items()}
    options = {"learning_rate": rate, "epochs": 4}
    vanilla = run(Vanilla().build(setup(**options)), PRETRAINED, jax.random.key(0), data=data)
    trained = run(WiseFT().build(setup(**options)), PRETRAINED, jax.random.key(0), data=data)
    task = flat(vanilla.weights)
    np.testing.assert_array_equal(flat(trained.learnt["task"]), task)  # W itself is vanilla's

    losses = quadratic_losses(task, DEVELOPMENT)
    best = np.argmin(losses)
    assert np.sort(losses)[1] - losses[best] > 1e-4, "or rounding would choose"
    infos = trained.infos["choose"]
    assert infos["a"][-1] == GRID[best]
    np.testing.assert_allclose(infos["loss"][-1], losses[best], rtol=1e-4)
    assert {float(a) for a in trained.learnt["wise_ft"].values()} == {float(GRID[best])}
    np.testing.assert_allclose(flat(trained.weights), W0 + best / 10 * (task - W0), rtol=1e-5)
    if rate == 0.8:
        assert 0 < best < 10, "steps this large overshoot"
    first = quadratic_losses(task, DEVELOPMENT[:4])  # the first batch
    assert infos["a"][0] == GRID[np.argmin(first)]


def test_the_split_is_read_once_and_without_dropout():
    method = WiseFT().build(setup_of())
    choose = method.phases[-1]
    rows = choose.plan["development"]
    np.testing.assert_array_equal(rows, [[5, 6, 7, 8], [9, -1, -1, -1]])
    found = [run(method, pretrained_weights(), jax.random.key(3)).infos["choose"] for _ in range(2)]
    chex.assert_trees_all_equal(*found)


def test_dropout_keys_do_not_reach_the_loss():
    seen = []
    given = setup_of()

    def loss(*, reverse_only):
        whole = given.loss(reverse_only=reverse_only)

        def recorded(params, batch):
            seen.append(set(batch))
            return whole(params, batch)

        return recorded

    phase = WiseFT().build(given).phases[-1]
    choose = WiseFT().change_method(Vanilla().build(given), given._replace(loss=loss)).phases[-1]
    shapes = WiseFT().build(given).learnt_shapes(pretrained_weights(), 1)
    learnt = {"task": {path: pretrained_weights()[path] for path in shapes["task"]}}
    jax.eval_shape(choose.step, *abstract_step(phase, learnt))
    assert seen
    assert all("key" not in columns for columns in seen)


@pytest.mark.parametrize("a", [0.0, 0.3, 1.0])
def test_a_fixed_share_reads_nothing(a):
    without = setup_of()._replace(rows={})
    fixed = WiseFT(a=a)
    assert fixed.reads == ()
    method = fixed.build(without)
    assert [phase.name for phase in method.phases] == ["finetune"]
    start = pretrained_weights()
    trained = run(method, start, jax.random.key(3))
    vanilla = run(Vanilla().build(without), start, jax.random.key(3))
    for path, weight in vanilla.weights.items():
        expected = np.asarray(start[path]) + a * (np.asarray(weight, np.float64) - np.asarray(start[path]))
        np.testing.assert_allclose(trained.weights[path], expected, rtol=1e-6, atol=1e-6)
    if a in (0.0, 1.0):
        chex.assert_trees_all_equal(trained.weights, vanilla.weights if a else start)


@pytest.mark.parametrize("method", [FrozenAlpha(), Lora(learning_rate=1e-2), SWA()])
def test_it_mixes_what_another_method_evaluates(method):
    frozen = ("pooler.kernel",)
    alone = run(method.build(setup_of(frozen=frozen)), pretrained_weights(), jax.random.key(3))
    both = run(compose(method.build, (WiseFT(),), setup_of(frozen=frozen)), pretrained_weights(), jax.random.key(3))
    a = both.infos["choose"]["a"][-1]
    assert 0 < a <= 1
    start = pretrained_weights()
    for path, weight in alone.weights.items():
        np.testing.assert_allclose(both.weights[path], start[path] + a * (weight - start[path]), atol=1e-6)
    chex.assert_trees_all_equal(both.weights["pooler.kernel"], start["pooler.kernel"])


def test_an_average_belongs_before_it():
    with pytest.raises(AgwmError, match=r"techniques\.swa"):
        check_techniques(WiseFT(), (SWA(),))
    check_techniques(SWA(), (WiseFT(),))
