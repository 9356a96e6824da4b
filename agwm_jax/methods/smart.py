"""SMART: the outputs must not change under the worst small noise on the word embeddings."""

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.core.types import Batch, Composite, Scalar
from agwm_jax.methods.divergence import divergence, noise_key
from agwm_jax.methods.interface import METHODS, Setup
from agwm_jax.methods.technique import Technique
from agwm_jax.models.model import Effective


@METHODS.register("smart", cost="8/3", paper="arXiv 1911.03437")
class Smart(Technique):
    """Fine-tuning by ``loss + weight * d(f(e), f(e + z))``, d as in `r3f`, at a z that one step of ascent makes larger.

    From ``z0 ~ N(0, eps^2)`` on the word embeddings e, ``z = z0 + step * g / |g|_inf`` where g is the gradient of the
    divergence in z at z0, with its largest entry taken example by example. z is a constant for the weights. All passes
    have the same dropout, that of `vanilla`. The paper also puts z back into ``|z|_inf <= radius``, with a radius of
    1e-5 that leaves little of the step; the authors' code does not, nor is it done here unless a radius is given. (That
    code scales g token by token.) The paper's proximal term is not part of this. A batch without a key has no noise,
    and the plain loss. Where the model computes in bfloat16 the default eps is below the rounding of e, so that no
    ascent is seen: raise it. weight = 0 is `vanilla` bit for bit.

    Cost 8/3 fb a step: two passes, and a third without gradients of the weights; memory of plain fine-tuning with twice
    the activations. For large models on few examples. Source: Jiang et al. 2020 (arXiv 1911.03437), section 3.1 and
    algorithm 1.
    """

    changes: ClassVar = "objective"
    name: Literal["smart"] = Field(default="smart", description="fine-tuning method")
    weight: float = Field(default=1.0, ge=0, description="of the divergence (lambda_s)")
    eps: float = Field(default=1e-5, gt=0, description="standard deviation of the noise that the ascent starts from")
    step: float = Field(default=1e-3, ge=0, description="size of the step of ascent, in the largest entry")
    radius: float | None = Field(default=None, gt=0, description="largest entry of z, null for no bound")

    def change_setup(self, setup: Setup) -> Setup:
        """The objective with the pass at the worst noise."""
        model = setup.model

        def objective(*, reverse_only: bool = False) -> Composite:
            once = setup.loss(reverse_only=reverse_only)

            def outputs(params: Effective, batch: Batch) -> tuple[Array, Array]:
                key, embedded = batch.get("key"), model.embed(params, batch)

                def forward(params: Effective, embedded: Float[Array, "b t d"]) -> Float[Array, "b c"]:
                    return model.from_embedded(params, embedded, batch, key=key, reverse_only=reverse_only)

                logits = forward(params, embedded)
                if key is None:
                    return logits, logits
                constant, e, p = jax.lax.stop_gradient((dict(params), embedded, logits))

                def apart(z: Float[Array, "b t d"]) -> Scalar:
                    return divergence(p, forward(constant, e + z), batch, setup.kind)

                z = self.eps * jax.random.normal(noise_key(key), e.shape, e.dtype)
                z = self._ascend(z, jax.grad(apart)(z))
                return logits, forward(params, embedded + z)

            def criterion(outputs: tuple[Array, Array], batch: Batch) -> Scalar:
                return once.criterion(outputs[0], batch) + self.weight * divergence(*outputs, batch, setup.kind)

            return Composite(outputs, criterion)

        return setup._replace(objective=objective)

    def _ascend(self, z: Float[Array, "b t d"], gradient: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        largest = jnp.max(jnp.abs(gradient), axis=(1, 2), keepdims=True)
        z = z + self.step * gradient / trees.divisor(largest)
        return z if self.radius is None else jnp.clip(z, -self.radius, self.radius)
