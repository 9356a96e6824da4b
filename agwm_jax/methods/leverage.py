"""Does the gate matter: losses on the validation parts with what was learnt, with A = 1, and with the best number."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from agwm_jax.core.mixup import gate
from agwm_jax.core.types import Alpha, Scalar
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.methods.interface import Batches, Context, Info, Phase, Setup, Variables
from agwm_jax.methods.mixup import ALPHA, Mixture
from agwm_jax.methods.training import TASK

NUMBERS = np.linspace(0, 1, 11)
"""The single gates that the learnt one is held against; the last is A = 1."""

ALPHAS = "alphas"
"""The collection of what the searches on several splits found, until it has been compared: ``{index: alpha}``."""


class _State(NamedTuple):
    examples: Float[Array, ""]
    learnt: Float[Array, ""]
    """Sum of losses, as those below."""
    numbers: Float[Array, " 11"]
    agreement: Float[Array, ""]


def leverage_phase(setup: Setup, mixture: Mixture, rows: Int[np.ndarray, " n"]) -> Phase:
    """Reads examples once, without dropout, at the W and alpha that the search left; trains nothing.

    Args:
        setup: of the method.
        mixture: of the method.
        rows: examples that alpha was fitted on.

    ``info`` at the end: ``validation_loss`` with the gate learnt, ``open_loss`` with A = 1, ``number_loss`` with the
    best of `NUMBERS`, ``best_number``, and with several splits ``alpha_agreement``, the mean correlation of their A.
    Cost: 4 fb a step, twelve forward passes.
    """
    loss = setup.loss(reverse_only=True)
    places = evaluation_plan(len(rows), batch_size=setup.batch_size)
    plan = {"outer": np.where(places >= 0, rows[np.maximum(places, 0)], -1).astype(np.int32)}

    def start(context: Context, key) -> _State:
        del key
        zero = jnp.zeros(())
        found = [mixture.gates(alpha) for alpha in context.learnt.get(ALPHAS, {}).values()]
        return _State(zero, zero, jnp.zeros(len(NUMBERS)), agreement(found) if len(found) > 1 else zero)

    def step(state: _State, context: Context, batches: Batches, key, step) -> tuple[_State, Info]:
        del key, step
        batch = {name: x for name, x in batches["outer"].items() if name != "key"}
        task, count = context.learnt[TASK], jnp.sum(batch["weight"])

        def mixed(gates: Alpha) -> Scalar:
            return loss(mixture.through(context.pretrained, task, gates), batch)

        def at(number: Float[Array, ""]) -> Scalar:
            shape = {path: (x.shape[0], *[1] * (x.ndim - 1)) for path, x in task.items()}
            return mixed({path: jnp.full(shape[path], number) for path in mixture.mixed})

        learnt = mixed(mixture.gates(context.learnt[ALPHA]))
        numbers = jax.lax.map(at, jnp.asarray(NUMBERS, jnp.float32))
        after = _State(
            state.examples + count, state.learnt + count * learnt, state.numbers + count * numbers, state.agreement
        )
        return after, {"loss": learnt}

    def finish(context: Context, state: _State) -> Variables:
        del state
        return {TASK: context.learnt[TASK], ALPHA: context.learnt[ALPHA]}

    def monitor(state: _State) -> Info:
        numbers, best = state.numbers / state.examples, jnp.argmin(state.numbers)
        return {
            "validation_loss": state.learnt / state.examples,
            "open_loss": numbers[-1],
            "number_loss": numbers[best],
            "best_number": jnp.asarray(NUMBERS, jnp.float32)[best],
            "alpha_agreement": state.agreement,
        }

    return Phase("leverage", plan, start, step, finish, monitor)


def agreement(found: Sequence[Alpha]) -> Scalar:
    """Mean correlation of the gates of several searches, over all entries and pairs; 0 where one is constant."""
    vectors = []
    for gates in found:
        each = [gate(factors) for factors in gates.values()]
        count = float(sum(x.size for x in each))
        mean = sum(jnp.sum(x) for x in each) / count
        norm = jnp.sqrt(sum(jnp.sum((x - mean) ** 2) for x in each))
        vectors.append([(x - mean) / jnp.where(norm > 0, norm, 1) for x in each])
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i)]
    products = [sum(jnp.sum(a * b) for a, b in zip(vectors[i], vectors[j], strict=True)) for i, j in pairs]
    return jnp.asarray(sum(products) / len(pairs))
