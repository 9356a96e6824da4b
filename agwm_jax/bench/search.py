"""The search of a config, taken apart, and its outer step compiled for any estimator."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import Hypergradient, Problem, bilevel, hypergrad, mixup_problem, project_alpha
from agwm_jax.core.cost import matmul_flops
from agwm_jax.engine.batches import gather
from agwm_jax.engine.lanes import compiler_options
from agwm_jax.errors import AgwmError
from agwm_jax.models.loss import batch_loss
from agwm_jax.runs.build import Built, build, build_optimizer
from agwm_jax.runs.finished import columns_on_device
from agwm_jax.settings.config import Config


class Setting(NamedTuple):
    """The search of a config, taken apart."""

    built: Built
    problem: Callable[[Any, Any], Problem]
    """``problem(frozen, anchor)``; the anchor may be traced, so that one program serves all."""
    inner_tx: optax.GradientTransformation
    outer_tx: optax.GradientTransformation
    batches: Callable[..., tuple[Any, Any]]
    """``batches(step, order=0) -> (inner_batches, outer_batch)``."""
    start: Any
    """State of the search before its first step."""
    splits: dict[str, Any]
    """The rows that alpha is fitted on, and those of the development split, each as one batch without dropout."""
    learning_rate: float


def read_setting(config: Config, needed_steps: int) -> Setting:
    """Model, data, optimisers and the batches of the first search."""
    built = build(config)
    plan = built.method.phases[0].plan
    if "inner" not in plan:
        raise AgwmError(f"method.name is {config.method.name}: expected agwm, whose search is what is compared.")
    if len(plan["inner"]) < needed_steps:
        raise AgwmError(
            f"the search has {len(plan['inner'])} outer steps, {needed_steps} are needed: raise search.epochs."
        )
    loss = batch_loss(built.pretrained.apply, built.task.kind)
    mixed = tuple(built.initial.alpha)
    data = columns_on_device(built.encoded["train"])
    steps, k = plan["inner"].shape[:2]

    def batches(step: int, order: int = 0):
        key = jax.random.fold_in(jax.random.fold_in(built.key, order), step)
        inner_key, outer_key = jax.random.split(key)
        row = np.random.default_rng(order).permutation(steps)[step] if order else step
        inner = gather(data, jnp.asarray(plan["inner"][row]), inner_key)
        return inner, gather(data, jnp.asarray(plan["outer"][row]), outer_key)

    splits = {"fitted": gather(data, jnp.asarray(np.unique(plan["outer"][plan["outer"] >= 0])))}
    if "development" in built.encoded:
        held_out = columns_on_device(built.encoded["development"])
        splits["held out"] = gather(held_out, jnp.arange(len(built.encoded["development"].labels)))

    def problem(frozen, anchor) -> Problem:
        return mixup_problem(loss, frozen, mixed=mixed, complement=config.mixup.complement, anchor=anchor)

    inner_tx = build_optimizer(config.search.inner, num_steps=steps * k)
    outer_tx = build_optimizer(config.search.outer, num_steps=steps)
    solver = bilevel(
        problem(built.frozen, 0.0), hypergrad.first_order(), inner_tx=inner_tx, outer_tx=outer_tx, project=project_alpha
    )
    return Setting(
        built,
        problem,
        inner_tx,
        outer_tx,
        batches,
        solver.init(built.initial.task, built.initial.alpha),
        splits,
        config.search.inner.learning_rate,
    )


class Program(NamedTuple):
    """One compiled outer step; the estimator's last hypergradient is ``state.estimator[1]``."""

    init_estimator: Callable[[Any], Any]
    """``init_estimator(state) -> state``, with the estimator's own part begun anew."""
    step: Callable[..., Any]
    bytes: int
    """Temporaries and the new state, as the compiler reports them."""
    cost: float
    """Matrix products, in those of one forward and backward pass."""
    compile_seconds: float


def compile_step(setting: Setting, estimator: Hypergradient) -> Program:
    """Compile ``step(frozen, anchor, state, inner_batches, outer_batch) -> (state, info)``."""

    def estimate(*arguments):
        *given, (state, _) = arguments
        result = estimator.estimate(*given, state)
        return result._replace(state=(result.state, result.hypergradient))

    recording = Hypergradient(
        lambda inner, outer: (estimator.init(inner, outer), optax.tree.zeros_like(outer)), estimate
    )

    def solver(frozen, anchor):
        return bilevel(
            setting.problem(frozen, anchor),
            recording,
            inner_tx=setting.inner_tx,
            outer_tx=setting.outer_tx,
            project=project_alpha,
            rollback=False,
        )

    def step(frozen, anchor, state, inner_batches, outer_batch):
        return solver(frozen, anchor).step(state, inner_batches, outer_batch)

    frozen, initial = setting.built.frozen, setting.built.initial
    init_estimator = jax.jit(lambda state: state._replace(estimator=recording.init(state.inner, state.outer)))
    arguments = (frozen, jnp.float32(0), init_estimator(setting.start), *setting.batches(0))
    began = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile(compiler_options())
    seconds = time.perf_counter() - began

    def plain(frozen, task, alpha, batch):
        return jax.value_and_grad(setting.problem(frozen, 0.0).outer_loss)(task, alpha, batch)

    unit = matmul_flops(plain, frozen, initial.task, initial.alpha, arguments[-1])
    memory = compiled.memory_analysis()
    return Program(
        init_estimator,
        compiled,
        memory.temp_size_in_bytes + memory.output_size_in_bytes,
        matmul_flops(step, *arguments) / unit,
        seconds,
    )
