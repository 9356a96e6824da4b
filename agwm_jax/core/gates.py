"""Forms of a gate: how many numbers it has, which entries of the kernel each acts on, and how it stays in [0, 1]."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from agwm_jax.core.types import Alpha
from agwm_jax.errors import AgwmError

Form = Literal["low_rank", "full", "row", "column", "head", "kernel"]
"""Of the gate A of a kernel ``[*l, d_in, d_out]``: ``low_rank``: a pair of factors; the others are arrays, see
`gate_shape`."""

Parametrisation = Literal["projection", "sigmoid"]
"""What keeps A in [0, 1]. ``projection``: alpha is clipped after every update. ``sigmoid``: alpha is any number, and
its sigmoid the gate; of a pair of factors, the sigmoid of each."""


def gate_shape(form: Form, shape: Sequence[int], *, heads: tuple[int, int] = (1, 1)) -> tuple[int, ...]:
    """Shape of the array that is a kernel's gate.

    Args:
        form: ``full``: a number an entry, ``[*l, d_in, d_out]``; ``row``: ``[*l, d_in, 1]``; ``column``:
            ``[*l, 1, d_out]``; ``kernel``: ``[*l, 1, 1]``; ``head``: a number a block of rows and columns.
        shape: of the kernel, ``[*l, d_in, d_out]``.
        heads: of ``head``, into how many blocks rows and columns are cut: (1, h) where a kernel makes the heads, (h, 1)
            where it reads them, (1, 1) elsewhere.

    Raises:
        AgwmError: a form that is no array, or a number of heads that does not divide the kernel.

    Example:
        >>> from agwm_jax import gate_shape
        >>> gate_shape("row", (12, 768, 3072)), gate_shape("head", (12, 768, 768), heads=(1, 12))
        ((12, 768, 1), (12, 1, 12))
    """
    *stack, d_in, d_out = shape
    shapes = {"full": (d_in, d_out), "row": (d_in, 1), "column": (1, d_out), "kernel": (1, 1), "head": heads}
    if form not in shapes:
        raise AgwmError(f"gate = {form!r}: expected one of {', '.join(repr(x) for x in get_args(Form))}.")
    rows, columns = shapes[form]
    if d_in % rows or d_out % columns:
        raise AgwmError(
            f"heads = {heads}: expected numbers that divide the kernel's rows and columns ({d_in}, {d_out})."
        )
    return (*stack, rows, columns)


def gate_fits(own: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether every axis of a gate of shape `own` divides that of the kernel; axes that it lacks are leading ones."""
    missing = len(shape) - len(own)
    return missing >= 0 and all(n > 0 and size % n == 0 for n, size in zip(own, tuple(shape)[missing:], strict=True))


def spread_gate(gate: Float[Array, "..."], shape: Sequence[int]) -> Float[Array, "..."]:
    """The gate as it meets a kernel: with its leading axes, and 1 or the kernel's number of rows and of columns.

    Every axis of a gate has as many entries as that of the kernel, or a number that divides it: each entry then acts
    on a block of that many. Axes that the gate lacks are leading ones.

    Args:
        gate: of any form but ``low_rank``.
        shape: of the kernel, ``[*l, d_in, d_out]``.

    Returns:
        ``[*l, 1 | d_in, 1 | d_out]``, which broadcasts to the kernel.

    Raises:
        AgwmError: the gate does not fit the kernel.
    """
    if gate.shape == tuple(shape):
        return gate
    if not gate_fits(gate.shape, shape):
        raise AgwmError(
            f"a gate of shape {gate.shape} does not fit a kernel of shape {tuple(shape)}: expected the same axes, or a "
            "divisor of each."
        )
    found, last = gate.reshape((1,) * (len(shape) - gate.ndim) + gate.shape), len(shape) - 2
    for axis, size in enumerate(shape):
        n = found.shape[axis]
        if n != size and (axis < last or n > 1):
            found = jnp.repeat(found, size // n, axis)
    return found


def share_gates(alpha: Alpha, owners: Mapping[str, str]) -> Alpha:
    """A gate for every path out of gates that several share: ``{path: alpha[owners[path]]}``.

    Args:
        alpha: by the path whose gate others share.
        owners: of every mixed path.

    Example:
        One number for two kernels of different shapes, and its gradient, the sum of both.

        >>> import jax, jax.numpy as jnp
        >>> from agwm_jax import mix, partition, share_gates
        >>> parts = partition({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 1))}, mixed=("a", "b"))
        >>> task, one = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}, {"a": jnp.full((1, 1), 0.5)}
        >>> def total(alpha):
        ...     return sum(x.sum() for x in mix(parts, task, share_gates(alpha, {"a": "a", "b": "a"})).values())
        >>> float(total(one)), jax.grad(total)(one)["a"].tolist()
        (4.5, [[9.0]])
    """
    return {path: alpha[owner] for path, owner in owners.items()}


def bound_alpha(alpha: Alpha, parametrisation: Parametrisation) -> Alpha:
    """The gates, or their factors, in [0, 1]: alpha itself, or with ``sigmoid`` its sigmoid."""
    return alpha if parametrisation == "projection" else jax.tree.map(jax.nn.sigmoid, alpha)


def start_value(start: float, form: Form, parametrisation: Parametrisation) -> float:
    """What every entry of alpha is where all of A is `start`.

    Raises:
        AgwmError: a start outside [0, 1], or at one of its ends with ``sigmoid``, which reaches neither.
    """
    if not 0 <= start <= 1:
        raise AgwmError(f"start = {start}: expected a number in [0, 1].")
    value = math.sqrt(start) if form == "low_rank" else start  # of either factor; their product, averaged over the rank
    if parametrisation == "projection":
        return value
    if start in (0, 1):
        raise AgwmError(f"start = {start}: a sigmoid reaches neither 0 nor 1; give a number between them, say 0.9.")
    return math.log(value / (1 - value))
