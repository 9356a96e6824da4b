"""Going back over many steps with few of their states kept: each segment is run again when it is its turn."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from agwm_jax.errors import AgwmError

State = TypeVar("State")
Adjoint = TypeVar("Adjoint")
Step = Any  # a step's number, an int or an integer scalar


def strides(num_steps: int, num_states: int) -> list[int]:
    """Lengths of the segments at each level, the last 1: the fewest levels whose states are at most `num_states`.

    L levels of b segments each, ``b = ceil(k^(1 / L))``, keep L b states at a time and run every step about L times
    (Griewank and Walther 2000, Algorithm 799, the multi-level form of Chen et al. 2016, arXiv 1604.06174).

    Raises:
        AgwmError: fewer states than the least, about 2 log2 k.
    """
    least = max(2 * (num_steps - 1).bit_length(), 1)
    for levels in range(1, max(2, num_steps.bit_length() + 1)):
        branch = next(b for b in range(1, num_steps + 1) if b**levels >= num_steps)
        least = min(least, levels * branch)
        if levels * branch <= num_states:
            found = [num_steps]
            for _ in range(levels):
                found.append(math.ceil(found[-1] / branch))
            return found[1:]
    raise AgwmError(
        f"unrolled(states={num_states}): {num_steps} steps need {least} states or more; raise states, or lower "
        "num_steps."
    )


def run(forward: Callable[[State, Step], State], start: State, num_steps: int, num_states: int) -> tuple[State, PyTree]:
    """All steps ``forward(state, i) -> state``; the last state, and what `back` needs."""
    first = strides(num_steps, num_states)[0]
    state, kept = _advance_keeping(forward, start, 0, num_steps, first)
    last = jnp.asarray((num_steps - 1) // first * first, jnp.int32)
    return _advance(forward, state, last, num_steps), kept


def back(
    forward: Callable[[State, Step], State],
    backward: Callable[[Adjoint, State, Step], Adjoint],
    kept: PyTree,
    adjoint: Adjoint,
    num_steps: int,
    num_states: int,
) -> Adjoint:
    """The adjoint after ``backward(adjoint, state before step i, i)`` of every step, the last first."""
    levels = strides(num_steps, num_states)

    def segment(depth: int, kept: PyTree, low: Step, high: Step, adjoint: Adjoint) -> Adjoint:
        stride = levels[depth]
        count = -((low - high) // stride)

        def one(turn: Step, adjoint: Adjoint) -> Adjoint:
            j = count - 1 - turn
            state = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), kept)
            begin = low + j * stride
            if depth + 1 == len(levels):
                return backward(adjoint, state, begin)
            end = jnp.minimum(begin + stride, high)
            _, finer = _advance_keeping(forward, state, begin, end, levels[depth + 1], most=stride)
            return segment(depth + 1, finer, begin, end, adjoint)

        return jax.lax.fori_loop(0, count, one, adjoint)

    return segment(0, kept, 0, num_steps, adjoint)


def _advance(forward: Callable[[State, Step], State], state: State, low: Step, high: Step) -> State:
    return jax.lax.fori_loop(low, high, lambda i, state: forward(state, i), state)


def _advance_keeping(
    forward: Callable[[State, Step], State], state: State, low: Step, high: Step, stride: int, most: int | None = None
) -> tuple[State, PyTree]:
    """The states before steps low, low + stride, ..., stacked, and the last of them."""
    length = high - low if most is None else most
    size = -(-int(length) // stride)
    kept = jax.tree.map(lambda x: jnp.zeros((size, *jnp.shape(x)), jnp.result_type(x)).at[0].set(x), state)

    def one(j: Step, carry):
        state, kept = carry
        state = _advance(forward, state, low + (j - 1) * stride, low + j * stride)
        return state, jax.tree.map(lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, j, 0), kept, state)

    return jax.lax.fori_loop(1, -((low - high) // stride), one, (state, kept))
