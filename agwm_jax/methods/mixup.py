"""What the methods that mix share: which weights are mixed, how the gate starts, and the mixture itself."""

from collections.abc import Callable
from typing import Annotated, Literal

from jaxtyping import Array, Key
from pydantic import Field, model_validator

from agwm_jax.core.mixup import init_alpha, mix
from agwm_jax.core.partition import Partition, partition
from agwm_jax.core.types import Alpha, LowRank, Params
from agwm_jax.methods.interface import Context, Setup, Variables
from agwm_jax.methods.training import PRETRAINED, TASK, in_layers, replace_weights
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import matching, of_role
from agwm_jax.section import Pattern, Section, refuse

ALPHA = "alpha"
"""The collection of gates, by path."""


class Mixup(Section):
    """Which weights are mixed, and how: ``W_eff = A * W + (1 - A) * W0``."""

    mixed: Pattern | None = Field(
        default=None,
        description="regular expression for the paths of the mixed weights (whole path); null: all kernels",
    )
    rank: Annotated[int, Field(ge=1)] | Literal["full"] = Field(
        default=1, description="rank of alpha's factors; full: alpha is the matrix A itself"
    )
    noise: float = Field(default=0.005, ge=0, description="standard deviation of alpha's start around 1")
    complement: Literal["convex", "factored"] = Field(
        default="convex",
        description="weight of the pretrained side: 1 - A, or (1-left)@(1-right) as in the authors' code",
    )

    @model_validator(mode="after")
    def _factored_is_rank_1(self):
        clash = self.complement == "factored" and self.rank != 1
        refuse((clash, f"rank: got {self.rank}; allowed: 1, the only rank that complement factored is defined for"))
        return self

    def paths(self, setup: Setup) -> tuple[str, ...]:
        """Of the mixed weights: kernels, as the weights' roles say, or those of `mixed`."""
        weights = setup.model.weights
        if self.mixed is None:
            return tuple(path for path in of_role(weights, "kernel") if path not in setup.frozen)
        return matching(weights, self.mixed, setting="method.mixup.mixed", roles=("kernel",))


class Mixture:
    """The mixture of one method for one model.

    Args:
        settings: which weights, and how.
        setup: of the method.
    """

    def __init__(self, settings: Mixup, setup: Setup):
        """Raises AgwmError where `settings.mixed` does not fit the model."""
        self.settings, self.mixed, self._frozen = settings, settings.paths(setup), setup.frozen
        self._weights = setup.model.weights

        def mixture(pretrained: Array, task: Array, gate: LowRank | Array) -> Array:
            parts = partition({"kernel": pretrained}, mixed=("kernel",))
            return mix(parts, {"kernel": task}, {"kernel": gate}, complement=settings.complement)["kernel"]

        self._mixture = mixture

    def partition(self, pretrained: Params) -> Partition:
        """Frozen, task and mixed weights."""
        return partition(pretrained, mixed=self.mixed, frozen=self._frozen or None)

    def init_alpha(self, key: Key[Array, ""], pretrained: Params) -> Alpha:
        """Gates near 1."""
        return init_alpha(key, self.partition(pretrained), rank=self.settings.rank, noise=self.settings.noise)

    def forward(self, pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Effective:
        """The same mixture for a training step, layer by layer within the model."""
        del key
        task, alpha = variables[TASK], variables[ALPHA]
        operands = {path: (pretrained[path], task[path], alpha[path]) for path in self.mixed}
        return {**replace_weights(pretrained, variables), **in_layers(self._weights, self._mixture, operands)}

    def merge(self, pretrained: Params, variables: Variables) -> Params:
        """`Method.merge`: the mixed weights."""
        parts = self.partition(pretrained)
        return mix(parts, variables[TASK], variables[ALPHA], complement=self.settings.complement)


ClipOver = Literal["trained", "gate", "all"]
"""Whose gradients count in the norm of a clip, though only the trained weights are updated. In PyTorch a clip over
``model.parameters()`` takes all that have a gradient: the authors' finetune stage has alpha's and W0's in it."""


def clip_with(over: ClipOver, mixed: tuple[str, ...]) -> Callable[[Context], Variables] | None:
    """For `training_phase`: the collections beside the trained ones."""
    if over == "trained":
        return None
    if over == "gate":
        return lambda context: {ALPHA: context.learnt[ALPHA]}
    return lambda context: {
        ALPHA: context.learnt[ALPHA],
        PRETRAINED: {path: context.pretrained[path] for path in mixed},
    }
