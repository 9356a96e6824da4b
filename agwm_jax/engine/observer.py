"""What the loop tells while it runs, and the observer that keeps it in memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from agwm_jax.methods.interface import Phase


class Observer:
    """What the loop tells; a base that does nothing. Members are counted from 0, in the order that they were given."""

    def resume(self, lies_before: Callable[[str, int], bool]) -> None:
        """The loop begins, or goes on: ``lies_before(phase, step)`` tells which steps are not taken again."""

    def begin(self, stage: str, *, step: int, num_steps: int) -> None:
        """The phases of a stage begin, or go on at `step`."""

    def chunk(self, member: int, phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> None:
        """Steps `step`, `step` + 1, ... of a phase were taken, whose first step is the run's `offset`-th."""

    def give_up(self, member: int, sentence: str) -> None:
        """A member diverged; no chunk of it follows."""

    def say(self, text: str) -> None:
        """A line for the user."""


def records_of(phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> list[dict[str, Any]]:
    """One record a step, as metrics.jsonl has them; what is not finite is None."""
    return [
        {
            "phase": phase.name,
            "step": i,
            "num_steps": phase.num_steps,
            "global_step": offset + i,
            **{name: value if math.isfinite(value) else None for name, value in info.items()},
        }
        for i, info in enumerate(infos, start=step)
    ]


class InMemory(Observer):
    """Keeps the records of every member, and says nothing.

    Args:
        num_members: of the group.
    """

    def __init__(self, num_members: int):
        self.records: list[list[dict[str, Any]]] = [[] for _ in range(num_members)]
        self.said: list[str] = []

    def resume(self, lies_before: Callable[[str, int], bool]) -> None:
        """Forget the steps that are taken again."""
        self.records = [[one for one in own if lies_before(one["phase"], one["step"])] for own in self.records]

    def chunk(self, member: int, phase: Phase, infos: Sequence[Mapping[str, float]], *, step: int, offset: int) -> None:
        """Keep the records."""
        self.records[member] += records_of(phase, infos, step=step, offset=offset)

    def say(self, text: str) -> None:
        """Keep the line."""
        self.said.append(text)
