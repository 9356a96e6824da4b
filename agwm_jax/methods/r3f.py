"""R3F: the outputs must not change under small random noise on the word embeddings."""

from typing import ClassVar, Literal

import jax
from jaxtyping import Array, Float, Key
from pydantic import Field

from agwm_jax.core.types import Batch, Composite, Scalar
from agwm_jax.methods.divergence import divergence, noise_key
from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.technique import Technique
from agwm_jax.models.model import Effective


@METHODS.register("r3f", cost="2", paper="arXiv 2008.03156")
class R3F(Technique):
    """Fine-tuning by ``loss + weight * (KL(p, q) + KL(q, p))``: p of the embeddings e, q of ``e + z``.

    z is new noise on every entry of the word embeddings, uniform in +-eps or normal with standard deviation eps. Both
    passes have the same dropout, that of `vanilla`, so that z is all they differ in. For a regression the squared
    difference of the two scores stands for the divergence. A batch without a key has no noise, and the plain loss.
    Where the model computes in bfloat16 the default eps is below the rounding of e: raise it. weight = 0 is `vanilla`
    bit for bit.

    Cost 2 fb a step; memory of plain fine-tuning with twice the activations. For large models on few examples, instead
    of an adversarial search as in `smart`. Source: Aghajanyan et al. 2020 (arXiv 2008.03156), section 3.
    """

    changes: ClassVar = "objective"
    name: Literal["r3f"] = Field(default="r3f", description="fine-tuning method")
    weight: float = Field(default=1.0, ge=0, description="of the divergence (lambda)")
    eps: float = Field(default=1e-5, gt=0, description="size of the noise")
    noise: Literal["uniform", "normal"] = Field(default="uniform", description="its distribution")

    def change_setup(self, setup: Setup) -> Setup:
        """The objective with the noisy pass."""
        model = setup.model

        def draw(key: Key[Array, ""], like: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
            if self.noise == "normal":
                return self.eps * jax.random.normal(key, like.shape, like.dtype)
            return jax.random.uniform(key, like.shape, like.dtype, -self.eps, self.eps)

        def objective(*, reverse_only: bool = False) -> Composite:
            once = setup.loss(reverse_only=reverse_only)

            def outputs(params: Effective, batch: Batch) -> tuple[Array, Array]:
                key, embedded = batch.get("key"), model.embed(params, batch)
                logits = model.from_embedded(params, embedded, batch, key=key, reverse_only=reverse_only)
                if key is None:
                    return logits, logits
                noisy = embedded + draw(noise_key(key), embedded)
                return logits, model.from_embedded(params, noisy, batch, key=key, reverse_only=reverse_only)

            def criterion(outputs: tuple[Array, Array], batch: Batch) -> Scalar:
                return once.criterion(outputs[0], batch) + self.weight * divergence(*outputs, batch, setup.kind)

            return Composite(outputs, criterion)

        return setup._replace(objective=objective)
