"""Which examples W and alpha see in a search: the parts of every split, and the batches cut from them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from agwm_jax.data.plan import epoch_plan, fold_indices, search_plan, split_indices
from agwm_jax.methods.interface import Plan, Setup

if TYPE_CHECKING:
    from agwm_jax.methods.agwm import Search


class Split(NamedTuple):
    """One split of the data."""

    train: Int[np.ndarray, " n"]
    """Rows that W is trained on."""
    validation: Int[np.ndarray, " m"]
    """Rows that alpha is fitted on."""
    rng: np.random.Generator
    """Of what is drawn next for this split."""


def read_splits(search: "Search", setup: Setup) -> list[Split]:
    """The parts of every split; where the training parts differ in size, the largest comes first.

    Raises:
        AgwmError: too few examples.
    """
    rngs = [setup.rng(f"search-{index}") for index in range(search.num_splits)]
    if search.validation != "split":
        rows = setup.rows[search.validation]
        return [Split(np.arange(setup.num_examples), np.arange(rows.start, rows.stop), rng) for rng in rngs]
    if search.splits == "folds":
        folds = fold_indices(
            setup.num_examples, num_folds=search.num_splits, batch_size=setup.batch_size, rng=setup.rng("folds")
        )
        # The last folds may have one example less, and what is left for W one more.
        return [Split(train, fold, rng) for (train, fold), rng in zip(reversed(folds), rngs, strict=True)]
    fraction, n = search.validation_fraction, setup.num_examples
    parts = [split_indices(n, validation_fraction=fraction, rng=rng) for rng in rngs]
    return [Split(train, validation, rng) for (train, validation), rng in zip(parts, rngs, strict=True)]


def search_plans(search: "Search", setup: Setup) -> list[Plan]:
    """``{"inner": [steps, k, b], "outer": [steps, b]}`` of every split, all of one shape."""
    found: list[Plan] = []
    for split in read_splits(search, setup):
        counted = search.epochs * (len(split.train) // setup.batch_size + 1) if search.extra_step else 0
        inner, outer = search_plan(
            split.train,
            split.validation,
            batch_size=setup.batch_size,
            inner_steps=search.inner_steps,
            epochs=search.epochs,
            rng=split.rng,
            min_steps=len(found[0]["inner"]) if found else counted,
        )
        found.append({"inner": inner, "outer": outer})
    return found


def plans_for_after(search: "Search", setup: Setup) -> tuple[Plan, Plan]:
    """``{"train": [steps, K, b]}`` and ``{"outer": [steps, K, b]}`` of all K splits."""
    splits = read_splits(search, setup)

    def passes(rows: Sequence[tuple[np.ndarray, np.random.Generator]], epochs: int, what: str) -> np.ndarray:
        steps = max(epochs * -(-len(own) // setup.batch_size) for own, _ in rows)
        each = [
            epoch_plan(own, batch_size=setup.batch_size, epochs=epochs, rng=rng, min_steps=steps, what=what)
            for own, rng in rows
        ]
        return np.stack(each, axis=1)

    train = passes([(each.train, each.rng) for each in splits], search.epochs, "training split of the search")
    outer = passes(
        [(each.validation, each.rng) for each in splits], search.alpha_epochs, "validation split of the search"
    )
    return {"train": train}, {"outer": outer}


def side_by_side(plans: Sequence[Plan]) -> Plan:
    """One plan of K equally long ones, whose rows follow the axis of steps: ``[steps, K, ...]``."""
    return {name: np.stack([plan[name] for plan in plans], axis=1) for name in plans[0]}
