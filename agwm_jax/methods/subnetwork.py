"""Sub-networks: scores of the encoder's weights by their gradients, masks of the best, training under a mask."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from agwm_jax.core.types import Batch, Params, Scalar
from agwm_jax.data.plan import epoch_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Batches, Context, Hooks, Info, Phase, Setup, Variables
from agwm_jax.methods.training import TASK, mean_gradient, replace_weights

MASK = "mask"
"""The collection of boolean masks, by path: True where a weight is trained."""

Score = Callable[[Array, Array], Array]
"""``score(weight, gradient) -> scores`` of one batch, 0 or more."""
Mask = dict[str, Bool[Array, "..."]]


def masked(grads: Variables, context: Context, key: Key[Array, ""]) -> Variables:
    """`Hooks.gradient`: no gradient where `MASK` is False; weights without a mask keep theirs."""
    del key
    mask = context.learnt[MASK]
    return {
        **grads,
        TASK: {path: g * mask[path].astype(g.dtype) if path in mask else g for path, g in grads[TASK].items()},
    }


UNDER_THE_MASK = Hooks(gradient=masked)


def score_phase(setup: Setup, *, name: str, score: Score, choose: Callable[[Params], Mask]) -> Phase:
    """Reads the training set once, at the start and with dropout; trains nothing, leaves the mask.

    Args:
        setup: of the method.
        name: of the phase, and of the order in which it reads.
        score: of a batch; the scores are the mean over batches.
        choose: ``choose(scores) -> mask``, both by path of `encoder_paths`.
    """
    paths = encoder_paths(setup)
    loss = setup.loss(reverse_only=True)
    rows, rng = np.arange(setup.num_examples), setup.rng(name)
    plan = {"train": epoch_plan(rows, batch_size=setup.batch_size, epochs=1, rng=rng)}
    num_steps = len(plan["train"])

    def start(context: Context, key: Key[Array, ""]) -> Params:
        del key
        weights = context.initial[TASK]
        return {
            path: jnp.zeros(weights[path].shape, jnp.promote_types(weights[path].dtype, jnp.float32)) for path in paths
        }

    def step(scores: Params, context: Context, batches: Batches, key, step) -> tuple[Params, Info]:
        del key, step
        task = context.initial[TASK]

        def of_encoder(encoder: Params, batch: Batch) -> Scalar:
            return loss(replace_weights(context.pretrained, {TASK: {**task, **encoder}}), batch)

        encoder = {path: task[path] for path in paths}
        value, grads = mean_gradient(of_encoder, encoder, batches["train"], parts=setup.accumulate)
        found = {path: score(encoder[path], grads[path].astype(scores[path].dtype)) for path in paths}
        return {path: scores[path] + found[path] / num_steps for path in paths}, {"loss": value}

    def finish(context: Context, scores: Params) -> Variables:
        return {TASK: context.initial[TASK], MASK: choose(scores)}

    return Phase(name, plan, start, step, finish)


def encoder_paths(setup: Setup) -> tuple[str, ...]:
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


def top_share(scores: Mapping[str, Float[Array, "..."]], p: float) -> Mask:
    """Which entries are at or above the (1 - p) quantile of all entries of all leaves together.

    Args:
        scores: 0 or more each, by path.
        p: in (0, 1]; 1 keeps all.

    Where the quantile lies between two entries the upper one is the bound: the mask is that of ``scores >=
    numpy.quantile(all, 1 - p)``.
    """
    return largest(scores, _count(scores, p))


def lowest_share(scores: Mapping[str, Float[Array, "..."]], p: float) -> Mask:
    """Which entries are at or below the p quantile of all; as many as `top_share` keeps."""
    return largest(scores, _count(scores, p), reverse=True)


def _count(scores: Mapping[str, Array], p: float) -> int:
    size = sum(x.size for x in scores.values())
    return size - math.ceil((1 - p) * (size - 1))


def largest(scores: Mapping[str, Float[Array, "..."]], keep: int, *, reverse: bool = False) -> Mask:
    """The `keep` largest entries of all leaves together (in reverse: the smallest), and what equals the last of them.

    The bound is found bit by bit, by counting, so that leaves need not be put together or sorted, and may be cut over
    devices.
    """
    size = sum(x.size for x in scores.values())
    dtype = jnp.result_type(*scores.values())
    width = jnp.finfo(dtype).bits
    bits = jnp.dtype(f"uint{width}")
    if size >= 2**32:
        raise AgwmError(f"a mask chooses among up to {2**32} weights, and here are {size}: freeze some of them.")
    # Floats of 0 or more are in the order of their bits.
    ordered = {path: jax.lax.bitcast_convert_type(x.astype(dtype), bits) for path, x in scores.items()}
    if reverse:
        ordered = {path: ~x for path, x in ordered.items()}

    def try_bit(i, bound):
        higher = bound | (jnp.ones((), bits) << (width - 1 - i).astype(bits))
        count = sum(jnp.sum(x >= higher, dtype=jnp.uint32) for x in ordered.values())
        return jnp.where(count >= keep, higher, bound)

    bound = jax.lax.fori_loop(0, width, try_bit, jnp.zeros((), bits))
    return {path: x >= bound for path, x in ordered.items()}
