"""Early stopping: of the weights at the ends of passes, those with the least loss on a development split."""

from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from pydantic import Field

from agwm_jax.core.types import Batch, Scalar
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.methods.interface import METHODS, Batches, Context, Info, Method, Phase, Setup, State, Variables
from agwm_jax.methods.technique import Technique

SPLIT = "development"

WATCHED = "watched"
"""The development split in the plan. Behind "train" in the alphabet, by which a step's dropout keys are dealt out: so
training sees the keys that it sees without this."""


@METHODS.register("early_stopping", cost="1", paper="Prechelt 1998")
class EarlyStopping(Technique):
    """Fine-tuning whose result are the weights after the pass with the least loss on the split "development".

    `task.train_size` draws that split. A look after every pass of the last phase, without dropout; of equal losses the
    first pass counts. With `patience` p, passes after p in a row that were no better no longer count. All passes are
    computed in any case, for seeds that go side by side share one program: it changes the result and saves no time.
    The records hold the loss of the last look as ``development`` (the first, which does not count, is after one step),
    and the best pass so far, from 1, as ``best_pass``. One pass is `vanilla` bit for bit.

    Cost 1 fb a step, and 1/3 fb a batch of the development split after each pass; memory of plain fine-tuning and once
    more the trained weights. Where long training overfits, and texts can be spared for the choice: they might train
    instead. Source: Prechelt 1998 (Early Stopping - But When?), and any trainer that loads the best model at the end.
    """

    changes: ClassVar = "end"
    open_to: ClassVar = frozenset({"objective", "gradient", "weights", "start"})
    name: Literal["early_stopping"] = Field(default="early_stopping", description="fine-tuning method")
    patience: int | None = Field(
        default=None, ge=1, description="passes in a row without a better one that end the search; null: all count"
    )

    @property
    def reads(self) -> tuple[str, ...]:
        """The development split."""
        return (SPLIT,)

    def change_method(self, method: Method, setup: Setup) -> Method:
        """With the best pass in place of the last."""
        (phase,) = method.stages[-1]
        rows, loss = np.asarray(setup.rows[SPLIT]), setup.loss(reverse_only=True)
        places = evaluation_plan(len(rows), batch_size=setup.batch_size)
        split = np.where(places < 0, -1, rows[places]).astype(np.int32)
        passes = setup.finetune.epochs
        ends = np.ceil(phase.num_steps * np.arange(1, passes + 1) / passes).astype(np.int32)

        def start(context: Context, key: Key[Array, ""]) -> _State:
            inner = phase.start(context, key)
            largest = jnp.finfo(jnp.float32).max  # not infinite: the engine takes that for divergence
            return _State(inner, phase.finish(context, inner), jnp.float32(largest), jnp.int32(0), jnp.float32(0))

        def step(
            state: _State, context: Context, batches: Batches, key: Key[Array, ""], step: Int[Array, ""]
        ) -> tuple[_State, Info]:
            own = {name: batch for name, batch in batches.items() if name != WATCHED}
            inner, info = phase.step(state.inner, context, own, key, step)

            def look(state: _State) -> _State:
                learnt = phase.finish(context, inner)
                found = _mean_loss(loss, method.merge(context.pretrained, learnt), batches[WATCHED])
                number = jnp.sum(ends <= step + 1).astype(jnp.int32)
                better = (found < state.least) & (number > 0)
                if self.patience is not None:
                    better &= number - state.best <= self.patience
                kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), learnt, state.kept)
                best = jnp.where(better, number, state.best)
                return _State(inner, kept, jnp.where(better, found, state.least), best, found)

            # Not where(): a conditional takes one branch, also for lanes, as the step number is common to them.
            due = (step == 0) | jnp.any(step + 1 == ends)
            state = jax.lax.cond(due, look, lambda state: state, state._replace(inner=inner))
            return state, {**info, "development": state.last, "best_pass": state.best.astype(jnp.float32)}

        def finish(context: Context, state: _State) -> Variables:
            del context
            return state.kept

        last: Phase = phase._replace(
            plan={**phase.plan, WATCHED: np.broadcast_to(split, (phase.num_steps, *split.shape))},
            start=start,
            step=step,
            finish=finish,
            monitor=lambda state: phase.monitor(state.inner),
        )
        return method._replace(stages=(*method.stages[:-1], (last,)))


class _State(NamedTuple):
    inner: State
    kept: Variables
    least: Float[Array, ""]
    best: Int[Array, ""]
    last: Float[Array, ""]


def _mean_loss(loss, params, batches: Batch) -> Scalar:
    """Over all real examples of batches ``[k, b, ...]``, float32; without dropout."""

    def add(sums, batch):
        count = jnp.sum(batch["weight"])
        return (sums[0] + loss(params, batch) * count, sums[1] + count), None

    quiet = {name: column for name, column in batches.items() if name != "key"}
    (total, count), _ = jax.lax.scan(add, (jnp.float32(0), jnp.float32(0)), quiet)
    return (total / count).astype(jnp.float32)
