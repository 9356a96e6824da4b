"""WiSE-FT: the weights that training leaves and those that it began from, mixed at the best of some shares."""

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from pydantic import Field

from agwm_jax.core.types import Params, Scalar
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.methods.interface import METHODS, Batches, Context, Info, Method, Phase, Setup, Variables
from agwm_jax.methods.technique import Technique

SPLIT = "development"
SHARE = "wise_ft"
"""The collection of the chosen a: the same number for every trained weight, by path."""

GRID = np.arange(11, dtype=np.float32) / 10


@METHODS.register("wise_ft", cost="finetune: 1; choose: 11/3", paper="arXiv 2109.01903")
class WiseFT(Technique):
    """Fine-tuning, and then ``W0 + a (W - W0)`` for all trained weights, with one a for all.

    a is the one of 0, 0.1, ..., 1 with the least loss on the split "development", which `task.train_size` draws; the
    smallest if several are alike. The records of the phase "choose" hold the best `a` so far, the last one that which
    was taken. W is what the method evaluates without this, so it composes with methods that mix or average; the head
    is moved too, to that which training began from. With `a` set, nothing is read; a = 1 is then `vanilla` bit for bit.

    Cost 1 fb a step, then 11/3 fb a batch of the development split; memory of plain fine-tuning, and in the end W0, W
    and their mixture. For scores on texts of another kind than the training texts. Source: Wortsman et al. 2021
    (arXiv 2109.01903), section 3.
    """

    changes: ClassVar = "end"
    open_to: ClassVar = frozenset({"objective", "gradient", "weights", "start"})
    name: Literal["wise_ft"] = Field(default="wise_ft", description="fine-tuning method")
    a: float | None = Field(
        default=None, ge=0, le=1, description="share of the trained weights; null: the best on the development split"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """The development split, unless a is given."""
        return (SPLIT,) if self.a is None else ()

    def change_method(self, method: Method, setup: Setup) -> Method:
        """With the mixture in place of the method's own weights."""
        trainable = setup.trainable

        def mixed(pretrained: Params, merged: Params, a: Scalar) -> Params:
            return {**merged, **{path: interpolate(pretrained[path], merged[path], a) for path in trainable}}

        if self.a is not None:
            a = self.a

            def at_a(pretrained: Params, learnt: Variables) -> Params:
                return mixed(pretrained, method.merge(pretrained, learnt), jnp.float32(a))

            return method._replace(merge=at_a)

        def merge(pretrained: Params, learnt: Variables) -> Params:
            share = learnt.get(SHARE)  # not there before the last phase
            merged = method.merge(pretrained, {name: own for name, own in learnt.items() if name != SHARE})
            return merged if share is None else mixed(pretrained, merged, share[trainable[0]])

        phase = _choose_phase(setup, method, mixed)
        return method._replace(stages=(*method.stages, (phase,)), merge=merge)


def interpolate(pretrained: Float[Array, "..."], task: Float[Array, "..."], a: Scalar) -> Float[Array, "..."]:
    """``W0 + a (W - W0)``, and W to the bit at a = 1."""
    return jnp.where(a == 1, task, pretrained + a.astype(task.dtype) * (task - pretrained))


class _Losses(NamedTuple):
    sums: Float[Array, " grid"]
    seen: Scalar


def _choose_phase(setup: Setup, method: Method, mixed) -> Phase:
    """Reads the development split once, and leaves the best a beside what the method learnt."""
    rows, loss = np.asarray(setup.rows[SPLIT]), setup.loss(reverse_only=True)
    places = evaluation_plan(len(rows), batch_size=setup.batch_size)
    plan = {SPLIT: np.where(places < 0, -1, rows[places]).astype(np.int32)}

    def start(context: Context, key: Key[Array, ""]) -> _Losses:
        del context, key
        return _Losses(jnp.zeros(len(GRID)), jnp.zeros(()))

    def step(state: _Losses, context: Context, batches: Batches, key, step) -> tuple[_Losses, Info]:
        del key, step
        batch = {name: column for name, column in batches[SPLIT].items() if name != "key"}  # no dropout
        merged, count = method.merge(context.pretrained, context.learnt), jnp.sum(batch["weight"])

        def one(a: Scalar) -> Scalar:
            return loss(mixed(context.pretrained, merged, a), batch) * count

        state = _Losses(state.sums + jax.lax.map(one, jnp.asarray(GRID)), state.seen + count)
        best = jnp.argmin(state.sums)
        return state, {"loss": state.sums[best] / state.seen, "a": jnp.asarray(GRID)[best]}

    def finish(context: Context, state: _Losses) -> Variables:
        best = jnp.asarray(GRID)[jnp.argmin(state.sums)]
        return {**context.learnt, SHARE: dict.fromkeys(setup.trainable, best)}

    return Phase("choose", plan, start, step, finish)
