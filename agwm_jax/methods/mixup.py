"""What the methods that mix share: which weights are mixed, how the gate starts, and the mixture itself."""

from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key
from pydantic import Field, model_validator

from agwm_jax.core.gates import Parametrisation, bound_alpha, gate_shape, share_gates, spread_gate
from agwm_jax.core.mixup import alpha_statistics, init_alpha, mix, mixup_problem, project_alpha
from agwm_jax.core.partition import Partition, partition
from agwm_jax.core.types import Alpha, LossFn, LowRank, Params, Problem, Scalar
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Context, Setup, Variables
from agwm_jax.methods.training import PRETRAINED, TASK, in_layers, replace_weights
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import Weight, Weights, matching, of_role
from agwm_jax.section import Pattern, Section, refuse

ALPHA = "alpha"
"""The collection of gates, by path."""

Gate = Literal["low_rank", "full", "row", "column", "head", "kernel", "layer", "one"]
"""Forms of a kernel's own gate (see `gate_shape`; `head`: of those that neither make nor read heads, one number a
kernel), and those that kernels share: all of a layer (what comes after the layers has its own), or all there are."""


class Mixup(Section):
    """Which weights are mixed, and how: ``W_eff = A * W + (1 - A) * W0``."""

    mixed: Pattern | None = Field(
        default=None,
        description="regular expression for the paths of the mixed weights (whole path); null: all kernels",
    )
    gate: Gate = Field(
        default="low_rank",
        description="what A has a number for: low_rank (every entry, by a product of factors), full (every entry), "
        "row, column, head, kernel, layer, or one in all",
    )
    rank: int = Field(default=1, ge=1, description="rank of the factors of gate low_rank")
    start: float = Field(default=1.0, ge=0, le=1, description="where A starts; 1 is plain fine-tuning")
    noise: float = Field(
        default=0.005, ge=0, description="standard deviation of alpha's start (its factors', or before the sigmoid)"
    )
    parametrisation: Parametrisation = Field(
        default="projection", description="what keeps A in [0, 1]: a clip after every update, or a sigmoid of alpha"
    )
    complement: Literal["convex", "factored"] = Field(
        default="convex",
        description="weight of the pretrained side: 1 - A, or (1-left)@(1-right) as in the authors' code",
    )

    @model_validator(mode="before")
    @classmethod
    def _full_was_a_rank(cls, value: Any) -> Any:
        """As versions up to 0.4 said it."""
        if isinstance(value, dict) and value.get("rank") == "full" and value.get("gate", "full") == "full":
            return {**value, "rank": 1, "gate": "full"}
        return value

    @model_validator(mode="after")
    def _one_kind_of_gate(self):
        low_rank, sigmoid = self.gate == "low_rank", self.parametrisation == "sigmoid"
        factored = self.complement == "factored"
        refuse(
            (
                factored and low_rank and self.rank != 1,
                f"rank: got {self.rank}; allowed: 1, the only rank that complement factored is defined for",
            ),
            (
                factored and not low_rank,
                f"gate: got {self.gate}; allowed: low_rank, the only gate that complement factored is defined for",
            ),
            (
                not low_rank and self.rank != 1,
                f"rank: got {self.rank}; allowed: 1 with gate {self.gate}, which has no factors; only low_rank has",
            ),
            (
                sigmoid and self.start in (0, 1),
                f"start: got {self.start:g}; allowed: above 0 and below 1 with parametrisation sigmoid, which reaches "
                "neither, say 0.9",
            ),
        )
        return self

    def paths(self, setup: Setup) -> tuple[str, ...]:
        """Of the mixed weights: kernels, as the weights' roles say, or those of `mixed`."""
        weights = setup.model.weights
        if self.mixed is None:
            return tuple(path for path in of_role(weights, "kernel") if path not in setup.frozen)
        return matching(weights, self.mixed, setting="method.mixup.mixed", roles=("kernel",))


class Mixture:
    """The mixture of one method for one model.

    Alpha is what is trained. `layer` and `one` gates are kept once, under the first of the paths that share them.

    Args:
        settings: which weights, and how.
        setup: of the method.
    """

    def __init__(self, settings: Mixup, setup: Setup):
        """Raises AgwmError where `settings.mixed` or `settings.gate` does not fit the model."""
        self.settings, self.mixed, self._frozen = settings, settings.paths(setup), setup.frozen
        self._weights = setup.model.weights
        self.shapes = {path: tuple(setup.shapes[path].shape) for path in self.mixed}
        """Of the mixed weights."""
        self._owners = _owners(settings.gate, {path: self._weights[path] for path in self.mixed})
        self._gate_shapes = {
            owner: self._gate_shape(owner, setup.model.num_heads) for owner in dict.fromkeys(self._owners.values())
        }

        def mixture(pretrained: Array, task: Array, gate: LowRank | Array) -> Array:
            parts = partition({"kernel": pretrained}, mixed=("kernel",))
            return mix(parts, {"kernel": task}, {"kernel": gate}, complement=settings.complement)["kernel"]

        self._mixture = mixture

    def _gate_shape(self, path: str, num_heads: int | None) -> tuple[int, ...]:
        gate, shape, weight = self.settings.gate, self.shapes[path], self._weights[path]
        if gate == "one" or gate == "low_rank":
            return (1, 1)
        if gate != "head":
            return gate_shape("kernel" if gate == "layer" else gate, shape)
        if "heads" in weight.axes and num_heads is None:
            raise AgwmError(
                "method.mixup.gate head needs the number of attention heads, which this model family does not say "
                "(num_attention_heads of its configuration): choose another gate."
            )
        rows, columns = (num_heads or 1 if axis == "heads" else 1 for axis in weight.axes[-2:])
        return gate_shape("head", shape, heads=(rows, columns))

    def partition(self, pretrained: Params) -> Partition:
        """Frozen, task and mixed weights."""
        return partition(pretrained, mixed=self.mixed, frozen=self._frozen or None)

    def problem(
        self,
        pretrained: Params,
        loss: LossFn,
        *,
        validation_loss: LossFn | None = None,
        anchor: float | Scalar = 0.0,
    ) -> Problem:
        """The bi-level problem of W and alpha."""
        return mixup_problem(
            loss,
            self.partition(pretrained),
            validation_loss=validation_loss,
            complement=self.settings.complement,
            anchor=anchor,
            gates=self.gates,
        )

    def init_alpha(self, key: Key[Array, ""], pretrained: Params) -> Alpha:
        """Alpha of gates near `Mixup.start`."""
        settings, parts = self.settings, self.partition(pretrained)
        return init_alpha(
            key,
            parts,
            gate="low_rank" if settings.gate == "low_rank" else self._gate_shapes,
            rank=settings.rank,
            start=settings.start,
            noise=settings.noise,
            parametrisation=settings.parametrisation,
        )

    def project(self, alpha: Alpha) -> Alpha:
        """What follows every update of alpha."""
        return project_alpha(alpha) if self.settings.parametrisation == "projection" else alpha

    def gates(self, alpha: Alpha) -> Alpha:
        """The gate of every mixed path, in [0, 1]: factors, or an array with the leading axes of its kernel."""
        alpha = bound_alpha(alpha, self.settings.parametrisation)
        if self.settings.gate == "low_rank":
            return alpha
        own = share_gates(alpha, self._owners)
        return {path: spread_gate(jnp.asarray(own[path]), self.shapes[path]) for path in self.mixed}

    def statistics(self, alpha: Alpha) -> dict[str, Scalar]:
        """Of A over all entries of the mixed weights."""
        return alpha_statistics(self.gates(alpha), self.shapes)

    def forward(self, pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Effective:
        """The same mixture for a training step, layer by layer within the model."""
        del key
        return self.through(pretrained, variables[TASK], self.gates(variables[ALPHA]))

    def through(self, pretrained: Params, task: Params, gates: Alpha) -> Effective:
        """The mixture by any gates, of every mixed path."""
        operands = {path: (pretrained[path], task[path], gates[path]) for path in self.mixed}
        return {**replace_weights(pretrained, {TASK: task}), **in_layers(self._weights, self._mixture, operands)}

    def merge(self, pretrained: Params, variables: Variables) -> Params:
        """`Method.merge`: the mixed weights."""
        parts = self.partition(pretrained)
        return mix(parts, variables[TASK], self.gates(variables[ALPHA]), complement=self.settings.complement)


def _owners(gate: Gate, weights: Weights) -> dict[str, str]:
    """For every mixed path the one under which its gate is kept: its own, or the first that has the same gate."""
    first: dict[Any, str] = {}

    def shared(path: str, weight: Weight) -> Any:
        return path if gate not in ("layer", "one") else None if gate == "one" else (weight.is_stacked, weight.depth)

    return {path: first.setdefault(shared(path, weight), path) for path, weight in weights.items()}


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
