"""Which examples make up which batch: plans of indices, made once by NumPy, for a scan on the device to follow."""

import math

import numpy as np
from jaxtyping import Int, Int32

from agwm_jax.errors import AgwmError

PADDING = -1  # marks the rows that fill a short batch; they have weight 0


def _check(n: int, batch_size: int, what: str) -> None:
    if n < batch_size:
        raise AgwmError(
            f"The {what} has {n} examples, fewer than one batch of {batch_size}: "
            f"give more examples, or a batch_size of {max(n, 1)} or less."
        )


def _pass(indices: Int[np.ndarray, "n"], batch_size: int) -> Int32[np.ndarray, "steps b"]:
    steps = math.ceil(len(indices) / batch_size)
    plan = np.full(steps * batch_size, PADDING, np.int32)
    plan[: len(indices)] = indices
    return plan.reshape(steps, batch_size)


def _batches(
    indices: Int[np.ndarray, "n"], batch_size: int, steps: int, rng: np.random.Generator
) -> Int32[np.ndarray, "steps b"]:
    """Batches of as many shuffled passes as they need."""
    passes = math.ceil(steps / math.ceil(len(indices) / batch_size))
    return np.concatenate([_pass(rng.permutation(indices), batch_size) for _ in range(passes)])[:steps]


def epoch_plan(
    indices: Int[np.ndarray, "n"],
    *,
    batch_size: int,
    epochs: int,
    rng: np.random.Generator,
    min_steps: int = 0,
    what: str = "training set",
) -> Int32[np.ndarray, "steps b"]:
    """Shuffled batches in which every index occurs exactly once an epoch.

    Args:
      indices: [n] the examples to use.
      batch_size: b; the last batch of each epoch is filled with -1.
      epochs: passes over them.
      rng: shuffles.
      min_steps: where there are fewer steps, batches of one more pass follow up to that many.
      what: the examples are, in an error.

    Returns:
      [epochs * ceil(n / b), b] indices, or [min_steps, b].

    Raises:
      AgwmError: fewer examples than one batch.

    >>> epoch_plan(np.arange(5), batch_size=2, epochs=2, rng=np.random.default_rng(0)).shape
    (6, 2)
    """
    _check(len(indices), batch_size, what)
    steps = max(epochs * math.ceil(len(indices) / batch_size), min_steps)
    return _batches(indices, batch_size, steps, rng)


def evaluation_plan(n: int, *, batch_size: int) -> Int32[np.ndarray, "steps b"]:
    """All n examples in order, the last batch filled with -1: [ceil(n / b), b]; n may be smaller than a batch.

    >>> evaluation_plan(3, batch_size=2).tolist()
    [[0, 1], [2, -1]]
    """
    if n < 1:
        raise AgwmError("There are no examples to evaluate.")
    return _pass(np.arange(n), batch_size)


def split_indices(
    n: int, *, validation_fraction: float, rng: np.random.Generator
) -> tuple[Int32[np.ndarray, "n_train"], Int32[np.ndarray, "n_validation"]]:
    """Split 0..n-1 at random into a training and a validation split of round(n * validation_fraction), each sorted.

    Raises:
      AgwmError: one of the two would be empty.
    """
    size = round(n * validation_fraction)
    if not 0 < size < n:
        raise AgwmError(
            f"A validation_fraction of {validation_fraction} splits {n} training examples into {n - size} and {size}: "
            "neither may be empty, give more examples or another fraction."
        )
    order = rng.permutation(n).astype(np.int32)
    return np.sort(order[size:]), np.sort(order[:size])


def fold_indices(
    n: int, *, num_folds: int, batch_size: int, rng: np.random.Generator
) -> list[tuple[Int32[np.ndarray, "n_train"], Int32[np.ndarray, "n_fold"]]]:
    """0..n-1 at random in disjoint folds whose sizes differ by 1 at most: of each, all others and itself, sorted.

    Args:
      n: number of examples.
      num_folds: K, 2 or more.
      batch_size: of what the folds are read in.
      rng: deals the examples.

    Raises:
      AgwmError: fewer than 2 folds, or folds of less than one batch.

    >>> [fold.size for _, fold in fold_indices(8, num_folds=3, batch_size=2, rng=np.random.default_rng(0))]
    [3, 3, 2]
    """
    if num_folds < 2:
        raise AgwmError(f"num_folds is {num_folds}: give 2 or more.")
    smallest = n // num_folds
    if smallest < batch_size:
        most = n // batch_size
        remedy = f"ask for {most} folds or fewer, or " if most >= 2 else ""
        raise AgwmError(
            f"{num_folds} folds of {n} training examples have {smallest} each, fewer than one batch of {batch_size}: "
            f"{remedy}give more examples or a smaller batch_size."
        )
    folds = np.array_split(rng.permutation(n).astype(np.int32), num_folds)
    return [(np.sort(np.concatenate([other for other in folds if other is not fold])), np.sort(fold)) for fold in folds]


def search_plan(
    train: Int[np.ndarray, "n_train"],
    validation: Int[np.ndarray, "n_validation"],
    *,
    batch_size: int,
    inner_steps: int,
    epochs: int,
    rng: np.random.Generator,
    min_steps: int = 0,
) -> tuple[Int32[np.ndarray, "steps k b"], Int32[np.ndarray, "steps b"]]:
    """Batches of a bi-level search: each step has k inner batches (training split) and an outer one (validation split).

    An epoch is one pass over the training split, as in `epoch_plan`. Where the batches of all epochs are no multiple
    of k, batches of one more pass fill the last step, for an empty inner batch has no gradient; so they do up to
    `min_steps` steps. The validation split is reshuffled whenever it is used up.

    Returns:
      inner [steps, k, b] and outer [steps, b], -1 where a batch is short; steps = ceil(epochs * ceil(n_train / b) / k).

    Raises:
      AgwmError: a split has fewer examples than one batch.

    Source: design.md, section 1; arXiv 2403.12918.
    """
    _check(len(train), batch_size, "training split of the search")
    _check(len(validation), batch_size, "validation split of the search")
    steps = max(math.ceil(epochs * math.ceil(len(train) / batch_size) / inner_steps), min_steps)
    inner = _batches(train, batch_size, steps * inner_steps, rng)
    return inner.reshape(steps, inner_steps, batch_size), _batches(validation, batch_size, steps, rng)
