"""Training runs that start at the same weights and go side by side, each on its own part of the training set."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Int32, Key
from pydantic import Field

from agwm_jax.data.plan import epoch_plan, split_indices
from agwm_jax.methods.agwm import InnerOptimizer
from agwm_jax.methods.interface import Batches, Context, Info, Method, Phase, Plan, Setup, Stage, State, Variables
from agwm_jax.methods.training import Finetune, replace_weights, start_at_pretrained, training_phase
from agwm_jax.section import Section

Keep = Callable[[Context, Variables, int], Variables]
"""``keep(context, learnt, index) -> learnt``: what is left after run `index`, which ended with `learnt`;
``context.learnt`` is what was left before."""


def runs_side_by_side(setup: Setup, plans: Sequence[Plan], *, name: str, keep: Keep, batch: str = "train") -> Stage:
    """One run a plan, ``name-0``, ``name-1``, ...: all start at the initial weights, with a fresh optimiser.

    Args:
        setup: of the method; `Setup.finetune` says how each run trains.
        plans: of one shape.
        name: of the phases.
        keep: called run after run, in order.
        batch: which one of the plan's is trained on.
    """
    one = training_phase(setup, name=name, plan=plans[0], batch=batch)

    def start(context: Context, key: Key[Array, ""]) -> State:
        return one.start(context._replace(learnt=context.initial), key)

    def run(index: int, plan: Plan) -> Phase:
        def finish(context: Context, state: State) -> Variables:
            return keep(context, one.finish(context, state), index)

        return one._replace(name=f"{name}-{index}", plan=plan, start=start, finish=finish)

    return tuple(run(index, plan) for index, plan in enumerate(plans))


def running_mean(context: Context, learnt: Variables, index: int) -> Variables:
    """Mean of what the runs so far ended with: after the last, of all of them."""
    if index == 0:
        return learnt
    return jax.tree.map(lambda mean, x: mean + (x - mean) / (index + 1), context.learnt, learnt)


class FirstStage(Section):
    """What `agwm` does with W in its search, without the search: training on part of the training set."""

    epochs: int = Field(default=3, ge=1, description="passes over the part of the training set that is trained on")
    validation_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of the training set that is left out, as agwm's search does"
    )
    optimizer: InnerOptimizer = Field(default=InnerOptimizer(), description="optimiser of the task weights W")

    def plan(self, setup: Setup, index: int) -> Int32[np.ndarray, "steps b"]:
        """Rows of the passes over the training part of a split: those of agwm's inner batches."""
        rng = setup.rng(f"search-{index}")
        train, _ = split_indices(setup.num_examples, validation_fraction=self.validation_fraction, rng=rng)
        return epoch_plan(train, batch_size=setup.batch_size, epochs=self.epochs, rng=rng)


def two_stages(setup: Setup, first: FirstStage, *, num_splits: int) -> Method:
    """Runs on random parts of the training set, the mean of all their weights, then `finetune` with a fresh optimiser.

    The splits, the order of the data and the dropout are those of `agwm` with as many splits and one inner step: phases
    and batches are named alike.
    """
    plans = [{"inner": first.plan(setup, index)} for index in range(num_splits)]
    own = setup._replace(finetune=Finetune(epochs=first.epochs, optimizer=first.optimizer))
    runs = runs_side_by_side(own, plans, name="search", keep=running_mean, batch="inner")
    (step,) = {run.step for run in runs}

    def step_of_one_batch(
        state: State, context: Context, batches: Batches, key: Key[Array, ""], number: Int[Array, ""]
    ) -> tuple[State, Info]:
        return step(state, context, {"inner": jax.tree.map(lambda x: x[0], batches["inner"])}, key, number)

    # agwm's batches are [k, b], each with a dropout key split off: these are too, with k = 1.
    stage = tuple(run._replace(plan={"inner": run.plan["inner"][:, None]}, step=step_of_one_batch) for run in runs)
    return Method(start_at_pretrained(setup), (stage, (training_phase(setup),)), replace_weights)
