"""Model Stock: the mean of several runs, pulled to the pretrained weights by how far the runs disagree."""

from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.core.types import Params
from agwm_jax.data.plan import epoch_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Context, Method, MethodSettings, Plan, Setup, Variables
from agwm_jax.methods.several_runs import running_mean, runs_side_by_side
from agwm_jax.methods.training import TASK, replace_weights, start_at_pretrained
from agwm_jax.models.weights import Weights

DIRECTIONS = "directions"
"""The collection of sums over runs of ``(W_k - W0) / |W_k - W0|``, by path; only between runs."""


@METHODS.register("model_stock", cost="1", paper="arXiv 2403.19522")
class ModelStock(MethodSettings):
    """K runs on K disjoint parts of the training set, then ``t mean(W_k) + (1 - t) W0`` with a t for each tensor.

    ``t = K cos / (1 + (K - 1) cos)``, cos the mean cosine of the changes ``W_k - W0`` of two runs, 0 where it is below:
    runs that agree are kept, runs that do not are pulled back. Weights that are stacked over layers have a t for each
    layer. W0 is where all runs start; the head starts fresh and alike in all of them, and is pulled to that start. The
    parts have equal sizes: as many examples as K does not divide are left out. (The paper's runs see all examples in
    different orders, and it needs two of them.)

    Cost 1 fb a step, and all runs together take as many steps as `vanilla`; memory of plain fine-tuning for each run
    that goes side by side, and twice the weights whatever K is. Where one run's score is noisy. Source: Jang et al.
    2024 (arXiv 2403.19522), section 4 and its appendix for K above 2.
    """

    # What techniques make of the end is made of one last run.
    open_to: ClassVar = frozenset({"objective", "gradient", "weights", "start"})
    name: Literal["model_stock"] = Field(default="model_stock", description="fine-tuning method")
    num_runs: int = Field(default=4, ge=2, description="K, disjoint parts of the training set, one run on each")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""

        def keep(context: Context, learnt: Variables, index: int) -> Variables:
            start, task = context.initial[TASK], learnt[TASK]
            units = {path: unit_change(setup.model.weights, path, x, start[path]) for path, x in task.items()}
            mean = running_mean(context._replace(learnt={TASK: context.learnt[TASK]}), learnt, index)
            if index > 0:
                units = {path: context.learnt[DIRECTIONS][path] + unit for path, unit in units.items()}
            if index < self.num_runs - 1:
                return {**mean, DIRECTIONS: units}
            return {TASK: stock(setup.model.weights, mean[TASK], units, start, self.num_runs)}

        stage = runs_side_by_side(setup, self._plans(setup), name="run", keep=keep)
        return Method(start_at_pretrained(setup), (stage,), replace_weights)

    def _plans(self, setup: Setup) -> list[Plan]:
        size = setup.num_examples // self.num_runs
        if size < setup.batch_size:
            raise AgwmError(
                f"method.num_runs is {self.num_runs}: a part of {setup.num_examples} training examples would have "
                f"{size}, fewer than one batch of {setup.batch_size}: give fewer runs, a smaller batch or more data."
            )
        order = setup.rng("parts").permutation(setup.num_examples).astype(np.int32)
        parts = order[: self.num_runs * size].reshape(self.num_runs, size)
        rngs = [setup.rng(f"run-{index}") for index in range(self.num_runs)]
        size, epochs = setup.batch_size, setup.finetune.epochs
        return [
            {"train": epoch_plan(np.sort(part), batch_size=size, epochs=epochs, rng=rng)}
            for part, rng in zip(parts, rngs, strict=True)
        ]


def unit_change(weights: Weights, path: str, task: Array, start: Array) -> Array:
    """``(W - W0) / |W - W0|`` in float32 or better, of each layer where they are stacked; 0 where nothing changed."""
    change = (task - start).astype(jnp.promote_types(task.dtype, jnp.float32))
    return change / trees.divisor(jnp.sqrt(_sum_of_squares(weights, path, change)))


def stock(weights: Weights, mean: Params, directions: Params, start: Params, num_runs: int) -> Params:
    """``W0 + t (mean(W_k) - W0)``; the sum of unit vectors has ``|sum|^2 = K + K (K - 1) cos``."""

    def one(path: str) -> Array:
        square = _sum_of_squares(weights, path, directions[path])
        cosine = jnp.clip((square - num_runs) / (num_runs * (num_runs - 1)), 0, 1)
        t = num_runs * cosine / (1 + (num_runs - 1) * cosine)
        return (start[path] + t * (mean[path] - start[path])).astype(start[path].dtype)

    return {path: one(path) for path in mean}


def _sum_of_squares(weights: Weights, path: str, x: Array) -> Array:
    """Over all axes but the one of layers, which are kept."""
    axes = tuple(range(int(weights[path].is_stacked), x.ndim))
    return jnp.sum(x**2, axis=axes, keepdims=True)
