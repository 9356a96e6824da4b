"""The interface between a fine-tuning method and the training loop: weights, phases, method."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Int, PRNGKeyArray

from agwm_jax.core.partition import Partition
from agwm_jax.core.types import Alpha, Batch, Params, Scalar

Plan = Mapping[str, Int[Any, "_ ..."]]
"""Rows of the training set for every step, ``[steps, *k, b]`` by the name of the batch; -1 pads a last short one."""

Batches = Mapping[str, Batch]
"""One step's batches, by the names of the plan."""

State = Any
"""A phase's own training state: any pytree."""


class Weights(NamedTuple):
    """What a method learns; with the frozen weights it gives the model, ``mix(frozen, task, alpha)``."""

    task: Params
    alpha: Alpha
    """Empty where the method mixes nothing."""


class Phase(NamedTuple):
    """One training run within a method. All functions are pure; the loop compiles, donates, saves and resumes.

    Phases that share `step` and the shapes of their plans share one compiled program.
    """

    name: str
    plan: Plan
    start: Callable[[Params, Weights, Weights], State]
    """``start(frozen, initial, carry) -> state``: `initial` is the pretrained start, `carry` what was learnt so far."""
    step: Callable[[State, Params, Batches], tuple[State, dict[str, Scalar]]]
    """``step(state, frozen, batches) -> (state, info)``; info holds ``loss`` and whatever else is worth a curve."""
    finish: Callable[[Weights, State], Weights]
    """``finish(carry, state) -> carry``."""
    monitor: Callable[[State], dict[str, Scalar]]
    """Diagnostics too dear for every step; taken once a chunk of steps."""

    @property
    def num_steps(self) -> int:
        """Length of the plan."""
        return len(next(iter(self.plan.values())))


class Method(NamedTuple):
    """A fine-tuning method."""

    init_alpha: Callable[[PRNGKeyArray, Partition], Alpha]
    phases: tuple[Phase, ...]


def no_alpha(key: Array, partition: Partition) -> Alpha:
    """For methods that mix nothing."""
    del key, partition
    return {}
