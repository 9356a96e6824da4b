"""The search of a config, taken apart, and its outer step compiled for any estimator."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax.core.bilevel import BilevelState, bilevel
from agwm_jax.core.cost import matmul_flops
from agwm_jax.core.estimators.base import Estimator
from agwm_jax.core.inner import InnerState
from agwm_jax.core.types import Params, Problem
from agwm_jax.engine.batches import gather
from agwm_jax.engine.lanes import compiler_options, peak_bytes
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Setup
from agwm_jax.methods.mixup import Mixture
from agwm_jax.runs.build import build, build_setup, recipe, stream_key
from agwm_jax.settings.schema import Config


class Setting(NamedTuple):
    """The search of a config, taken apart."""

    pretrained: Params
    problem: Callable[[Params, Any], Problem]
    """``problem(pretrained, anchor)``; the anchor may be traced, so that one program serves all."""
    project: Callable[[Any], Any]
    """Of alpha, after every update."""
    inner_tx: optax.GradientTransformation
    outer_tx: optax.GradientTransformation
    batches: Callable[..., tuple[Any, Any]]
    """``batches(step, order=0) -> (inner_batches, outer_batch)``."""
    start: Any
    """State of the search before its first step."""
    splits: dict[str, Any]
    """The rows that alpha is fitted on, and those of the development split, each as one batch without dropout."""
    learning_rate: float
    num_steps: int


def read_setting(config: Config, needed_steps: int) -> Setting:
    """Model, data, optimisers and the batches of the first search.

    Raises:
        AgwmError: the method has no search, or one of fewer steps.
    """
    if not hasattr(config.method, "search"):
        raise AgwmError(f"method.name is {config.method.name}: expected a method with a search, which is compared.")
    (prepared,) = build(config)
    setup: Setup = build_setup(
        recipe(config),
        prepared.pretrained,
        prepared.draw.task.kind,
        seed=prepared.seed,
        num_examples=prepared.train_size,
        rows=prepared.rows,
    )
    search, mixture = config.method.search, Mixture(config.method.mixup, setup)
    plan = search.plans(setup)[0]
    steps, k = plan["inner"].shape[:2]
    if steps < needed_steps:
        raise AgwmError(f"the search has {steps} outer steps, {needed_steps} are needed: raise method.search.epochs.")
    loss = setup.loss()
    columns = {name: jax.tree.map(jnp.asarray, each) for name, each in prepared.draw.encoded.items()}
    table = jax.tree.map(jnp.asarray, prepared.table)
    key = stream_key(prepared.seed, "dropout")

    def batches(step: int, order: int = 0):
        inner_key, outer_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, order), step))
        row = np.random.default_rng(order).permutation(steps)[step] if order else step
        inner = gather(table, jnp.asarray(plan["inner"][row]), inner_key)
        return inner, gather(table, jnp.asarray(plan["outer"][row]), outer_key)

    splits = {"fitted": gather(table, jnp.asarray(np.unique(plan["outer"][plan["outer"] >= 0])))}
    if "development" in columns:
        held_out = columns["development"]
        splits["held out"] = gather(held_out, jnp.arange(len(held_out["labels"])))

    def problem(pretrained: Params, anchor) -> Problem:
        return mixture.problem(pretrained, loss, anchor=anchor)

    pretrained = jax.tree.map(jnp.asarray, prepared.pretrained.params)
    inner_tx = search.inner.build(num_steps=steps * k, weights=setup.model.weights)
    outer_tx = search.outer.build(num_steps=steps, weights=setup.model.weights)
    alpha = mixture.init_alpha(stream_key(prepared.seed, "alpha"), pretrained)
    task = mixture.partition(pretrained).task
    # The estimator's own part is begun by `Program.init_estimator`.
    start = BilevelState(InnerState(task, inner_tx.init(task)), alpha, outer_tx.init(alpha), ())
    return Setting(
        pretrained,
        problem,
        mixture.project,
        inner_tx,
        outer_tx,
        batches,
        start,
        splits,
        search.inner.learning_rate,
        steps,
    )


class Program(NamedTuple):
    """One compiled outer step; the estimator's last hypergradient is ``state.estimator[1]``."""

    init_estimator: Callable[[Any], Any]
    """``init_estimator(state) -> state``, with the estimator's own part begun anew."""
    step: Callable[..., Any]
    """``step(pretrained, anchor, state, inner_batches, outer_batch) -> (state, info)``."""
    bytes: int
    """At the peak, as the compiler reports it; the state is not donated."""
    cost: float
    """Matrix products, in those of one forward and backward pass."""
    compile_seconds: float


def compile_step(setting: Setting, estimator: Estimator) -> Program:
    """Compile the outer step of a search, so that it also gives the hypergradient."""

    def estimate(*arguments):
        *given, (state, _) = arguments
        result = estimator.estimate(*given, state)
        return result._replace(state=(result.state, result.hypergradient))

    recording = estimator._replace(
        init=lambda inner, outer: (estimator.init(inner, outer), optax.tree.zeros_like(outer)),
        estimate=estimate,
        retake=None,
    )

    def step(pretrained, anchor, state, inner_batches, outer_batch):
        solver = bilevel(
            setting.problem(pretrained, anchor),
            recording,
            inner_tx=setting.inner_tx,
            outer_tx=setting.outer_tx,
            project=setting.project,
        )
        return solver.step(state, inner_batches, outer_batch)

    init_estimator = jax.jit(lambda state: state._replace(estimator=recording.init(state.inner, state.outer)))
    arguments = (setting.pretrained, jnp.float32(0), init_estimator(setting.start), *setting.batches(0))
    began = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile(compiler_options())
    seconds = time.perf_counter() - began

    def plain(pretrained, task, alpha, batch):
        return jax.value_and_grad(setting.problem(pretrained, 0.0).outer_loss)(task, alpha, batch)

    task, alpha = setting.start.inner.params, setting.start.outer
    unit = matmul_flops(plain, setting.pretrained, task, alpha, arguments[-1])
    return Program(init_estimator, compiled, peak_bytes(compiled), matmul_flops(step, *arguments) / unit, seconds)
