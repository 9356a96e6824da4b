"""AdamW with warm-up and decay: its settings, and the optax transformation they give."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import optax
from jax.tree_util import DictKey
from pydantic import Field

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

    def build(self, *, num_steps: int, weights: Weights) -> optax.GradientTransformation:
        """The optimiser for `num_steps` updates; what decays follows from the weights' roles."""
        adamw = optax.adamw(
            schedule(self, num_steps=num_steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=decay_mask(decays(weights)),
        )
        return optax.chain(optax.clip_by_global_norm(self.gradient_clip), adamw) if self.gradient_clip else adamw


def schedule(settings: OptimizerSettings, *, num_steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then the decay that the settings name."""
    peak, warmup = settings.learning_rate, int(settings.warmup_fraction * num_steps)
    decay = {
        "linear": lambda: optax.schedules.linear_schedule(peak, 0.0, num_steps - warmup),
        "cosine": lambda: optax.schedules.cosine_decay_schedule(peak, max(1, num_steps - warmup)),
        "constant": lambda: optax.schedules.constant_schedule(peak),
    }[settings.schedule]()
    return optax.schedules.join_schedules([optax.schedules.linear_schedule(0.0, peak, warmup), decay], [warmup])


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
