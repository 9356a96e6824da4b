"""Child-Tuning-D: only the weights with the largest Fisher information for the task are trained."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from pydantic import Field

from agwm_jax.core.types import Batch, Params, Scalar
from agwm_jax.data.plan import epoch_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import (
    METHODS,
    Batches,
    Context,
    Hooks,
    Info,
    Method,
    MethodSettings,
    Phase,
    Setup,
    Variables,
)
from agwm_jax.methods.training import TASK, mean_gradient, replace_weights, start_at_pretrained, training_phase

MASK = "mask"
"""The collection of boolean masks of the encoder's weights, by path: True where a weight is trained."""


@METHODS.register("child_tuning_d", cost="fisher: 1; finetune: 1", paper="arXiv 2109.05687")
class ChildTuningD(MethodSettings):
    """Fine-tuning of a sub-network that is chosen once, by the data: ``g <- g * mask``.

    A first pass over the training set, at the pretrained weights and with dropout as in training, takes the mean over
    batches of the squared gradient: the diagonal of the empirical Fisher information. The mask keeps what is at or
    above its (1 - p) quantile over all weights of the encoder's layers; embeddings, pooler and head always train.
    Gradients are masked before the clip and the moments; weight decay acts on all. (The authors' code also clips each
    tensor's gradient before it is squared.) p = 1 is `vanilla` bit for bit.

    Cost 1 fb a step, of the Fisher pass too; memory of plain fine-tuning and a byte a weight. Source: Xu et al. 2021
    (arXiv 2109.05687), section 3.3.
    """

    name: Literal["child_tuning_d"] = Field(default="child_tuning_d", description="fine-tuning method")
    p: float = Field(default=0.3, gt=0, le=1, description="share of the encoder's weights that is trained")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""

        def masked(grads: Variables, context: Context, key: Key[Array, ""]) -> Variables:
            del key
            mask = context.learnt[MASK]
            return {
                TASK: {path: g * mask[path].astype(g.dtype) if path in mask else g for path, g in grads[TASK].items()}
            }

        stages = ((_fisher_phase(setup, self.p),), (training_phase(setup, hooks=(Hooks(gradient=masked),)),))
        return Method(start_at_pretrained(setup), stages, replace_weights)


def _fisher_phase(setup: Setup, p: float) -> Phase:
    """Reads the training set once, trains nothing, leaves the mask."""
    paths = _encoder_paths(setup)
    loss = setup.loss(reverse_only=True)
    rows, rng = np.arange(setup.num_examples), setup.rng("fisher")
    plan = {"train": epoch_plan(rows, batch_size=setup.batch_size, epochs=1, rng=rng)}
    num_steps = len(plan["train"])

    def start(context: Context, key: Key[Array, ""]) -> Params:
        del key
        weights = context.initial[TASK]
        return {
            path: jnp.zeros(weights[path].shape, jnp.promote_types(weights[path].dtype, jnp.float32)) for path in paths
        }

    def step(fisher: Params, context: Context, batches: Batches, key, step) -> tuple[Params, Info]:
        del key, step
        task = context.initial[TASK]

        def of_encoder(encoder: Params, batch: Batch) -> Scalar:
            return loss(replace_weights(context.pretrained, {TASK: {**task, **encoder}}), batch)

        encoder = {path: task[path] for path in paths}
        value, grads = mean_gradient(of_encoder, encoder, batches["train"], parts=setup.accumulate)
        squares = {path: fisher[path] + grads[path].astype(fisher[path].dtype) ** 2 / num_steps for path in paths}
        return squares, {"loss": value}

    def finish(context: Context, fisher: Params) -> Variables:
        return {TASK: context.initial[TASK], MASK: top_share(fisher, p)}

    return Phase("fisher", plan, start, step, finish)


def _encoder_paths(setup: Setup) -> tuple[str, ...]:
    """Trainable weights of the layers: neither embeddings nor what comes after the last layer."""
    depths = {path: weight.depth for path, weight in setup.model.weights.items()}
    after = max(depth or 0 for depth in depths.values())
    between = {path for path, depth in depths.items() if depth is None or 0 < depth < after}
    paths = tuple(path for path in setup.trainable if path in between)
    if not paths:
        raise AgwmError(
            "all weights of the encoder's layers are frozen, so there is nothing to choose from: freeze fewer."
        )
    return paths


def top_share(scores: dict[str, Float[Array, "..."]], p: float) -> dict[str, Bool[Array, "..."]]:
    """Which entries are at or above the (1 - p) quantile of all entries of all leaves together.

    Args:
        scores: 0 or more each, by path.
        p: in (0, 1]; 1 keeps all.

    Where the quantile lies between two entries the upper one is the bound: the mask is that of ``scores >=
    numpy.quantile(all, 1 - p)``. It is found bit by bit, by counting, so that leaves need not be put together or
    sorted, and may be cut over devices.
    """
    size = sum(x.size for x in scores.values())
    keep = size - math.ceil((1 - p) * (size - 1))
    dtype = jnp.result_type(*scores.values())
    width = jnp.finfo(dtype).bits
    bits = jnp.dtype(f"uint{width}")
    if size >= 2**32:
        raise AgwmError(f"child_tuning_d counts up to {2**32} weights; the encoder has {size}: freeze some of them.")
    # Floats of 0 or more are in the order of their bits.
    ordered = {path: jax.lax.bitcast_convert_type(x.astype(dtype), bits) for path, x in scores.items()}

    def try_bit(i, bound):
        higher = bound | (jnp.ones((), bits) << (width - 1 - i).astype(bits))
        count = sum(jnp.sum(x >= higher, dtype=jnp.uint32) for x in ordered.values())
        return jnp.where(count >= keep, higher, bound)

    bound = jax.lax.fori_loop(0, width, try_bit, jnp.zeros((), bits))
    return {path: x >= bound for path, x in ordered.items()}
