"""AdamW with warm-up and decay: its settings, and the optax transformation they give."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey
from jaxtyping import Array, Float
from pydantic import Field

from agwm_jax.core import trees
from agwm_jax.core.estimators.finite_difference import rms_scale
from agwm_jax.core.types import Vector
from agwm_jax.models.weights import Weights, decays
from agwm_jax.section import Section


class OptimizerSettings(Section):
    """AdamW with warm-up, a schedule, and a clip of the gradient's global norm."""

    learning_rate: float = Field(default=2e-5, gt=0, description="peak learning rate")
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay (not on biases and layer norms)"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(default="linear", description="decay after warm-up, to 0")
    warmup_fraction: float = Field(default=0.1, ge=0, le=1, description="share of all steps that warms up from 0")
    gradient_clip: float | None = Field(
        default=1.0, gt=0, description="largest global norm of the gradient, null for no clip"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's first moment")
    b2: float = Field(default=0.999, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(default=1e-8, ge=1e-15, description="added to Adam's denominator")
    variant: Literal["adamw", "transformers_4_24"] = Field(
        default="adamw",
        description="AdamW as in its paper, or as in transformers 4.24: eps not bias-corrected, decay after the step",
    )
    warmup_rounding: Literal["down", "up", "none"] = Field(
        default="down",
        description="of warmup_fraction times all steps; up as in transformers' Trainer, none leaves a fraction",
    )
    clip_eps: float = Field(
        default=0.0,
        ge=0,
        description="added to the norm that a clip divides by; PyTorch has 1e-6, which clips a bit more",
    )

    def build(self, *, num_steps: int, weights: Weights) -> optax.GradientTransformation:
        """The optimiser for `num_steps` updates; what decays follows from the weights' roles."""
        make = optax.adamw if self.variant == "adamw" else adamw_of_transformers

        def at(peak: float | Array) -> optax.GradientTransformation:
            adamw = make(
                schedule(self, num_steps=num_steps, peak=peak),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=decay_mask(decays(weights)),
            )
            return optax.chain(clip(self.gradient_clip, eps=self.clip_eps), adamw) if self.gradient_clip else adamw

        return with_rate_in_state(at, self.learning_rate)

    def rms_scale(self, weights: Weights) -> Callable[[Any], Vector]:
        """What ``finite_difference(precondition="rms")`` reads of this optimiser's state: a number a layer's tensor."""

        def stacked(path) -> bool:
            known = [entry.key for entry in path if isinstance(entry, DictKey) and entry.key in weights]
            return bool(known) and weights[known[-1]].is_stacked

        return rms_scale(b2=self.b2, eps=self.eps, stacked=stacked)


class RateState(NamedTuple):
    """The peak learning rate, and the state of the optimiser at it."""

    peak: Float[Array, ""]
    inner: optax.OptState


def with_rate_in_state(
    at: Callable[[float | Array], optax.GradientTransformation], peak: float
) -> optax.GradientTransformation:
    """``at(peak)`` whose rate is read from its state, so that runs at several rates share one compiled program.

    As a constant of the program it would make every rate of a grid compile anew, which takes most of the time of a
    small run; so only the start of a phase, which is cheap to compile, holds it.
    """

    def init(params) -> RateState:
        held = jnp.asarray(peak, float)
        return RateState(held, at(held).init(params))

    def update(grads, state, params=None):
        updates, inner = at(state.peak).update(grads, state.inner, params)
        return updates, RateState(state.peak, inner)

    return optax.GradientTransformation(init, update)


def clipped(grads: Vector, norm: jax.Array, max_norm: float, *, eps: float) -> Vector:
    """Gradients times ``min(1, max_norm / (norm + eps))``, whatever else is in that norm."""
    return trees.scale(jnp.minimum(1, max_norm / trees.divisor(norm + eps)), grads)


def clip(max_norm: float, *, eps: float = 0.0) -> optax.GradientTransformation:
    """Clip of the gradient's global norm: optax's, or with `eps` that of PyTorch."""
    if eps == 0:
        return optax.clip_by_global_norm(max_norm)
    return optax.stateless(lambda grads, params: clipped(grads, trees.norm(grads), max_norm, eps=eps))


def adamw_of_transformers(
    learning_rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    mask: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """AdamW as `transformers` 4.24 has it (``correct_bias=True``), not as optax and PyTorch have it, in two ways.

    ``w <- w - lr c m / (sqrt(nu) + eps)`` with ``c = sqrt(1 - b2^t) / (1 - b1^t)``: eps stands beside the root before
    its bias is corrected, so in the first steps it counts up to ``1 / sqrt(1 - b2)`` = 32 times as much. Then
    ``w <- w - lr weight_decay w``, of the weight after that step. Its state holds what that of `optax.adamw` does.
    """

    def init(params) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), zeros, optax.tree.zeros_like(params))

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda n, g: b2 * n + (1 - b2) * g**2, state.nu, grads)

        def direction(m, n):
            t = count.astype(m.dtype)
            return jnp.sqrt(1 - b2**t) / (1 - b1**t) * m / (jnp.sqrt(n) + eps)

        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    def decay(updates, state, params):
        share = learning_rate(state.count) * weight_decay
        after = jax.tree.map(
            lambda u, w, decays: (u - share * (w + u)).astype(u.dtype) if decays else u, updates, params, mask(params)
        )
        return after, optax.ScaleByScheduleState(state.count + 1)

    return optax.chain(
        optax.GradientTransformation(init, update),
        optax.scale_by_learning_rate(learning_rate),
        optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), decay),
    )


def schedule(settings: OptimizerSettings, *, num_steps: int, peak: float | Array | None = None) -> optax.Schedule:
    """The learning rate by step: a linear warm-up to the peak, then the decay that the settings name.

    Args:
        settings: of the optimiser.
        num_steps: of the phase.
        peak: in place of `settings.learning_rate`; may be an array.
    """
    peak = settings.learning_rate if peak is None else peak
    share = settings.warmup_fraction * num_steps
    if settings.warmup_rounding == "none":
        return _with_a_part_of_a_step(settings, share, num_steps, peak)
    warmup = int(share) if settings.warmup_rounding == "down" else math.ceil(share)
    decay = {
        "linear": lambda: optax.schedules.linear_schedule(peak, 0.0, num_steps - warmup),
        "cosine": lambda: optax.schedules.cosine_decay_schedule(peak, max(1, num_steps - warmup)),
        "constant": lambda: optax.schedules.constant_schedule(peak),
    }[settings.schedule]()
    joined = optax.schedules.join_schedules([optax.schedules.linear_schedule(0.0, peak, warmup), decay], [warmup])
    # A quotient of int32 is float32 even where all else is float64.
    return lambda count: joined(jnp.asarray(count, float))


def _with_a_part_of_a_step(
    settings: OptimizerSettings, warmup: float, num_steps: int, peak: float | Array
) -> optax.Schedule:
    """The same where warm-up ends within a step; at whole numbers it is the other one to rounding."""

    def rate(count):
        count = jnp.asarray(count, float)
        done = jnp.clip((count - warmup) / max(1.0, num_steps - warmup), 0, 1)
        decay = {"linear": 1 - done, "cosine": (1 + jnp.cos(jnp.pi * done)) / 2, "constant": jnp.ones_like(done)}
        return peak * jnp.where(count < warmup, count / max(1.0, warmup), decay[settings.schedule])

    return rate


def by_collection(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """An optimiser of its own, clip included, for each collection of ``{name: {path: weight}}``."""
    return optax.partition(dict(optimizers), {name: name for name in optimizers})


def decay_mask(decaying: Mapping[str, bool]) -> Callable[[Any], Any]:
    """The mask of weight decay for any pytree: a leaf decays as the weight whose path is the last key on its way."""

    def mask(tree):
        def decides(path, _) -> bool:
            keys = [entry.key for entry in path if isinstance(entry, DictKey) and entry.key in decaying]
            return bool(keys) and decaying[keys[-1]]

        return jax.tree_util.tree_map_with_path(decides, tree)

    return mask
