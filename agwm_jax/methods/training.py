"""The phase that nearly every method is made of: minimise a loss over some variables with one optimiser."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Key
from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.core.deferred import Deferred
from agwm_jax.core.inner import InnerState
from agwm_jax.core.types import Batch, Params, Scalar
from agwm_jax.data.plan import epoch_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Batches, Context, Info, Phase, Plan, Setup, Variables
from agwm_jax.methods.optimizers import OptimizerSettings
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import Weights
from agwm_jax.section import Section

TASK = "task"
"""The collection of trained model weights, by path."""

Forward = Callable[[Params, Variables, Key[Array, ""]], Effective]
Objective = Callable[[Effective, Batch], Scalar]


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


def in_layers(weights: Weights, function: Callable[..., Array], operands: Mapping[str, tuple[Any, ...]]) -> Effective:
    """Weights ``function(*operands)`` by path: those that are stacked over layers within the model's scan, others now.

    So of the former only one layer's live at a time. All operands of a stacked weight have its layer axis first, and
    `function` must do without it; it must be the same object at every call, so make it once.
    """
    return {
        path: Deferred(function, args) if weights[path].is_stacked else function(*args)
        for path, args in operands.items()
    }


def finetune_plan(setup: Setup) -> Plan:
    """``{"train": [steps, b]}``: the passes of `Finetune` over the whole training set, in an order of its own."""
    rows = np.arange(setup.num_examples)
    rng = setup.rng("finetune")
    return {"train": epoch_plan(rows, batch_size=setup.batch_size, epochs=setup.finetune.epochs, rng=rng)}


def mean_gradient(
    loss: Callable[[Any, Batch], Scalar], trained: Any, batch: Batch, *, parts: int
) -> tuple[Scalar, Any]:
    """Value and gradient of ``loss(trained, batch)``, a mean over real examples, taken over parts of the batch in turn.

    A part counts by the sum of its weights, so that the result is the whole batch's to rounding; where there is more
    than one part, each has a dropout key of its own.

    Args:
        loss: to differentiate.
        trained: what it is differentiated in.
        batch: ``{column: [b, ...], "weight": [b], "key": dropout key or absent}``.
        parts: how many, a divisor of b; only one part's activations live at a time.
    """
    if parts == 1:
        return jax.value_and_grad(loss)(trained, batch)
    columns = {name: column for name, column in batch.items() if name != "key"}
    # Every parts-th row, so that a batch that is cut over devices stays cut, and padding is spread.
    pieces = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), columns)
    if "key" in batch:
        pieces["key"] = jax.random.split(batch["key"], parts)
    whole = jnp.sum(batch["weight"])

    def add(sums, piece):
        real = jnp.sum(piece["weight"])
        # A part of nothing but padding has no mean: its rows are weighed for a finite one, which counts as nothing.
        weight = jnp.where(real > 0, piece["weight"], jnp.ones_like(piece["weight"]))
        found = jax.value_and_grad(loss)(trained, {**piece, "weight": weight})
        return trees.add_scale(sums, real / whole, found), None

    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(jax.value_and_grad(loss), trained, first)
    )
    return jax.lax.scan(add, zeros, pieces)[0]


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
    gradient: Callable[[Variables, Context, Key[Array, ""]], Variables] | None = None,
    update: Callable[[Variables, Context, Variables, Int[Array, ""]], Variables] | None = None,
    keeps: Sequence[str] = (),
) -> Phase:
    """Minimise ``objective(forward(W0, variables), batch) + penalty`` over some collections, with a fresh optimiser.

    Args:
        setup: of the method; its ``accumulate`` parts of a batch are taken in turn, with the same noise of `forward`.
        name: of the phase.
        plan: ``{"train": [steps, b]}``; None: `finetune_plan`.
        tx: optimiser; None: as `Finetune` says, over the length of the plan.
        objective: ``objective(params, batch)``, a mean over the batch's real examples; None: the task's loss.
        trains: collections that are trained; they start where earlier phases left them.
        forward: ``forward(pretrained, variables, key) -> weights of the forward pass``; the key is the step's own.
            None: W where trained, else W0.
        penalty: ``penalty(context, variables)``, added to the objective.
        gradient: ``gradient(grads, context, key) -> grads``, before the optimiser; these are dicts by collection.
        update: ``update(updates, context, trained, step) -> updates``, after the optimiser: what is added to `trained`.
        keeps: collections beside `trains` that outlive the phase; all others that earlier phases left end here.

    Raises:
        AgwmError: a batch cannot be cut into ``setup.accumulate`` equal parts.

    Cost: 1 fb a step.
    """
    plan = finetune_plan(setup) if plan is None else plan
    steps, batch_size = plan["train"].shape
    if batch_size % setup.accumulate:
        raise AgwmError(
            f"a batch of {batch_size} examples cannot be cut into {setup.accumulate} equal parts for the accumulation "
            "of gradients: give a number of parts that divides the batch size."
        )
    tx = setup.finetune.optimizer.build(num_steps=steps, weights=setup.model.weights) if tx is None else tx
    objective = setup.loss(reverse_only=True) if objective is None else objective
    forward = _plain_forward if forward is None else forward

    def start(context: Context, key: Key[Array, ""]) -> InnerState:
        del key
        params = {name: context.learnt[name] for name in trains}
        return InnerState(params, tx.init(params))

    def step(
        state: InnerState, context: Context, batches: Batches, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[InnerState, Info]:
        def loss(trained: Variables, batch: Batch) -> Scalar:
            variables = {**context.learnt, **trained}
            value = objective(forward(context.pretrained, variables, key), batch)
            return value if penalty is None else value + penalty(context, variables)

        value, grads = mean_gradient(loss, state.params, batches["train"], parts=setup.accumulate)
        if gradient is not None:
            grads = gradient(grads, context, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        if update is not None:
            updates = update(updates, context, state.params, step)
        return InnerState(optax.apply_updates(state.params, updates), opt_state), {"loss": value}

    def finish(context: Context, state: InnerState) -> Variables:
        return {**{name: context.learnt[name] for name in keeps}, **state.params}

    return Phase(name, plan, start, step, finish)


def _plain_forward(pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Params:
    del key
    return replace_weights(pretrained, variables)
