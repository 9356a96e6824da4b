"""LoRA: low-rank changes of some kernels are trained, and the head; all else stays pretrained."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.core.types import LowRank, Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.training import TASK, finetune_plan, in_layers, replace_weights, training_phase
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import matching, of_role
from agwm_jax.section import Pattern

LORA = "lora"
"""The collection of factors, by the path of the kernel that they change."""


def low_rank_start(key: Key[Array, ""], kernel: Array, r: int) -> LowRank:
    """``left [*l, d_in, r]`` uniform in +-1/sqrt(d_in), ``right [*l, r, d_out]`` zero: their product is 0."""
    *stack, d_in, d_out = kernel.shape
    bound = d_in**-0.5
    return LowRank(
        left=jax.random.uniform(key, (*stack, d_in, r), kernel.dtype, -bound, bound),
        right=jnp.zeros((*stack, r, d_out), kernel.dtype),
    )


@METHODS.register("lora", cost="2/3 to 1", paper="arXiv 2106.09685")
class Lora(MethodSettings):
    """Low-rank adaptation: the forward pass takes ``W0 + (a/r) left @ right`` for the chosen kernels.

    `right` starts at 0, so training starts at the pretrained model; `left` starts uniform in +-1/sqrt(d_in), as in the
    authors' code. The factors and the head are trained (biases too, if asked for), with the optimiser of `finetune` but
    a learning rate of its own. What is evaluated and exported is the sum, an ordinary model.

    Cost 2/3 fb a step and the gradients of the changed kernels, 1 fb if those are all; memory of the weights, with
    gradients and moments of what is trained only. Source: Hu et al. 2021 (arXiv 2106.09685), section 4.
    """

    open_to: ClassVar = frozenset({"objective", "gradient", "end"})
    name: Literal["lora"] = Field(default="lora", description="fine-tuning method")
    r: int = Field(default=8, ge=1, description="rank of the change")
    alpha: float = Field(default=16.0, gt=0, description="a; the product of the factors is scaled by a/r")
    targets: Pattern | None = Field(
        default=r"(.*\.)?(query|value)\.kernel",
        description="regular expression for the paths of the changed kernels (whole path); null: all kernels",
    )
    biases: bool = Field(default=False, description="train all biases beside the head")
    learning_rate: float = Field(default=2e-4, gt=0, description="peak learning rate, in place of finetune.optimizer's")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        weights, trainable = setup.model.weights, set(setup.trainable)
        targets = self._targets(setup)
        whole = [path for path in of_role(weights, "head", *(("bias",) if self.biases else ())) if path in trainable]

        def init(pretrained: Params, key: Key[Array, ""]) -> Variables:
            keys = zip(targets, jax.random.split(key, len(targets)), strict=True)
            factors = {path: low_rank_start(path_key, pretrained[path], self.r) for path, path_key in keys}
            return {TASK: {path: pretrained[path] for path in whole}, LORA: factors}

        def changed(kernel: Array, factors: LowRank) -> Array:
            product = jnp.matmul(factors.left, factors.right, precision=jax.lax.Precision.HIGHEST)
            return kernel + self.alpha / self.r * product

        def merge(pretrained: Params, variables: Variables) -> Params:
            kernels = {path: changed(pretrained[path], factors) for path, factors in variables[LORA].items()}
            return {**replace_weights(pretrained, variables), **kernels}

        def forward(pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Effective:
            del key
            operands = {path: (pretrained[path], factors) for path, factors in variables[LORA].items()}
            return {**replace_weights(pretrained, variables), **in_layers(weights, changed, operands)}

        plan = finetune_plan(setup)
        optimizer = setup.finetune.optimizer.model_copy(update={"learning_rate": self.learning_rate})
        phase = training_phase(
            setup,
            plan=plan,
            tx=setup.optimizer(optimizer, num_steps=len(plan["train"])),
            trains=(TASK, LORA),
            forward=forward,
        )
        return Method(init, ((phase,),), merge)

    def _targets(self, setup: Setup) -> tuple[str, ...]:
        weights = setup.model.weights
        if self.targets is None:
            found = of_role(weights, "kernel")
        else:
            found = matching(weights, self.targets, setting="method.targets", roles=("kernel",))
        allowed = tuple(path for path in found if path not in setup.frozen)
        if not allowed:
            raise AgwmError(f"method.targets {self.targets!r} matches frozen weights only: freeze fewer, or widen it.")
        return allowed
