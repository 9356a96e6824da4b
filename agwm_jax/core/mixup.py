"""The mixture of pretrained and task weights, ``W_eff = A * W + (1 - A) * W0``, and the gate A."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from agwm_jax.core.gates import Form, Parametrisation, gate_fits, gate_shape, spread_gate, start_value
from agwm_jax.core.partition import Partition
from agwm_jax.core.types import Alpha, Batch, Composite, LossFn, LowRank, Params, Problem, Scalar
from agwm_jax.errors import AgwmError

Complement = Literal["convex", "factored"]


def init_alpha(
    key: Key[Array, ""],
    partition: Partition,
    *,
    gate: Form | Mapping[str, tuple[int, ...]] = "low_rank",
    rank: int = 1,
    start: float = 1.0,
    noise: float = 0.005,
    parametrisation: Parametrisation = "projection",
) -> Alpha:
    """Draw the gate of every mixed weight near `start`; near 1 training starts as ordinary fine-tuning.

    Every number of alpha is drawn from ``N(start, noise)`` and projected to [0, 1] (arXiv 2403.12918); factors from
    ``N(sqrt(start), noise)``, so that A is near `start` at every rank. With ``parametrisation="sigmoid"`` alpha is
    ``N(logit(start), noise)``, and its sigmoid the gate (or factor). Alpha is float32 whatever the weights are (float64
    for such weights), for near 1 bfloat16 has steps of 0.004.

    Args:
        key: PRNG key.
        partition: of the model.
        gate: ``"low_rank"``: a mixed weight ``[*l, d_in, d_out]`` gets ``left [*l, d_in, r]`` and
            ``right [*l, r, d_out]``; another form: an array, see `agwm_jax.gate_shape`; or the shape of the array by
            path, for gates of other kinds, and for those that several weights share (`agwm_jax.share_gates`).
        rank: r of ``"low_rank"``, 1 or more.
        start: of A.
        noise: standard deviation of the start; 0 starts at exactly `start`.
        parametrisation: what keeps A in [0, 1]; with ``"sigmoid"`` there is nothing to project, and `mix` takes
            ``bound_alpha(alpha, "sigmoid")``.

    Raises:
        AgwmError: a rank below 1, a negative noise, a start outside [0, 1], an unknown form or path.
    """
    _check_partition("init_alpha", partition)
    if not isinstance(rank, int) or rank < 1:
        raise AgwmError(f"rank = {rank!r}: expected an integer of 1 or more; for the matrix A itself say gate='full'.")
    if noise < 0:
        raise AgwmError(f"noise = {noise}: expected a standard deviation of 0 or more.")
    unknown = [path for path in gate if path not in partition.mixed] if isinstance(gate, Mapping) else []
    if unknown:
        raise AgwmError(f"gate has a shape for {unknown[0]!r}, which the partition does not mix.")
    form: Form = gate if isinstance(gate, str) else "full"
    centre = start_value(start, form, parametrisation)

    def near_start(key, shape, dtype):
        return centre + noise * jax.random.normal(key, shape, dtype)

    alpha: Alpha = {}
    for path, path_key in zip(partition.mixed, jax.random.split(key, len(partition.mixed)), strict=True):
        weight = partition.weights[path]
        shape = partition.matrix_shape(path)
        *stack, d_in, d_out = shape
        dtype = jnp.promote_types(weight.dtype, jnp.float32)
        if form == "low_rank":
            left_key, right_key = jax.random.split(path_key)
            alpha[path] = LowRank(
                left=near_start(left_key, (*stack, d_in, rank), dtype),
                right=near_start(right_key, (*stack, rank, d_out), dtype),
            )
        elif isinstance(gate, str):
            alpha[path] = near_start(path_key, gate_shape(form, shape), dtype)
        elif path in gate:
            alpha[path] = near_start(path_key, gate[path], dtype)
    return project_alpha(alpha) if parametrisation == "projection" else alpha


def project_alpha(alpha: Alpha) -> Alpha:
    """Clip every factor to [0, 1]; then A is in [0, 1] at every rank. Applied at the start and after every update.

    There is no clip inside `mix`: it would cut the gradient of every entry that starts above 1.
    """
    return jax.tree.map(lambda x: jnp.clip(x, 0, 1), alpha)


def gate(alpha: LowRank | Array) -> Array:
    """The gate A of one mixed weight: ``left @ right / r``, or alpha itself where it is an array."""
    if not isinstance(alpha, LowRank):
        return alpha
    rank = alpha.left.shape[-1]
    if rank == 1:  # an outer product fuses into the mixture; a matrix product would write A out first
        return alpha.left * alpha.right
    return jnp.matmul(alpha.left, alpha.right, precision=jax.lax.Precision.HIGHEST) / rank


def mix(partition: Partition, task: Params, alpha: Alpha, *, complement: Complement = "convex") -> PyTree:
    """The weights of the forward pass: ``A * W + (1 - A) * W0`` where there is an alpha, else the task or frozen one.

    Pure; differentiable in `task` and `alpha`. Where A = 1 the result is W bit for bit, where A = 0 it is W0. Each
    weight keeps its dtype.

    Args:
        partition: of the pretrained weights W0 ``[*l, d_in, d_out]``.
        task: task weights W by path.
        alpha: gates by path, in [0, 1]: pairs of factors, or arrays each axis of which divides that of the kernel (one
            number, one a row, one a head), the kernel taken as ``[*l, d_in, d_out]``; ``{}`` gives the task weights.
        complement: ``"convex"`` as above, or ``"factored"``: ``left @ right * W + (1 - left) @ (1 - right) * W0``, what
            the released PyTorch code computes (rank 1 only; its coefficients do not sum to 1).

    Returns:
        The structure that `partition` was given: the user's own pytree, or a flat dict by path.

    Raises:
        AgwmError: an unknown complement, a gate without its weight, or one whose shape does not fit it.
    """
    _check_partition("mix", partition)
    if complement not in ("convex", "factored"):
        raise AgwmError(f"complement = {complement!r}: expected 'convex' or 'factored'.")
    frozen = partition.frozen
    params = {**frozen, **task}
    for path, factors in alpha.items():
        if path not in frozen or path not in task:
            side = "partition does not mix" if path not in frozen else "task weights lack"
            raise AgwmError(f"alpha has a gate for {path!r}, which the {side}: use one `partition` for all.")
        params[path] = _mixture(path, partition.matrix_shape(path), frozen[path], task[path], factors, complement)
    return partition.structure.unflatten(params)


def _check_partition(name: str, value: Any) -> None:
    if not isinstance(value, Partition):
        raise AgwmError(f"{name}: partition is a {type(value).__name__}, expected what partition(params, ...) returns.")


def _mixture(
    path: str,
    matrix: tuple[int, ...],
    pretrained: Array,
    task: Array,
    factors: LowRank | Array,
    complement: Complement,
) -> Array:
    if isinstance(factors, LowRank) and factors.left.shape[-1] != factors.right.shape[-2]:
        raise AgwmError(
            f"{path!r}: left has rank {factors.left.shape[-1]} and right {factors.right.shape[-2]}; expected one rank, "
            "left [d_in, r] and right [r, d_out]."
        )
    a = gate(factors)
    fits = a.shape == matrix if isinstance(factors, LowRank) else gate_fits(a.shape, matrix)
    if not fits or task.shape != pretrained.shape:
        raise AgwmError(
            f"{path!r}: the gate has shape {a.shape}, the task weight {task.shape}, the pretrained {pretrained.shape}; "
            "expected one shape, or in an array's axes a divisor of it: was alpha trained on another model?"
        )
    shape, pretrained, task = task.shape, pretrained.reshape(matrix), task.reshape(matrix)
    a = spread_gate(a, matrix)
    if complement == "convex":
        return (a * task + (1 - a) * pretrained).astype(task.dtype).reshape(shape)
    if not isinstance(factors, LowRank) or factors.left.shape[-1] != 1:
        raise AgwmError(
            f"{path!r}: complement='factored' is defined for rank 1 only (gate low_rank); use complement='convex'."
        )
    return (a * task + (1 - factors.left) * (1 - factors.right) * pretrained).astype(task.dtype).reshape(shape)


def anchor_penalty(changes: Params, anchor: float | Scalar) -> Scalar:
    """``anchor / 2 * |W - W0|^2``, given W - W0: makes alpha identifiable (without it W can undo alpha)."""
    return 0.5 * anchor * sum((jnp.sum(change**2) for change in changes.values()), start=jnp.zeros(()))


def mixup_problem(
    loss: LossFn,
    partition: Partition,
    *,
    validation_loss: LossFn | None = None,
    complement: Complement = "convex",
    anchor: float | Scalar = 0.0,
    gates: Callable[[Alpha], Alpha] = lambda alpha: alpha,
) -> Problem:
    """The bi-level problem of weight mixup (arXiv 2403.12918): inner variable W and outer variable alpha.

    Args:
        loss: ``loss(params, batch) -> scalar`` on the mixed weights, in the structure that `partition` was given; as a
            `Composite`, the inner loss is one too, with W - W0 among its outputs where there is an anchor.
        partition: of the pretrained weights. Pass these through `jax.jit` as an argument and build partition and
            problem inside, so that the weights do not become constants of the program.
        validation_loss: of the same form, the outer loss; None: `loss`.
        complement: see `mix`.
        anchor: strength of ``anchor / 2 * |W - W0|^2`` over the mixed weights in the inner loss; at 0 the exact
            hypergradient vanishes at the inner optimum wherever A > 0.
        gates: the gates by path out of the outer variable, where that is something else: shared by several weights, or
            in front of a sigmoid.

    Raises:
        AgwmError: a negative anchor, or one with nothing mixed.
    """
    _check_partition("mixup_problem", partition)
    is_number = isinstance(anchor, int | float)
    if is_number and anchor < 0:
        raise AgwmError(f"anchor = {anchor}: expected a strength of 0 or more.")
    anchored = () if is_number and anchor == 0 else partition.mixed
    if not anchored and not (is_number and anchor == 0):
        raise AgwmError(f"anchor = {anchor}, and nothing is mixed: it would act on no weight; mix some, or leave it 0.")
    pretrained = partition.frozen

    def effective(task: Params, alpha: Alpha) -> PyTree:
        return mix(partition, task, gates(alpha), complement=complement)

    def changes(task: Params) -> Params:
        return {path: task[path] - pretrained[path] for path in anchored}

    of_outer = loss if validation_loss is None else validation_loss

    def outer_loss(task: Params, alpha: Alpha, batch: Batch) -> Scalar:
        return of_outer(effective(task, alpha), batch)

    def inner_loss(task: Params, alpha: Alpha, batch: Batch) -> Scalar:
        return loss(effective(task, alpha), batch) + anchor_penalty(changes(task), anchor)

    if not isinstance(loss, Composite):
        return Problem(inner_loss, outer_loss)
    composite = loss

    def outputs(task: Params, alpha: Alpha, batch: Batch) -> tuple[Any, Params]:
        return composite.outputs(effective(task, alpha), batch), changes(task)

    def criterion(outputs: tuple[Any, Params], batch: Batch) -> Scalar:
        predictions, changes = outputs
        return composite.criterion(predictions, batch) + anchor_penalty(changes, anchor)

    return Problem(Composite(outputs, criterion), outer_loss)


def alpha_statistics(alpha: Alpha, shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Scalar]:
    """Mean and standard deviation of A over all mixed entries, and the shares below 0.05 and above 0.95.

    Args:
        alpha: gates by path, in [0, 1].
        shapes: of the kernels, so that a number counts as often as it acts; None: each counts once.
    """
    if not alpha:
        raise AgwmError("alpha has no gates to describe; expected what `init_alpha` gives.")
    gates = {path: gate(factors) for path, factors in alpha.items()}
    acts = {path: 1.0 if shapes is None else math.prod(shapes[path]) / a.size for path, a in gates.items()}
    total = sum(acts[path] * a.size for path, a in gates.items())  # a float: as an integer it may be beyond 32 bits

    def average(fn) -> Scalar:
        return jnp.asarray(sum(acts[path] * jnp.sum(fn(a)) for path, a in gates.items()) / total)

    mean = average(lambda a: a)
    return {
        "alpha_mean": mean,
        "alpha_std": jnp.sqrt(average(lambda a: (a - mean) ** 2)),
        "alpha_below": average(lambda a: (a < 0.05).astype(a.dtype)),
        "alpha_above": average(lambda a: (a > 0.95).astype(a.dtype)),
    }
