"""The phase that nearly every method is made of: minimise a loss over some variables with one optimiser."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.core.inner import InnerState, apply_gradient
from agwm_jax.core.types import Batch, Params, Scalar
from agwm_jax.data.plan import epoch_plan
from agwm_jax.methods.interface import Batches, Context, Info, Phase, Plan, Setup, Variables
from agwm_jax.methods.optimizers import OptimizerSettings
from agwm_jax.section import Section

TASK = "task"
"""The collection of trained model weights, by path."""

Forward = Callable[[Params, Variables, Key[Array, ""]], Params]
Objective = Callable[[Params, Batch], Scalar]


class Finetune(Section):
    """The last stage of every method that trains: passes over the whole training set, and the optimiser."""

    epochs: int = Field(default=3, ge=1, description="passes over the whole training set")
    optimizer: OptimizerSettings = Field(default=OptimizerSettings(), description="optimiser of the task weights W")


def task_weights(setup: Setup, pretrained: Params) -> Params:
    """The start of all trainable weights: the pretrained ones."""
    return {path: pretrained[path] for path in setup.trainable}


def start_at_pretrained(setup: Setup) -> Callable[[Params, Key[Array, ""]], Variables]:
    """`Method.init` of methods that train the model's weights and nothing else."""
    return lambda pretrained, key: {TASK: task_weights(setup, pretrained)}


def replace_weights(pretrained: Params, variables: Variables) -> Params:
    """`Method.merge` of methods whose task weights are the model's: W where trained, else W0."""
    return {**pretrained, **variables[TASK]}


def finetune_plan(setup: Setup) -> Plan:
    """``{"train": [steps, b]}``: the passes of `Finetune` over the whole training set, in an order of its own."""
    rows = np.arange(setup.num_examples)
    rng = setup.rng("finetune")
    return {"train": epoch_plan(rows, batch_size=setup.batch_size, epochs=setup.finetune.epochs, rng=rng)}


def training_phase(
    setup: Setup,
    *,
    name: str = "finetune",
    plan: Plan | None = None,
    tx: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    trains: Sequence[str] = (TASK,),
    forward: Forward | None = None,
    penalty: Callable[[Context, Variables], Scalar] | None = None,
    gradient: Callable[[Any, Context, Key[Array, ""]], Any] | None = None,
    keeps: Sequence[str] = (),
) -> Phase:
    """Minimise ``objective(forward(W0, variables), batch) + penalty`` over some collections, with a fresh optimiser.

    Args:
        setup: of the method.
        name: of the phase.
        plan: ``{"train": [steps, b]}``; None: `finetune_plan`.
        tx: optimiser; None: as `Finetune` says, over the length of the plan.
        objective: ``objective(params, batch)``; None: the task's loss.
        trains: collections that are trained; they start where earlier phases left them.
        forward: ``forward(pretrained, variables, key) -> weights of the forward pass``; the key is the step's own. None:
            W where trained, else W0.
        penalty: ``penalty(context, variables)``, added to the objective.
        gradient: ``gradient(grads, context, key) -> grads``, before the optimiser; `grads` is a dict by collection.
        keeps: collections beside `trains` that outlive the phase; all others that earlier phases left end here.

    Cost: 1 fb a step.
    """
    plan = finetune_plan(setup) if plan is None else plan
    steps = len(plan["train"])
    tx = setup.finetune.optimizer.build(num_steps=steps, weights=setup.model.weights) if tx is None else tx
    objective = setup.loss(reverse_only=True) if objective is None else objective
    forward = (
        (lambda pretrained, variables, key: replace_weights(pretrained, variables)) if forward is None else forward
    )

    def start(context: Context, key: Key[Array, ""]) -> InnerState:
        del key
        params = {name: context.learnt[name] for name in trains}
        return InnerState(params, tx.init(params))

    def step(
        state: InnerState, context: Context, batches: Batches, key: Key[Array, ""], step
    ) -> tuple[InnerState, Info]:
        del step

        def total(trained: Variables) -> Scalar:
            variables = {**context.learnt, **trained}
            value = objective(forward(context.pretrained, variables, key), batches["train"])
            return value if penalty is None else value + penalty(context, variables)

        value, grads = jax.value_and_grad(total)(state.params)
        if gradient is not None:
            grads = gradient(grads, context, key)
        return apply_gradient(tx, state, grads), {"loss": value}

    def finish(context: Context, state: InnerState) -> Variables:
        return {**{name: context.learnt[name] for name in keeps}, **state.params}

    return Phase(name, plan, start, step, finish)
