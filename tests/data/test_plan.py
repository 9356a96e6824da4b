"""Plans: every example once an epoch, short batches padded, validation cycled, the same for the same seed."""

import numpy as np
import pytest

from agwm_jax.data.plan import epoch_plan, evaluation_plan, search_plan, split_indices
from agwm_jax.errors import AgwmError


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("n", [4, 5, 7, 8, 16, 33])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_example_once_an_epoch(n, batch_size, epochs):
    indices = 100 + 2 * np.arange(n)
    plan = epoch_plan(indices, batch_size=batch_size, epochs=epochs, rng=rng())
    assert plan.dtype == np.int32
    assert plan.shape == (epochs * -(-n // batch_size), batch_size)
    for epoch in np.split(plan, epochs):
        assert sorted(epoch[epoch >= 0]) == indices.tolist()
        assert (epoch[:-1] >= 0).all()  # only the last batch is short
        assert (np.diff((epoch[-1] < 0).astype(int)) >= 0).all()  # padding comes last


def test_epochs_are_shuffled_anew_and_seeded():
    first, second = np.split(epoch_plan(np.arange(64), batch_size=8, epochs=2, rng=rng()), 2)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first.ravel(), np.arange(64))
    again = epoch_plan(np.arange(64), batch_size=8, epochs=2, rng=rng())
    assert np.array_equal(again, np.concatenate([first, second]))


@pytest.mark.parametrize("n", [1, 8, 9])
def test_evaluation_is_in_order_and_complete(n):
    plan = evaluation_plan(n, batch_size=8)
    assert plan[plan >= 0].tolist() == list(range(n))
    assert plan.shape == (-(-n // 8), 8)


@pytest.mark.parametrize(("n", "fraction", "size"), [(300, 0.2, 60), (7, 0.2, 1), (10, 0.5, 5)])
def test_split_is_disjoint_and_complete(n, fraction, size):
    train, validation = split_indices(n, validation_fraction=fraction, rng=rng())
    assert len(validation) == size
    assert sorted([*train, *validation]) == list(range(n))
    assert train.dtype == validation.dtype == np.int32
    other, _ = split_indices(n, validation_fraction=fraction, rng=rng(1))
    assert not np.array_equal(train, other)


@pytest.mark.parametrize("inner_steps", [1, 2, 3, 7])
@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("n_validation", [4, 6, 60])
def test_search_plan(inner_steps, epochs, n_validation):
    train, validation = np.arange(18), 1000 + np.arange(n_validation)
    inner, outer = search_plan(train, validation, batch_size=4, inner_steps=inner_steps, epochs=epochs, rng=rng())
    steps = -(-epochs * 5 // inner_steps)
    assert inner.shape == (steps, inner_steps, 4)
    assert outer.shape == (steps, 4)
    assert inner.dtype == outer.dtype == np.int32
    batches = inner.reshape(-1, 4)
    assert (batches >= 0).any(axis=1).all()  # no batch is empty
    for epoch in np.split(batches[: 5 * epochs], epochs):
        assert sorted(epoch[epoch >= 0]) == train.tolist()
    assert set(outer[outer >= 0]) <= set(validation.tolist())
    # Cycled: after every full pass each example was used once more.
    a_pass = -(-n_validation // 4)
    for start in range(0, steps - a_pass + 1, a_pass):
        rows = outer[start : start + a_pass]
        assert sorted(rows[rows >= 0]) == validation.tolist()


def test_validation_passes_are_reshuffled():
    _, outer = search_plan(np.arange(64), np.arange(64, 80), batch_size=8, inner_steps=1, epochs=1, rng=rng())
    passes = outer.reshape(4, 16)
    assert len({tuple(row) for row in passes.tolist()}) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: epoch_plan(np.arange(10), batch_size=16, epochs=1, rng=rng()),
            "has 10 examples.*batch of 16.*10 or less",
        ),
        (
            lambda: search_plan(np.arange(16), np.arange(4), batch_size=16, inner_steps=1, epochs=1, rng=rng()),
            "validation split of the search has 4 examples.*batch of 16",
        ),
        (
            lambda: search_plan(np.arange(15), np.arange(40), batch_size=16, inner_steps=1, epochs=1, rng=rng()),
            "training split of the search has 15 examples",
        ),
        (lambda: split_indices(2, validation_fraction=0.2, rng=rng()), "splits 2 training examples into 2 and 0"),
        (lambda: split_indices(10, validation_fraction=1.0, rng=rng()), "into 0 and 10"),
        (lambda: evaluation_plan(0, batch_size=2), "no examples"),
    ],
)
def test_too_small(call, message):
    with pytest.raises(AgwmError, match=message):
        call()
