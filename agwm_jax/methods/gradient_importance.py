"""Sub-networks by other measures than Fisher information, and two controls that choose badly."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field

from agwm_jax.core.types import Params
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.subnetwork import (
    MASK,
    UNDER_THE_MASK,
    Mask,
    encoder_paths,
    lowest_share,
    score_phase,
    top_share,
)
from agwm_jax.methods.training import TASK, replace_weights, task_weights, training_phase

_SCORES: dict[str, Callable[[Array, Array], Array]] = {
    "taylor": lambda weight, gradient: jnp.abs(weight * gradient),
    "magnitude": lambda weight, gradient: jnp.abs(gradient),
}


@METHODS.register("gradient_importance", cost="1", paper="arXiv 1810.02340, 1611.06440")
class GradientImportance(MethodSettings):
    """Fine-tuning of the share p of the encoder's weights with the largest ``|w g|``, as `child_tuning_d` does by g^2.

    One pass over the training set, at the pretrained weights and with dropout, takes the mean over batches of the
    score: ``|w g|`` (taylor), to first order how much the loss changes if w becomes 0, or ``|g|`` (magnitude).
    Embeddings, pooler and head always train; gradients are masked before the clip and the moments. Two controls say
    what the choice is worth: the share with the lowest scores, and a random one, which needs no pass. p = 1 is
    `vanilla` bit for bit, whatever is kept.

    Cost 1 fb a step, of the pass too; memory of plain fine-tuning and a byte a weight. To tell whether a chosen
    sub-network is better than any sub-network. Source: Lee et al. 2019 (SNIP, arXiv 1810.02340), equation 5, and
    Molchanov et al. 2017 (arXiv 1611.06440), section 2.2, both of which prune by it.
    """

    name: Literal["gradient_importance"] = Field(default="gradient_importance", description="fine-tuning method")
    p: float = Field(default=0.3, gt=0, le=1, description="share of the encoder's weights that is trained")
    score: Literal["taylor", "magnitude"] = Field(default="taylor", description="|w g|, or |g|")
    keep: Literal["highest", "lowest", "random"] = Field(
        default="highest", description="which scores are trained; random: weights drawn without a look at the data"
    )

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        finetune = training_phase(setup, hooks=(UNDER_THE_MASK,))
        paths = encoder_paths(setup)

        def init(pretrained: Params, key: Key[Array, ""]) -> Variables:
            drawn = {MASK: random_mask(key, pretrained, paths, self.p)} if self.keep == "random" else {}
            return {TASK: task_weights(setup, pretrained), **drawn}

        if self.keep == "random":
            return Method(init, ((finetune,),), replace_weights)
        choose = partial({"highest": top_share, "lowest": lowest_share}[self.keep], p=self.p)
        scores = score_phase(setup, name="scores", score=_SCORES[self.score], choose=choose)
        return Method(init, ((scores,), (finetune,)), replace_weights)


def random_mask(key: Key[Array, ""], weights: Params, paths: tuple[str, ...], p: float) -> Mask:
    """A share p of all entries, each as likely as any other."""
    keys = zip(paths, jax.random.split(key, len(paths)), strict=True)
    return top_share({path: jax.random.uniform(own, weights[path].shape) for path, own in keys}, p)
