"""What is known of every weight of a model besides its numbers: its role, its depth and its logical axes."""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from agwm_jax.errors import AgwmError

Role = Literal["kernel", "bias", "norm", "embedding", "head"]
"""``kernel``: a matrix between two hidden representations (pooler included); ``bias``: added after one; ``norm``: scale
or bias of a normalisation; ``embedding``: a table that is looked up; ``head``: kernels and biases of the task's
classifier, which a pretrained checkpoint lacks."""

LAYERS = "layers"
"""Logical axis of weights that are stacked over layers; always the first."""
CLASSES = "classes"
"""Logical axis that counts what the head tells apart; always the last."""


class Weight(NamedTuple):
    """One weight of a model.

    Logical axes are names of what an axis counts: ``layers``, ``vocab``, ``positions``, ``types``, ``buckets`` of
    distances (rows of a table), ``width`` (of the hidden state, as rows or columns of a matrix), ``embedding`` (of the
    tables, where it is another), ``heads`` (heads times their width), ``kv_heads`` (the same of keys and values that
    several heads share), ``head`` (the width of one), ``per_head`` (one number a head), ``mlp`` (inner width),
    ``classes``; ``vector`` for the only axis of a bias or a norm that has the hidden state's width. The mesh maps them
    to devices by one small table.
    """

    role: Role
    axes: tuple[str, ...]
    depth: int | None = None
    """0 for embeddings, l + 1 for what comes after the last of l layers; None for a weight stacked over `LAYERS`, whose
    entries have depth 1 to l."""

    @property
    def is_stacked(self) -> bool:
        """Whether the first axis counts layers."""
        return self.axes[:1] == (LAYERS,)

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes without that of layers: a kernel or a table, not a bias or a norm."""
        return len(self.axes) - self.is_stacked > 1


Weights = Mapping[str, Weight]
"""By path, such as ``encoder.layers.query.kernel``."""


def of_role(weights: Weights, *roles: Role) -> tuple[str, ...]:
    """Paths of all weights with one of the roles, in the model's order."""
    unknown = set(roles) - set(get_args(Role))
    if unknown:
        raise AgwmError(f"there is no role {', '.join(sorted(unknown))}: roles are {', '.join(get_args(Role))}.")
    return tuple(path for path, weight in weights.items() if weight.role in roles)


def matching(
    weights: Weights, pattern: str, *, setting: str, roles: Iterable[Role] = get_args(Role)
) -> tuple[str, ...]:
    """Paths that a user's pattern matches as a whole; all must have one of `roles`.

    Args:
        weights: of the model.
        pattern: regular expression.
        setting: what the pattern is called in an error.
        roles: the roles that make sense for this setting.

    Raises:
        AgwmError: no path matches, or one of another role does.
    """
    found = tuple(path for path in weights if re.fullmatch(pattern, path))
    if not found:
        raise AgwmError(
            f"{setting} {pattern!r} matches no weight of the model; a pattern must match a whole path, and paths are "
            f"{', '.join(list(weights)[:3])}, ..."
        )
    allowed = tuple(roles)
    wrong = [f"{path} (a {weights[path].role})" for path in found if weights[path].role not in allowed]
    if wrong:
        raise AgwmError(
            f"{setting} {pattern!r} matches {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; expected "
            f"weights of role {' or '.join(allowed)} only: narrow the pattern."
        )
    return found


def decays(weights: Weights) -> dict[str, bool]:
    """Which weights decay: matrices and tables do, biases and norms do not."""
    return {path: weight.is_matrix for path, weight in weights.items()}


def num_layers(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """l, read from the first stacked weight; 0 where none is stacked."""
    return next((shapes[path][0] for path, weight in weights.items() if weight.is_stacked), 0)
