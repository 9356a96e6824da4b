"""R-Drop: two passes of a batch with their own dropout must agree."""

from typing import ClassVar, Literal

from jaxtyping import Array
from pydantic import Field

from agwm_jax.core.types import Batch, Composite, Scalar
from agwm_jax.methods.divergence import divergence, noise_key
from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.technique import Technique
from agwm_jax.models.model import Effective


@METHODS.register("r_drop", cost="2", paper="arXiv 2106.14448")
class RDrop(Technique):
    """Fine-tuning by two dropout passes: the mean of their losses ``+ a/2 (KL(p1, p2) + KL(p2, p1))``.

    The first pass has the dropout of `vanilla`, the second one of its own. For a regression the squared difference of
    the two scores stands for the divergence. (The authors write the sum of both losses; the mean keeps the scale of the
    learning rate.) Without dropout in the model, and with a = 0, this is `vanilla` bit for bit.

    Cost 2 fb a step; memory of plain fine-tuning with twice the activations. Where dropout is what keeps the model
    from overfitting, and time is there. Source: Liang et al. 2021 (arXiv 2106.14448), equation 4.
    """

    changes: ClassVar = "objective"
    name: Literal["r_drop"] = Field(default="r_drop", description="fine-tuning method")
    a: float = Field(default=1.0, ge=0, description="weight of the divergence")

    def change_setup(self, setup: Setup) -> Setup:
        """The objective of two passes."""

        def objective(*, reverse_only: bool = False) -> Composite:
            once = setup.loss(reverse_only=reverse_only)

            def outputs(params: Effective, batch: Batch) -> tuple[Array, Array]:
                return once.outputs(params, batch), once.outputs(params, _second(batch))

            def criterion(outputs: tuple[Array, Array], batch: Batch) -> Scalar:
                losses = [once.criterion(logits, batch) for logits in outputs]
                return (losses[0] + losses[1]) / 2 + self.a / 2 * divergence(*outputs, batch, setup.kind)

            return Composite(outputs, criterion)

        return setup._replace(objective=objective)


def _second(batch: Batch) -> Batch:
    """The batch with a dropout key of its own."""
    return {**batch, "key": noise_key(batch["key"])} if "key" in batch else batch
