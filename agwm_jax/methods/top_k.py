"""Only the top layers are trained, and the head."""

from typing import Annotated, ClassVar, Literal

import numpy as np
import optax
from pydantic import Field

from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.layers import check_layers, count_layers, from_the_top, scale_by_layer
from agwm_jax.methods.technique import Technique


@METHODS.register("top_k", cost="1/3 to 1", paper="arXiv 1911.03090")
class TopK(Technique):
    """Fine-tuning of the top k layers, the pooler and the head; all below keeps its values.

    Weights that have no part among those are frozen. Of a weight that is stacked over layers the gradients of the lower
    ones are dropped before the clip and the moments, and their updates after the optimiser, so that no weight decay
    moves them. With all layers and the embeddings this is `vanilla` bit for bit.

    Cost 1 fb a step, since the layers' gradients are computed together, and 1/3 where k is 0; memory of plain
    fine-tuning without the embeddings' gradient and moments. Where the task is near to pretraining, or examples are
    few. Source: Lee, Tang and Lin 2019 (arXiv 1911.03090).
    """

    changes: ClassVar = "gradient"
    name: Literal["top_k"] = Field(default="top_k", description="fine-tuning method")
    k: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        default=3, description="layers that are trained, from the top"
    )
    embeddings: bool = Field(default=False, description="train the embeddings too, which lie below all layers")

    def change_setup(self, setup: Setup) -> Setup:
        """With more frozen weights.

        Raises:
            AgwmError: the model has fewer layers, or embeddings are to be trained below frozen ones.
        """
        trained = self._trained(setup)
        frozen = [path for path in setup.trainable if not trained[path].any()]
        return setup._replace(frozen=(*setup.frozen, *frozen))

    def change_optimizer(self, tx: optax.GradientTransformation, setup: Setup) -> optax.GradientTransformation:
        """Without gradients and updates of the lower layers."""
        only_trained = scale_by_layer(self._trained(setup), setup)
        return optax.chain(only_trained, tx, only_trained)

    def _trained(self, setup: Setup) -> dict[str, np.ndarray]:
        """By path, of a stacked weight by layer."""
        layers = count_layers(setup)
        k = layers if self.k == "all" else check_layers(self.k, setup, setting="top_k.k")
        if self.embeddings and k < layers:
            raise AgwmError(
                f"top_k.embeddings: they are to be trained below {layers - k} layers that are not; expected false, or "
                "k: all."
            )
        return {path: np.asarray(depth <= k + self.embeddings) for path, depth in from_the_top(setup).items()}
