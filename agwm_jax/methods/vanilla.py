"""Plain fine-tuning."""

from typing import Literal

from pydantic import Field

from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Setup
from agwm_jax.methods.training import replace_weights, start_at_pretrained, training_phase


@METHODS.register("vanilla", cost="1", paper="arXiv 1810.04805")
class Vanilla(MethodSettings):
    """Plain fine-tuning: all weights are trained by bias-corrected AdamW, nothing is mixed.

    Cost 1 fb a step; memory of the weights, their gradient and two moments. What everything else is compared with.
    Source: Devlin et al. 2018 (arXiv 1810.04805), with the bias correction that Mosbach et al. 2020 (arXiv 2006.04884)
    and Zhang et al. 2020 (arXiv 2006.05987) found to matter on few examples.
    """

    name: Literal["vanilla"] = Field(default="vanilla", description="fine-tuning method")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        return Method(start_at_pretrained(setup), ((training_phase(setup),),), replace_weights)
