"""The simplest gate: one constant number for all weights."""

from typing import Annotated, Literal

from jaxtyping import Array, Key
from pydantic import Field, Strict

from agwm_jax.core.types import Params
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.training import TASK, in_layers, replace_weights, start_at_pretrained, training_phase
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import of_role


@METHODS.register("fixed_gate", cost="1", paper="control for arXiv 2403.12918")
class FixedGate(MethodSettings):
    """Fine-tuning through ``A * W + (1 - A) * W0`` where A is one constant number.

    Unlike a ratio that is chosen after training (a = A with the W of `vanilla`), W is trained through the mixture. By
    default A acts on every weight with a pretrained value, so that with A = 0 and a frozen head the model stays the
    pretrained one bit for bit; the head is W. A = 1 is `vanilla` bit for bit. Adam undoes A's factor in the gradient,
    so the mixture moves by about A times the step of `vanilla`; weight decay acts on W.

    Cost 1 fb a step; memory of plain fine-tuning and of W0. To tell what a learnt gate adds to any gate at all. Source:
    control for arXiv 2403.12918.
    """

    name: Literal["fixed_gate"] = Field(default="fixed_gate", description="fine-tuning method")
    gate: float = Field(default=0.5, ge=0, le=1, description="A, the share of the task weights W")
    roles: Annotated[tuple[Literal["kernel", "bias", "norm", "embedding"], ...], Strict(False)] = Field(
        default=("kernel", "bias", "norm", "embedding"), description="which weights are mixed"
    )

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        weights = setup.model.weights
        of_kernels = set(of_role(weights, "kernel"))
        mixed = [path for path in of_role(weights, *self.roles) if path not in setup.frozen]

        def mixture(pretrained: Array, task: Array) -> Array:
            return self.gate * task + (1 - self.gate) * pretrained

        def merge(pretrained: Params, variables: Variables) -> Params:
            found = {path: mixture(pretrained[path], variables[TASK][path]) for path in mixed}
            return {**replace_weights(pretrained, variables), **found}

        def forward(pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Effective:
            del key
            kernels = {path: (pretrained[path], variables[TASK][path]) for path in mixed if path in of_kernels}
            return {**merge(pretrained, variables), **in_layers(weights, mixture, kernels)}  # within the model's layers

        return Method(start_at_pretrained(setup), ((training_phase(setup, forward=forward),),), merge)
