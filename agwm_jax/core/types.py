"""The types that the pure functions share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from jaxtyping import Array, Float, PyTree

Params = dict[str, Array]
"""Weights keyed by path, for example ``{"encoder.layers.query.kernel": [l, d, d]}``."""

Vector: TypeAlias = PyTree[Float[Array, "..."]]
"""A variable, a gradient or a direction: any pytree of float arrays."""

Batch: TypeAlias = PyTree
"""What a loss needs besides the variables. Randomness (a dropout key) rides in it, so that a gradient, its
Hessian-vector products and both ends of a finite difference see the same mask."""

Scalar = Float[Array, ""]

Info = dict[str, Scalar]
"""Diagnostics by name."""


class LowRank(NamedTuple):
    """The factors of one gate, ``A = left @ right / r``; leading axes (stacked layers) follow the kernel's."""

    left: Float[Array, "*l d_in r"]
    right: Float[Array, "*l r d_out"]


Alpha = dict[str, LowRank | Array]
"""One gate a mixed path: a pair of factors, or an array that acts on the kernel entry by entry or block by block."""

LossFn = Callable[[Any, Batch], Scalar]
"""``loss(params, batch)``: a mean over the batch's real examples."""

Loss = Callable[[Vector, Vector, Batch], Scalar]
"""``loss(inner, outer, batch)``."""


@dataclasses.dataclass(frozen=True)
class Composite:
    """A loss in two parts, ``criterion(outputs(*variables, batch), batch)``; called like any other loss.

    The form that Gauss-Newton curvature needs. The criterion should be convex in the outputs (cross-entropy in the
    logits, squared error in the prediction); what is regularised belongs to the outputs too, for instance
    ``outputs = (logits, w)`` for a penalty on w.
    """

    outputs: Callable[..., Vector]
    """``outputs(*variables, batch) -> z``."""
    criterion: Callable[[Any, Batch], Scalar]
    """``criterion(z, batch) -> scalar``."""

    def __call__(self, *variables_and_batch: Any) -> Scalar:
        """The loss."""
        return self.criterion(self.outputs(*variables_and_batch), variables_and_batch[-1])


class Problem(NamedTuple):
    """A bi-level problem: ``min_o outer_loss(w*(o), o)`` where ``w*(o) = argmin_w inner_loss(w, o)``.

    Both are called as ``loss(inner, outer, batch) -> scalar``; `inner` and `outer` are any pytrees of float arrays
    (in weight mixup: the task weights and alpha). For ``curvature="gauss_newton"`` the inner loss is a `Composite`.
    """

    inner_loss: Loss
    outer_loss: Loss
