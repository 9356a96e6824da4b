"""Re-initialisation: the pooler and the top layers start from random weights."""

import zlib
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.core.types import Params
from agwm_jax.methods.interface import METHODS, Method, Setup, Variables
from agwm_jax.methods.layers import check_layers, from_the_top
from agwm_jax.methods.technique import Technique
from agwm_jax.methods.training import TASK


@METHODS.register("reinit", cost="1", paper="arXiv 2006.05987")
class Reinit(Technique):
    """Fine-tuning whose pooler and top `layers` layers start anew, as before pretraining.

    Kernels are drawn from ``N(0, initializer_range^2)``, biases are 0, norms have scale 1 and bias 0. Frozen weights
    keep their values, and W0, to which other techniques pull, stays the pretrained one. With 0 layers and the pooler
    kept this is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning. Where single seeds fail: the top layers are the ones that are most
    bent to the task of pretraining; try 1 to 6. Source: Zhang et al. 2021 (arXiv 2006.05987), section 5.
    """

    changes: ClassVar = "start"
    name: Literal["reinit"] = Field(default="reinit", description="fine-tuning method")
    layers: int = Field(default=1, ge=0, description="how many, from the top")
    pooler: bool = Field(default=True, description="also what lies between the last layer and the head")
    initializer_range: float = Field(default=0.02, gt=0, description="standard deviation of the new kernels")

    def change_method(self, method: Method, setup: Setup) -> Method:
        """With the new start.

        Raises:
            AgwmError: the model has fewer layers.
        """
        count = check_layers(self.layers, setup, setting="reinit.layers")
        weights, depths = setup.model.weights, from_the_top(setup)
        pooler = {path for path in weights if self.pooler and weights[path].role != "head" and not depths[path].any()}
        layers = {path for path in weights if ((depths[path] > 0) & (depths[path] <= count)).any()}

        def drawn(key: Key[Array, ""], path: str, weight: Array) -> Array:
            if weights[path].role == "kernel":
                own = jax.random.fold_in(key, _number(path))
                return self.initializer_range * jax.random.normal(own, weight.shape, weight.dtype)
            is_scale = weights[path].role == "norm" and path.endswith("scale")
            return (jnp.ones_like if is_scale else jnp.zeros_like)(weight)

        def init(pretrained: Params, key: Key[Array, ""]) -> Variables:
            variables, own = method.init(pretrained, key), jax.random.fold_in(key, _number("reinit"))
            task = dict(variables[TASK])
            for path in [path for path in task if path in layers or path in pooler]:
                kept = len(task[path]) - count if weights[path].is_stacked else 0
                new = drawn(own, path, task[path][kept:])
                task[path] = jnp.concatenate([task[path][:kept], new]) if kept else new
            return {**variables, TASK: task}

        return method._replace(init=init)


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF
