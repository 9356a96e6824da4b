"""A method whose last phase leaves a running mean of what it trains."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from agwm_jax.methods.interface import Context, Method, Phase, State, Variables


class _Averaged(NamedTuple):
    inner: State
    mean: Variables


def averaged(method: Method, weight: Callable[[Int[Array, ""]], Float[Array, ""]]) -> Method:
    """The method with ``mean <- W + weight(step) * (mean - W)`` after every step of its last phase, and left by it.

    `mean` holds all floats that the phase would leave; what does not change comes out as it was.

    Args:
        method: its last phase is the only one of its stage.
        weight: of the mean so far, by step from 0; 0 at step 0.
    """
    (phase,) = method.stages[-1]

    def start(context: Context, key) -> _Averaged:
        inner = phase.start(context, key)
        return _Averaged(inner, phase.finish(context, inner))

    def step(state: _Averaged, context: Context, batches, key, step):
        inner, info = phase.step(state.inner, context, batches, key, step)
        kept = weight(step)

        def mix(mean: Array, x: Array) -> Array:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            return x + kept.astype(x.dtype) * (mean - x)

        return _Averaged(inner, jax.tree.map(mix, state.mean, phase.finish(context, inner))), info

    def finish(context: Context, state: _Averaged) -> Variables:
        del context
        return state.mean

    last: Phase = phase._replace(
        start=start, step=step, finish=finish, monitor=lambda state: phase.monitor(state.inner)
    )
    return method._replace(stages=(*method.stages[:-1], (last,)))
