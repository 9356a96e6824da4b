"""Layer-wise learning-rate decay: the nearer a layer is to the input, the smaller its steps."""

from typing import ClassVar, Literal

import optax
from pydantic import Field

from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.layers import from_the_top, scale_by_layer
from agwm_jax.methods.technique import Technique


@METHODS.register("llrd", cost="1", paper="arXiv 1801.06146, 2006.05987")
class Llrd(Technique):
    """Plain fine-tuning whose learning rate falls from the top to the bottom: ``lr * decay^(depth from the top)``.

    The head and the pooler have the whole rate, the last layer that times `decay`, the embeddings the smallest one.
    Weight decay is scaled with it, as AdamW's is by the rate. decay = 1 is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning. For long training on few examples: the lower layers are general, and
    stay so. Source: Howard and Ruder 2018 (arXiv 1801.06146); for BERT Zhang et al. 2020 (arXiv 2006.05987).
    """

    changes: ClassVar = "gradient"
    name: Literal["llrd"] = Field(default="llrd", description="fine-tuning method")
    decay: float = Field(default=0.95, gt=0, le=1, description="factor of the learning rate from a layer to that below")

    def change_optimizer(self, tx: optax.GradientTransformation, setup: Setup) -> optax.GradientTransformation:
        """Updates times the factor of their layer."""
        depths = from_the_top(setup)
        return optax.chain(tx, scale_by_layer({path: self.decay**depth for path, depth in depths.items()}, setup))
