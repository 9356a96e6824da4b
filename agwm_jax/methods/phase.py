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
    """One training run within a method. All functions are pure; the loop compiles, maps, donates, saves and resumes.

    Phases that share `step` and the shapes of their plans share one compiled program. The functions see one seed: the
    loop maps them over all that run at once.
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


Stage = tuple[Phase, ...]
"""Phases that learn nothing from each other, with one `step` and plans of one shape: they may run side by side, and
their `finish` is called in order."""


class Method(NamedTuple):
    """A fine-tuning method: its stages follow each other."""

    init_alpha: Callable[[PRNGKeyArray, Partition], Alpha]
    stages: tuple[Stage, ...]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of all stages, in order."""
        return tuple(phase for stage in self.stages for phase in stage)


def no_alpha(key: Array, partition: Partition) -> Alpha:
    """For methods that mix nothing."""
    del key, partition
    return {}
