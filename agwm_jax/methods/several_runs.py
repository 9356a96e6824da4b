"""Training runs that start at the same weights and go side by side, each on its own part of the training set."""

from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.methods.agwm import InnerOptimizer, Search
from agwm_jax.methods.interface import Batches, Context, Method, Phase, Plan, Setup, Stage, State, Variables
from agwm_jax.methods.training import Finetune, replace_weights, start_at_pretrained, training_phase
from agwm_jax.section import Section

Keep = Callable[[Context, Variables, int], Variables]
"""``keep(context, learnt, index) -> learnt``: what is left after run `index`; ``context.learnt`` is what the runs before
left, `learnt` what this one ends with."""


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


def two_stages(setup: Setup, first: FirstStage, *, num_splits: int) -> Method:
    """Runs on random parts of the training set, the mean of all their weights, then `finetune` with a fresh optimiser.

    The splits, the order of the data and the dropout are those of `agwm` with as many splits and one inner step: phases
    and batches are named alike.
    """
    search = Search(epochs=first.epochs, validation_fraction=first.validation_fraction, num_splits=num_splits)
    plans = [plan["inner"] for plan in search.plans(setup)]  # [steps, 1, b]
    own = setup._replace(finetune=Finetune(epochs=first.epochs, optimizer=first.optimizer))
    runs = runs_side_by_side(
        own, [{"inner": plan[:, 0]} for plan in plans], name="search", keep=running_mean, batch="inner"
    )
    (step,) = {run.step for run in runs}

    def step_of_one_batch(state: State, context: Context, batches: Batches, key: Key[Array, ""], number):
        return step(state, context, {"inner": jax.tree.map(lambda x: x[0], batches["inner"])}, key, number)

    stage = tuple(
        run._replace(plan={"inner": plan}, step=step_of_one_batch) for run, plan in zip(runs, plans, strict=True)
    )
    return Method(start_at_pretrained(setup), (stage, (training_phase(setup),)), replace_weights)
