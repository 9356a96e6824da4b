"""What one training step needs of a device's memory beside its state: a formula with measured constants."""

from typing import NamedTuple

from agwm_jax.engine.sharding import DATA, MODEL, Placement, bytes_per_device
from agwm_jax.runs.build import Built
from agwm_jax.settings.config import Config
from agwm_jax.settings.hypergradient import (
    ConjugateGradient,
    FiniteDifference,
    GradientDescent,
    Implicit,
    Nystrom,
    Unrolled,
)

_RESIDUAL = 0.35  # of the numbers that grow with the width, those that `model` does not divide: the residual stream


class Step(NamedTuple):
    """Constants of one step's temporaries, see `temporaries`."""

    kernels: float
    """Vectors of the size of the mixed weights: gradients, mixed weights, look-ahead, a solver's vectors."""
    others: float
    """Vectors of the size of the other task weights, most of them embeddings."""
    width: float
    """Numbers kept for every layer, token and unit of width."""
    inner: float
    """The same for a unit of the feed-forward part."""
    attention: float
    """The same for an attention head and position."""
    one_layer: float
    """Numbers for a token, attention head and position that one layer at a time needs."""
    rollback: float = 0.0
    """Vectors more with ``search.rollback``."""


# Fitted (non-negative least squares of the relative error) to `temp_size_in_bytes` of 8 or 9 programs a row, compiled
# for a CPU in order of memory by jax 0.10.2, float32, dropout 0.1, one inner step: widths 128 to 768, 2 to 24 layers,
# 4 x 32 to 32 x 128 and 8 x 512 tokens, 3 to 438 MB of weights. Largest error of each row at the right.
STEPS: dict[str, Step] = {
    "plain": Step(0.97, 0.84, 17.8, 4.73, 0.0, 12.9),  # -3 to +5 %
    "finetune": Step(2.92, 0.87, 17.8, 4.76, 0.0, 12.8),  # -3 to +5 %
    "first_order": Step(2.67, 0.88, 18.0, 6.07, 1.48, 11.8, 0.5),  # -2 to +3 %
    "unrolled linearize": Step(8.94, 6.93, 50.7, 19.5, 9.53, 13.3),  # -2 to +3 %
    "unrolled jvp": Step(6.66, 6.89, 24.6, 9.87, 0.8, 19.8),  # -7 to +13 %
    "unrolled finite_difference": Step(8.19, 7.98, 15.2, 6.35, 1.57, 11.8),  # -3 to +7 %
    "finite_difference": Step(7.46, 2.06, 13.6, 4.78, 2.51, 9.94, 3.0),  # -6 to +8 %
    "finite_difference precondition": Step(7.84, 4.58, 10.7, 4.9, 2.83, 9.11, 3.0),  # -8 to +12 %
    "penalty": Step(1.8, 3.82, 36.3, 11.3, 2.86, 8.61, 1.2),  # -22 to +6 %
    "hessian linearize": Step(9.07, 5.41, 60.3, 18.9, 7.2, 23.8, 0.5),  # -1 to +1 %
    "hessian jvp": Step(6.55, 5.57, 37.6, 11.1, 0.41, 26.1, 0.5),  # -2 to +4 %
    "hessian finite_difference": Step(8.17, 5.37, 18.5, 6.41, 1.01, 14.2, 0.5),  # -2 to +3 %
    "gauss_newton linearize": Step(7.85, 4.91, 17.7, 11.2, 0.0, 28.5, 0.5),  # -4 to +5 %
    "gauss_newton jvp": Step(7.15, 4.8, 32.1, 10.5, 2.76, 16.1, 0.5),  # -2 to +2 %
    "gauss_newton finite_difference": Step(8.82, 3.31, 15.7, 7.15, 1.38, 11.1, 0.5),  # -12 to +5 %
}


def temporaries(
    config: Config, built: Built, placement: Placement, *, searches: bool, platform: str | None = None
) -> int:
    """Bytes of one step of one lane on one device, beside its state.

        kernels K + others E + tokens (layers (B (width d + inner f) + 4 attention h t) + 4 one_layer h t)

    K and E: bytes of the mixed and of the other task weights as they lie there; tokens: b t; d, f, h: width,
    feed-forward width and heads. B is 4, on an accelerator in bfloat16 2 (a CPU computes that in float32). The mesh's
    axis `data` divides the tokens; `model` divides f, h and, of what grows with d, all but the residual stream. Fully
    sharded weights are gathered two layers at a time. Alpha, and a solver, add vectors of their own size.

    An `unrolled` look-ahead of k steps by ``linearize`` keeps all of that k times; else 4 vectors for each further step
    (weights, two moments, gradient). Dropout is taken to be on (off: a few per cent less), attention not to be fused.
    """
    step, vectors = STEPS[step_name(config, searches)], _vectors(config) if searches else 0.0
    held, model, axes = _held(built, placement), built.pretrained.config, placement.mesh.shape
    length = built.encoded["train"].input_ids.shape[1]
    accelerator = (platform or placement.mesh.devices.flat[0].platform) != "cpu"
    size = 2 if accelerator and config.model.dtype == "bfloat16" else 4

    tokens = config.data.batch_size / axes[DATA] * length
    scores = 4 * model.num_attention_heads / axes[MODEL] * length
    width = model.hidden_size * (_RESIDUAL + (1 - _RESIDUAL) / axes[MODEL])
    layer = size * (step.width * width + step.inner * model.intermediate_size / axes[MODEL]) + step.attention * scores
    activations = tokens * (model.num_hidden_layers * layer + step.one_layer * scores)
    arrays = step.kernels * held.kernels + step.others * held.others + vectors * held.task + 3 * held.alpha
    gathered = 2 * held.layer if placement.fully_sharded and axes[DATA] > 1 else 0
    return round(
        activations + arrays + gathered + _further(config, searches) * _again(config, activations + arrays, held)
    )


def step_name(config: Config, searches: bool) -> str:
    """The row of `STEPS` for a step of the search, or of the finetune."""
    choice = config.hypergradient
    if not searches:
        return "plain" if config.method.name == "vanilla" else "finetune"
    if isinstance(choice, Unrolled):
        return f"unrolled {choice.hvp}"
    if isinstance(choice, Implicit):
        return f"{choice.curvature} {choice.hvp}"
    if isinstance(choice, FiniteDifference) and choice.precondition:
        return "finite_difference precondition"
    return choice.estimator


def _vectors(config: Config) -> float:
    """Vectors of the task weights' size that the solver and the rollback add."""
    choice = config.hypergradient
    extra = STEPS[step_name(config, True)].rollback if config.search.rollback else 0.0
    if isinstance(choice, ConjugateGradient):
        return extra + 2.2
    if isinstance(choice, GradientDescent):
        return extra - 1.5  # it works on the vector that it carries
    return extra + 4.7 * choice.rank if isinstance(choice, Nystrom) else extra


def _further(config: Config, searches: bool) -> int:
    """Steps of the look-ahead that are differentiated beside the last."""
    choice = config.hypergradient
    if not searches or not isinstance(choice, Unrolled):
        return 0
    return (choice.num_steps or config.search.inner_steps) - 1


def _again(config: Config, one_step: float, held: "_Held") -> float:
    """Bytes kept for each of them."""
    return one_step if getattr(config.hypergradient, "hvp", None) == "linearize" else 4.0 * held.task


class _Held(NamedTuple):
    """Bytes on one device."""

    kernels: int
    others: int
    task: int
    alpha: int
    layer: float
    """The mixed weights of one layer, whole but for `model`."""


def _held(built: Built, placement: Placement) -> _Held:
    shapes = {path: x.shape for path, x in (*built.frozen.items(), *built.initial.task.items())}

    def held(tree, where: Placement = placement) -> int:
        return bytes_per_device(tree, where.of_tree(tree, shapes))

    mixed = {path: x for path, x in built.initial.task.items() if path in built.frozen}
    task, kernels = held(built.initial.task), held(mixed)
    whole = held(mixed, placement._replace(fully_sharded=False))
    layers = built.pretrained.config.num_hidden_layers
    return _Held(kernels, task - kernels, task, held(built.initial.alpha), whole / layers)
