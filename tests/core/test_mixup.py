"""The mixture of weights, its gradient, and the gate's start, projection and statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agwm_jax import (
    AgwmError,
    LowRank,
    alpha_statistics,
    gate,
    init_alpha,
    mix,
    mixup_problem,
    partition,
    project_alpha,
)
from tests.core.problems import effective_weight

RANKS = [1, 2, 8, "full"]
SHAPE = (3, 5, 4)  # three stacked layers


def constant_alpha(rank, value, shape=SHAPE):
    if rank == "full":
        return jnp.full(shape, value)
    *stack, d_in, d_out = shape
    return LowRank(jnp.full((*stack, d_in, rank), value), jnp.full((*stack, rank, d_out), value))


def random_alpha(rng, rank, shape=SHAPE):
    if rank == "full":
        return jnp.asarray(rng.uniform(size=shape))
    *stack, d_in, d_out = shape
    return LowRank(
        jnp.asarray(rng.uniform(size=(*stack, d_in, rank))), jnp.asarray(rng.uniform(size=(*stack, rank, d_out)))
    )


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def pair(rng):
    """Pretrained and task weight."""
    return jnp.asarray(rng.normal(size=SHAPE)), jnp.asarray(rng.normal(size=SHAPE))


@pytest.mark.parametrize(("rank", "complement"), [*((rank, "convex") for rank in RANKS), (1, "factored")])
def test_the_ends_are_bit_for_bit(full_optimization, pair, rank, complement):
    w0, w = pair
    for jitted in (effective_weight, jax.jit(effective_weight, static_argnames="complement")):
        np.testing.assert_array_equal(jitted(w0, w, constant_alpha(rank, 1.0), complement=complement), w)
        np.testing.assert_array_equal(jitted(w0, w, constant_alpha(rank, 0.0), complement=complement), w0)


def test_convex_and_factored_formulas(x64, pair, rng):
    w0, w = pair
    alpha = random_alpha(rng, 1)
    left, right = np.asarray(alpha.left), np.asarray(alpha.right)
    a = left @ right
    np.testing.assert_allclose(effective_weight(w0, w, alpha), a * w + (1 - a) * w0, rtol=1e-13)
    # What the released PyTorch code computes: the coefficients do not sum to 1.
    released = a * w + (1 - left) @ (1 - right) * w0
    np.testing.assert_allclose(effective_weight(w0, w, alpha, complement="factored"), released, rtol=1e-13)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gate_is_the_mean_of_outer_products(x64, rng, rank):
    alpha = random_alpha(rng, rank)
    expected = np.einsum("lir,lrj->lij", alpha.left, alpha.right) / rank
    np.testing.assert_allclose(gate(alpha), expected, rtol=1e-13)


def test_full_and_full_rank_reproduce_an_arbitrary_gate(x64, rng):
    a = rng.uniform(size=(5, 4))
    np.testing.assert_array_equal(gate(jnp.asarray(a)), a)
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    np.testing.assert_allclose(gate(LowRank(jnp.asarray(u * s), jnp.asarray(4 * vt))), a, rtol=1e-12)
    # Inside [0, 1] too: a row of A a factor, each of weight 1 / r.
    np.testing.assert_allclose(gate(LowRank(jnp.eye(5), jnp.asarray(a))), a / 5, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, "full"])
def test_gradients_are_row_and_column_reductions(x64, pair, rng, rank):
    w0, w = pair
    alpha, probe = random_alpha(rng, rank), jnp.asarray(rng.normal(size=SHAPE))

    def loss(effective):
        return jnp.sum(jnp.sin(effective) * probe)

    upstream = jax.grad(loss)(effective_weight(w0, w, alpha))
    grad_w, grad_alpha = jax.grad(lambda w, alpha: loss(effective_weight(w0, w, alpha)), argnums=(0, 1))(w, alpha)
    to_gate = np.asarray((w - w0) * upstream)
    np.testing.assert_allclose(grad_w, gate(alpha) * upstream, rtol=1e-12)
    if rank == "full":
        np.testing.assert_allclose(grad_alpha, to_gate, rtol=1e-12)
    else:
        left = np.einsum("lij,lrj->lir", to_gate, alpha.right) / rank
        right = np.einsum("lij,lir->lrj", to_gate, alpha.left) / rank
        np.testing.assert_allclose(grad_alpha.left, left, rtol=1e-11)
        np.testing.assert_allclose(grad_alpha.right, right, rtol=1e-11)


def test_gradient_is_not_clipped_above_one(pair):
    w0, w = pair
    grads = jax.grad(lambda alpha: jnp.sum(effective_weight(w0, w, alpha)))(constant_alpha(1, 1.5))
    assert all(jnp.all(g != 0) for g in grads)


def test_mix_leaves_the_rest_alone():
    weights = {"embed": jnp.ones(3), "w": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    parts = partition(weights, mixed="w", frozen="embed")
    task = {"bias": jnp.full(2, 3.0), "w": jnp.ones((2, 2))}
    mixed = mix(parts, task, {"w": constant_alpha(1, 0.5, (2, 2))})
    np.testing.assert_array_equal(mixed["w"], np.full((2, 2), 0.25))
    assert mixed["bias"] is task["bias"]
    assert mixed["embed"] is weights["embed"]
    assert mix(parts, task, {})["w"] is task["w"]  # no gate, no mixture: the task weight, not the pretrained one
    assert sorted(mixed) == ["bias", "embed", "w"]


@pytest.mark.parametrize(
    ("mixed", "task", "alpha", "complement", "message"),
    [
        ("w", (2, 2), (1, (2, 2)), "concave", "complement = 'concave': expected 'convex' or 'factored'"),
        ("other", (2, 2), (1, (2, 2)), "convex", "a gate for 'w', which the partition does not mix"),
        ("w", None, (1, (2, 2)), "convex", "a gate for 'w', which the task weights lack"),
        ("w", (2, 2), (1, (3, 2)), "convex", r"'w': the gate has shape \(3, 2\), the task weight \(2, 2\)"),
        ("w", (2, 2), (1, (1, 2)), "convex", r"'w': the gate has shape \(1, 2\)"),
        ("w", (2, 2), ("full", (4, 2)), "convex", r"the gate has shape \(4, 2\)"),
        ("w", (2, 2), ("full", (0, 2)), "convex", r"the gate has shape \(0, 2\)"),
        ("w", (2, 2), ("full", (1, 2, 2)), "convex", r"the gate has shape \(1, 2, 2\)"),
        ("w", (2, 3), (1, (2, 3)), "convex", r"the task weight \(2, 3\), the pretrained \(2, 2\)"),
        ("w", (2, 2), (2, (2, 2)), "factored", "'factored' is defined for rank 1 only"),
        ("w", (2, 2), ("full", (2, 2)), "factored", "'factored' is defined for rank 1 only"),
    ],
)
def test_mix_refuses(without_type_checks, mixed, task, alpha, complement, message):
    parts = partition({"w": jnp.ones((2, 2)), "other": jnp.ones((2, 2))}, mixed=(mixed,))
    task = {} if task is None else {"w": jnp.ones(task)}
    with pytest.raises(AgwmError, match=message):
        mix(parts, task, {"w": constant_alpha(alpha[0], 1.0, alpha[1])}, complement=complement)


def test_what_is_no_partition_is_refused(without_type_checks):
    weights = {"w": jnp.ones((2, 2))}
    with pytest.raises(AgwmError, match=r"mix: partition is a dict, expected what partition\(params, ...\) returns"):
        mix(weights, weights, {})
    with pytest.raises(AgwmError, match="mixup_problem: partition is a str"):
        mixup_problem(lambda params, batch: 0.0, "w")


@pytest.mark.parametrize("rank", [1, 2, "full"])
def test_init_statistics(rank):
    parts = partition({"a": jnp.ones((2, 300, 200)), "b": jnp.ones((300, 200), "bfloat16")}, mixed="[ab]")
    form = {"gate": "full"} if rank == "full" else {"rank": rank}
    alpha = init_alpha(jax.random.key(0), parts, **form)
    if rank != "full":
        assert (alpha["a"].left.shape, alpha["a"].right.shape) == ((2, 300, rank), (2, rank, 200))
    assert all(x.dtype == "float32" for x in jax.tree.leaves(alpha))  # 1 - 0.002 is 1 in bfloat16
    mixed = mix(parts, parts.task, alpha)
    assert (mixed["a"].dtype, mixed["b"].dtype) == ("float32", "bfloat16")
    draws = np.concatenate([np.ravel(x) for x in jax.tree.leaves(alpha["a"])])
    # N(1, 0.005) clipped at 1: half are 1, the rest has the standard deviation of a half normal.
    assert draws.max() == 1
    assert np.mean(draws == 1) == pytest.approx(0.5, abs=0.06)
    below = 1 - draws[draws < 1]
    assert np.mean(below) == pytest.approx(0.005 * np.sqrt(2 / np.pi), rel=0.1)
    assert np.sqrt(np.mean(below**2)) == pytest.approx(0.005, rel=0.1)


def test_init_draws():
    parts = partition({"a": jnp.ones((2, 4, 4)), "b": jnp.ones((2, 4, 4))}, mixed="[ab]")
    first, again, other = (init_alpha(jax.random.key(seed), parts, noise=0.1) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), first, again))
    assert not jnp.array_equal(first["a"].left, other["a"].left)
    assert not jnp.array_equal(first["a"].left, first["b"].left)  # each path its own
    assert not jnp.array_equal(first["a"].left[0], first["a"].left[1])  # and each layer
    assert not jnp.array_equal(first["a"].left[..., 0], first["a"].right[:, 0])  # and each factor
    exact = init_alpha(jax.random.key(0), parts, noise=0.0, rank=2)
    assert all(jnp.all(x == 1) for x in jax.tree.leaves(exact))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rank": 0}, "rank = 0: expected an integer of 1 or more; for the matrix A itself say gate='full'"),
        ({"rank": 1.5}, r"rank = 1\.5: expected an integer"),
        ({"rank": "full"}, "rank = 'full': expected an integer of 1 or more; for the matrix A itself say gate='full'"),
        ({"gate": "half"}, "gate = 'half': expected one of 'low_rank', 'full', 'row'"),
        ({"gate": {"b": (1, 1)}}, "gate has a shape for 'b', which the partition does not mix"),
        ({"start": 1.5}, r"start = 1\.5: expected a number in \[0, 1\]"),
        ({"start": 1.0, "parametrisation": "sigmoid"}, r"start = 1\.0: a sigmoid reaches neither 0 nor 1"),
        ({"noise": -0.1}, r"noise = -0.1: expected a standard deviation of 0 or more"),
    ],
)
def test_init_refuses(without_type_checks, kwargs, message):
    parts = partition({"a": jnp.ones((4, 4))}, mixed="a")
    with pytest.raises(AgwmError, match=message):
        init_alpha(jax.random.key(0), parts, **kwargs)


@pytest.mark.parametrize("rank", RANKS)
def test_projection_keeps_the_gate_in_the_unit_interval(rng, rank):
    wild = jax.tree.map(lambda x: 6 * x - 3, {"w": random_alpha(rng, rank)})
    projected = project_alpha(wild)
    for before, after in zip(jax.tree.leaves(wild), jax.tree.leaves(projected), strict=True):
        np.testing.assert_array_equal(after, np.clip(before, 0, 1))
        assert after.dtype == before.dtype
    a = gate(projected["w"])
    assert jnp.all((a >= 0) & (a <= 1))


def test_statistics_of_known_gates():
    statistics = alpha_statistics(
        {"a": jnp.array([[0.0, 0.04], [1.0, 0.96]]), "b": LowRank(jnp.ones((1, 1)), jnp.ones((1, 4)) / 2)}
    )
    values = np.array([0, 0.04, 1, 0.96, 0.5, 0.5, 0.5, 0.5])
    expected = {"mean": values.mean(), "std": values.std(), "below": 0.25, "above": 0.25}
    assert {k: float(v) for k, v in statistics.items()} == pytest.approx({f"alpha_{k}": v for k, v in expected.items()})
    assert all(v.shape == () for v in statistics.values())


def test_anchor_acts_on_the_mixed_weights_of_the_inner_loss_only():
    task = {"w": jnp.full((2, 2), 2.0), "b": jnp.full(3, 7.0)}
    parts = partition({"w": jnp.zeros((2, 2)), "b": jnp.zeros(3)}, mixed="w")
    alpha = {"w": constant_alpha(1, 0.5, (2, 2))}

    def loss(params, batch):
        return jnp.sum(params["w"]) * batch  # A = 1/4, so W_eff = 1/2 and the sum is 2

    problem = mixup_problem(loss, parts, anchor=0.3)
    assert float(problem.outer_loss(task, alpha, 10.0)) == pytest.approx(20)
    assert float(problem.inner_loss(task, alpha, 10.0)) == pytest.approx(20 + 0.15 * 16)
    without = mixup_problem(loss, parts)
    assert float(without.inner_loss(task, alpha, 10.0)) == pytest.approx(20)
    of_ones = partition({"w": jnp.ones((2, 2)), "b": jnp.zeros(3)}, mixed="w")
    factored = mixup_problem(loss, of_ones, complement="factored")
    assert float(factored.outer_loss(task, alpha, 1.0)) == pytest.approx(4 * (0.25 * 2 + 0.25))


def test_the_loss_gets_the_structure_of_the_user():
    parts = partition({"dense": {"kernel": jnp.zeros((2, 2))}}, mixed=".*kernel")
    problem = mixup_problem(lambda params, batch: jnp.sum(params["dense"]["kernel"]), parts, anchor=1.0)
    task = {"dense.kernel": jnp.ones((2, 2))}
    alpha = {"dense.kernel": jnp.full((2, 2), 0.5)}
    assert float(problem.inner_loss(task, alpha, None)) == pytest.approx(0.5 * 4 + 0.5 * 4)


def test_factors_of_two_ranks_are_refused():
    parts = partition({"w": jnp.ones((4, 3))}, mixed="w")
    with pytest.raises(AgwmError, match="'w': left has rank 1 and right 4; expected one rank"):
        mix(parts, parts.task, {"w": LowRank(jnp.ones((4, 1)), jnp.ones((4, 3)))})


@pytest.mark.parametrize(
    ("mixed", "anchor", "message"),
    [
        ("w", -1.0, r"anchor = -1\.0: expected a strength of 0 or more"),
        ((), 0.5, r"anchor = 0\.5, and nothing is mixed: it would act on no weight"),
        ((), jnp.float32(0.5), "nothing is mixed"),
    ],
)
def test_anchors_are_refused(mixed, anchor, message):
    with pytest.raises(AgwmError, match=message):
        mixup_problem(
            lambda params, batch: params["w"].sum(), partition({"w": jnp.ones((2, 2))}, mixed=mixed), anchor=anchor
        )
