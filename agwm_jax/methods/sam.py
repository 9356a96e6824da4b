"""SAM: the gradient is taken uphill, at the worst weights nearby."""

from typing import ClassVar, Literal

from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.core.types import Scalar
from agwm_jax.methods.interface import METHODS, Hooks, Setup, ValueAndGrad, Variables
from agwm_jax.methods.technique import Technique


@METHODS.register("sam", cost="2", paper="arXiv 2010.01412")
class SAM(Technique):
    """Fine-tuning by the gradient at ``W + rho * g / |g|``, g the gradient at W: sharpness-aware minimisation.

    |g| is the norm over all trained variables. Both gradients have the same batch, dropout and noise; the loss that is
    recorded is that at W. Where g is 0 the second gradient is that at W too. rho = 0 is `vanilla` bit for bit.

    Cost 2 fb a step; memory of plain fine-tuning and once more the trained weights. Where a flat minimum is hoped for
    and time is there. Source: Foret et al. 2021 (arXiv 2010.01412), equation 3 and algorithm 1.
    """

    changes: ClassVar = "gradient"
    name: Literal["sam"] = Field(default="sam", description="fine-tuning method")
    rho: float = Field(default=0.05, ge=0, description="distance from the weights at which the gradient is taken")

    def hooks(self, setup: Setup, *, num_steps: int) -> Hooks:
        """The second gradient in place of the first."""
        del setup, num_steps

        def differentiate(value_and_grad: ValueAndGrad, trained: Variables) -> tuple[Scalar, Variables]:
            value, grads = value_and_grad(trained)
            uphill = trees.add_scale(trained, self.rho / trees.divisor(trees.norm(grads)), grads)
            return value, value_and_grad(uphill)[1]

        return Hooks(differentiate=differentiate)
