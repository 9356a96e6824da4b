"""The phase that nearly every method is made of: minimise a loss over some variables with one optimiser."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from agwm_jax.methods.interface import Batches, Context, Hooks, Info, Method, Phase, Plan, Setup, Variables
from agwm_jax.methods.optimizers import OptimizerSettings, clipped
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import Weights
from agwm_jax.section import Section

TASK = "task"
"""The collection of trained model weights, by path."""

PRETRAINED = "pretrained"
"""Where `training_phase` differentiates pretrained weights, the collection of these."""

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
    batch: str = "train",
    tx: optax.GradientTransformation | None = None,
    objective: Objective | None = None,
    trains: Sequence[str] = (TASK,),
    forward: Forward | None = None,
    project: Callable[[Variables], Variables] | None = None,
    keeps: Sequence[str] = (),
    hooks: Sequence[Hooks] = (),
    clip_with: Callable[[Context], Variables] | None = None,
) -> Phase:
    """Minimise ``objective(forward(W0, variables), batch)`` over some collections, with a fresh optimiser.

    Args:
        setup: of the method. Its ``accumulate`` parts of a batch are taken in turn, with the same noise of `forward`;
            its techniques act here.
        name: of the phase.
        plan: with ``[steps, b]`` rows for `batch`; None: `finetune_plan`.
        batch: which one of the plan's is trained on.
        tx: optimiser; None: as `Finetune` says, over the length of the plan.
        objective: ``objective(params, batch)``, a mean over the batch's real examples; None: `Setup.training_loss`.
        trains: collections that are trained; they start where earlier phases left them.
        forward: ``forward(pretrained, variables, key) -> weights of the forward pass``; the key is the step's own.
            None: W where trained, else W0.
        project: ``project(trained) -> trained``, after every update.
        keeps: collections beside `trains` that outlive the phase; all others that earlier phases left end here.
        hooks: of the method itself, before those of the setup's techniques.
        clip_with: collections whose gradients count in the norm of `Finetune`'s clip and are not updated; pretrained
            weights among them are called `PRETRAINED`. Not with a `tx`. None: the trained ones only.

    Raises:
        AgwmError: a batch cannot be cut into ``setup.accumulate`` equal parts, or `clip_with` beside a hook that takes
            the gradient itself.

    Cost: 1 fb a step, and what the hooks add.
    """
    plan = finetune_plan(setup) if plan is None else plan
    steps, batch_size = plan[batch].shape
    if batch_size % setup.accumulate:
        raise AgwmError(
            f"a batch of {batch_size} examples cannot be cut into {setup.accumulate} equal parts for the accumulation "
            "of gradients: give a number of parts that divides the batch size."
        )
    optimizer = setup.finetune.optimizer
    max_norm = None if clip_with is None else optimizer.gradient_clip
    if max_norm is not None:  # then this phase clips, and not its optimiser
        optimizer = optimizer.model_copy(update={"gradient_clip": None})
    tx = setup.optimizer(optimizer, num_steps=steps) if tx is None else tx
    objective = setup.training_loss(reverse_only=True) if objective is None else objective
    forward = _plain_forward if forward is None else forward
    hooks = (*hooks, *(technique.hooks(setup, num_steps=steps) for technique in setup.techniques))
    if max_norm is not None and any(hook.differentiate is not None for hook in hooks):
        raise AgwmError(
            "a technique that takes the gradient elsewhere (such as sam) does not go together with a clip over more "
            "than the trained weights: leave it out, or set method.finetune_clip to trained."
        )

    def start(context: Context, key: Key[Array, ""]) -> InnerState:
        del key
        params = {name: context.learnt[name] for name in trains}
        return InnerState(params, tx.init(params))

    def step(
        state: InnerState, context: Context, batches: Batches, key: Key[Array, ""], step: Int[Array, ""]
    ) -> tuple[InnerState, Info]:
        keys = _hook_keys(key, len(hooks))

        beside = {} if max_norm is None or clip_with is None else clip_with(context)

        def loss(trained: Variables, batch: Batch) -> Scalar:
            variables = {**context.learnt, **trained}
            pretrained = {**context.pretrained, **variables.pop(PRETRAINED, {})}
            noisy = variables
            for hook, own in zip(hooks, keys, strict=True):
                noisy = noisy if hook.perturb is None else hook.perturb(context, noisy, own)
            value = objective(forward(pretrained, noisy, key), batch)
            for hook in hooks:
                value = value if hook.penalty is None else value + hook.penalty(context, variables)
            return value

        def value_and_grad(trained: Variables) -> tuple[Scalar, Variables]:
            return mean_gradient(loss, trained, batches[batch], parts=setup.accumulate)

        for hook in hooks:
            if hook.differentiate is not None:
                value_and_grad = partial(hook.differentiate, value_and_grad)
        value, found = value_and_grad({**state.params, **beside})
        grads = {name: found[name] for name in state.params}
        for hook, own in zip(hooks, keys, strict=True):
            grads = grads if hook.gradient is None else hook.gradient(grads, context, own)
        if max_norm is not None:
            grads = clipped(grads, trees.norm({**found, **grads}), max_norm, eps=setup.finetune.optimizer.clip_eps)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        for hook in hooks:
            updates = updates if hook.update is None else hook.update(updates, grads, context, state.params, step)
        trained = optax.apply_updates(state.params, updates)
        return InnerState(trained if project is None else project(trained), opt_state), {"loss": value}

    def finish(context: Context, state: InnerState) -> Variables:
        return {**{name: context.learnt[name] for name in keeps}, **state.params}

    return Phase(name, plan, start, step, finish)


def plain_fine_tuning(setup: Setup) -> Method:
    """All weights trained in one phase: what techniques change where they are a method of their own."""
    return Method(start_at_pretrained(setup), ((training_phase(setup),),), replace_weights)


def _hook_keys(key: Key[Array, ""], count: int) -> list[Key[Array, ""]]:
    return [jax.random.fold_in(key, number) for number in range(count)]


def _plain_forward(pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Params:
    del key
    return replace_weights(pretrained, variables)
