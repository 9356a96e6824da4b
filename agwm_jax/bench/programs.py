"""The programs that the benchmark times: what they compute, what of that is useful, and on what shapes."""

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from agwm_jax import bilevel, hypergrad, init_alpha, linear_solve, mix, mixup_problem, partition, project_alpha
from agwm_jax.core.inner import InnerState, gradient_step
from agwm_jax.engine.lanes import each_lane
from agwm_jax.errors import AgwmError
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.models.loss import batch_loss
from agwm_jax.settings.schema import MIXED_KERNELS

SHAPES = {  # layers, width, heads, feed-forward width
    "minilm": (6, 384, 12, 1536),
    "bert-base": (12, 768, 12, 3072),
    "bert-large": (24, 1024, 16, 4096),
}
LABELS = 2
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Program(NamedTuple):
    """A training step of one seed, or of several side by side."""

    step: Step
    """``step(state, frozen, data) -> (state, info)``."""
    counted: Step
    """The same without fused kernels, whose products no count sees."""
    state: Any
    frozen: Any
    data: Any
    fb: float
    """What it has to compute, in forward-backward passes of one batch of one seed: nothing that is computed anew."""
    single: str | None = None
    """For several seeds: the program of one."""


def configuration(shape: str, *, length: int, layers: int | None = None) -> BertConfig:
    """The shape of a checkpoint, without dropout; `layers` in place of its own."""
    own, width, heads, inner = SHAPES[shape]
    config = BertConfig(30522, width, layers or own, heads, inner, max_position_embeddings=max(512, length))
    return config.with_dropout(0.0)


def model_flops(config: BertConfig, *, batch: int, length: int) -> int:
    """Floating-point operations of one forward and backward pass, from shapes: matrix products alone, none twice."""
    width, inner = config.hidden_size, config.intermediate_size
    of_token = 2 * (4 * width**2 + 2 * width * inner) + 4 * length * width
    head = 2 * (width**2 + width * LABELS)
    return 3 * batch * (config.num_hidden_layers * length * of_token + head)


def programs(config: BertConfig, *, batch: int, length: int, dtype: str, unroll: int, seeds: int) -> dict[str, Program]:
    """All programs by name; those of `seeds` seeds side by side are left out where it is 0."""
    options: dict[str, Any] = {"num_labels": LABELS, "dtype": jnp.dtype(dtype), "unroll": unroll}

    def model(fuse: bool):
        return functionalize(BertClassifier(config, **options, fuse_attention=fuse, rngs=nnx.Rngs(0)))

    apply, params = model(fuse=True)
    plain_apply, _ = model(fuse=False)
    parts = partition(params, mixed=MIXED_KERNELS)
    alpha = init_alpha(jax.random.key(0), parts)
    tx, outer_tx = optax.adamw(2e-5, eps_root=1e-16), optax.adamw(2e-3)
    inner = InnerState(parts.task, tx.init(parts.task))
    data = tuple(_batch(seed, batch, length) for seed in (0, 1))

    def both(make: Callable[[Any], Step], state, fb: float) -> Program:
        return Program(make(apply), make(plain_apply), state, parts.frozen, data, fb)

    def plain(apply) -> Step:
        loss = batch_loss(apply, "classification", reverse_only=True)

        def step(state, frozen, data):
            del frozen
            return gradient_step(lambda task, _, batch: loss(task, batch), tx, state, None, data[0])

        return step

    def finetune(apply) -> Step:
        loss = batch_loss(apply, "classification", reverse_only=True)

        def step(state, frozen, data):
            inner, alpha = state
            inner, value = gradient_step(
                lambda task, a, batch: loss(mix(frozen, task, a), batch), tx, inner, alpha, data[0]
            )
            return (inner, alpha), value

        return step

    def search(estimator, fb: float, *, rollback: bool = False, products: bool = False) -> Program:
        def solver(apply, frozen):
            loss = batch_loss(apply, "classification", reverse_only=not products)
            problem = mixup_problem(loss, frozen, mixed=parts.mixed)
            return bilevel(problem, estimator, inner_tx=tx, outer_tx=outer_tx, project=project_alpha, rollback=rollback)

        def make(apply) -> Step:
            def step(state, frozen, data):
                return solver(apply, frozen).step(state, jax.tree.map(lambda x: x[None], data[0]), data[1])

            return step

        return both(make, solver(apply, parts.frozen).init(parts.task, alpha), fb)

    def neumann(terms: int, **options):
        return hypergrad.implicit(linear_solve.neumann(num_terms=terms, step_size=0.01), **options)

    found = {
        "plain step": both(plain, inner, 1),
        "finetune, alpha frozen": both(finetune, (inner, alpha), 1),
        "search, first_order": search(hypergrad.first_order(), 2),
        "search, finite_difference, rollback": search(hypergrad.finite_difference(), 5, rollback=True),
        "search, unrolled 1": search(hypergrad.unrolled(), 4, products=True),
        "search, neumann 1": search(neumann(1), 5, products=True),
        "search, neumann 5": search(neumann(5), 13, products=True),
        "search, neumann 5, differences": search(neumann(5, hvp="finite_difference"), 8),
        "search, neumann 5, Gauss-Newton": search(neumann(5, curvature="gauss_newton"), 12, products=True),
    }
    for single in ("finetune, alpha frozen", "search, unrolled 1") if seeds else ():
        own = tuple(_stacked([_batch(2 * seed + k, batch, length) for seed in range(seeds)]) for k in (0, 1))
        found[f"{seeds} seeds, {single}"] = _side_by_side(found[single], single, own, seeds)
    return found


def _side_by_side(one: Program, single: str, data, seeds: int) -> Program:
    """Lanes as the training loop has them: frozen weights shared, states stacked, batches of every seed's own."""

    def lanes(step: Step) -> Step:
        return each_lane(step, (0, None, 0), seeds)

    state = jax.eval_shape(lambda state: _stacked([state] * seeds), one.state)
    return Program(lanes(one.step), lanes(one.counted), state, one.frozen, data, seeds * one.fb, single)


def _stacked(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def start(program: Program, one: Any) -> Any:
    """A state that may be donated; `one` is that of a single seed, which those side by side all begin with."""
    return jax.tree.map(lambda shape, x: jnp.array(jnp.broadcast_to(x, shape.shape)), program.state, one)


def _batch(seed: int, batch: int, length: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30000, (batch, length))
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "token_type_ids": jnp.zeros((batch, length), jnp.int32),
        "attention_mask": jnp.ones((batch, length), jnp.int32),
        "labels": jnp.asarray(rng.integers(0, LABELS, batch), jnp.int32),
        "weight": jnp.ones(batch),
    }


def matrix_product(dtype: str) -> tuple[Callable[[], None], int]:
    """One large matrix product, whose rate is what the device can do at most, and its floating-point operations."""
    n = 1536 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    product = jax.jit(lambda x: x @ x).lower(x).compile()
    return lambda: jax.block_until_ready(product(x)), 2 * n**3


def torch_step(config: BertConfig, *, batch: int, length: int) -> Callable[[], None]:
    """The plain step in eager PyTorch: `transformers`' BERT and torch's AdamW.

    Raises:
        AgwmError: PyTorch is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise AgwmError(f"--torch needs PyTorch beside the product ({error}): pip install torch.") from None
    torch.set_num_threads(threads())
    torch.manual_seed(0)
    names = {k: v for k, v in vars(config).items() if k not in ("classifier_dropout",)}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**names, num_labels=LABELS))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, weight_decay=0.0)
    data = {k: torch.from_numpy(np.array(v)).long() for k, v in _batch(0, batch, length).items() if k != "weight"}

    def step() -> None:
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()

    return step


def threads() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes() -> float:
    """Memory that the device has left, on a CPU the machine; infinite where nobody says."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf
