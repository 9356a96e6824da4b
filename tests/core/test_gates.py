"""Forms of a gate against matrices written out by NumPy, and where each starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agwm_jax import (
    AgwmError,
    LowRank,
    alpha_statistics,
    bound_alpha,
    gate,
    gate_shape,
    init_alpha,
    mix,
    mixup_problem,
    partition,
    share_gates,
    spread_gate,
)

SHAPE = (3, 6, 4)  # three stacked layers
SHAPES = {
    "full": (3, 6, 4),
    "row": (3, 6, 1),
    "column": (3, 1, 4),
    "heads as columns": (3, 1, 2),
    "heads as rows": (3, 3, 1),
    "blocks": (3, 2, 2),
    "kernel": (3, 1, 1),
    "one": (1, 1),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def written_out(a) -> np.ndarray:
    """The matrix of a gate: each number repeated over its block."""
    a = np.reshape(a, (1,) * (len(SHAPE) - np.ndim(a)) + np.shape(a))
    return np.kron(a, np.ones([size // n for size, n in zip(SHAPE, a.shape, strict=True)]))


def test_shapes():
    assert [gate_shape(form, SHAPE) for form in ("full", "row", "column", "kernel")] == [
        SHAPES[form] for form in ("full", "row", "column", "kernel")
    ]
    assert gate_shape("head", SHAPE, heads=(1, 2)) == (3, 1, 2)
    assert gate_shape("head", SHAPE, heads=(3, 1)) == (3, 3, 1)
    assert gate_shape("head", (6, 4)) == (1, 1)


@pytest.mark.parametrize(
    ("form", "heads", "message"),
    [
        ("low_rank", (1, 1), "gate = 'low_rank': expected one of"),
        ("rows", (1, 1), "gate = 'rows': expected one of 'low_rank', 'full', 'row'"),
        ("head", (1, 3), r"heads = \(1, 3\): expected numbers that divide the kernel's rows and columns \(6, 4\)"),
    ],
)
def test_shapes_are_refused(without_type_checks, form, heads, message):
    with pytest.raises(AgwmError, match=message):
        gate_shape(form, SHAPE, heads=heads)


@pytest.mark.parametrize("form", SHAPES)
def test_a_gate_acts_on_its_block_and_its_gradient_is_the_sum_over_it(x64, rng, form):
    w0, w, probe = (jnp.asarray(rng.normal(size=SHAPE)) for _ in range(3))
    a = jnp.asarray(rng.uniform(size=SHAPES[form]))
    parts = partition({"w": w0}, mixed="w")

    def total(a):
        return jnp.sum(jnp.sin(mix(parts, {"w": w}, {"w": a})["w"]) * probe)

    matrix = written_out(a)
    np.testing.assert_allclose(mix(parts, {"w": w}, {"w": a})["w"], matrix * w + (1 - matrix) * w0, rtol=1e-13)
    each = np.cos(matrix * w + (1 - matrix) * w0) * probe * (w - w0)
    own = (1,) * (3 - a.ndim) + a.shape
    blocks = each.reshape([n for size, count in zip(SHAPE, own, strict=True) for n in (count, size // count)])
    np.testing.assert_allclose(jax.grad(total)(a), blocks.sum((1, 3, 5)).reshape(a.shape), rtol=1e-11)


@pytest.mark.parametrize("form", SHAPES)
def test_the_ends_are_bit_for_bit(full_optimization, rng, form):
    w0, w = (jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(2))
    parts = partition({"w": w0}, mixed="w")
    for value, end in ((1.0, w), (0.0, w0)):
        mixed = jax.jit(lambda a, task: mix(parts, task, {"w": a})["w"])(jnp.full(SHAPES[form], value), {"w": w})
        np.testing.assert_array_equal(mixed, end)


@pytest.mark.parametrize("form", SHAPES)
def test_a_spread_gate_has_the_kernels_layers(rng, form):
    """What a scan over layers needs; rows and columns of one number stay one, and nothing is spread twice."""
    a = jnp.asarray(rng.uniform(size=SHAPES[form]))
    found = spread_gate(a, SHAPE)
    assert found.shape == (3, *(1 if n == 1 else size for n, size in zip(a.shape[-2:], SHAPE[1:], strict=True)))
    np.testing.assert_array_equal(np.broadcast_to(found, SHAPE), written_out(a).astype(found.dtype))
    assert spread_gate(found, SHAPE).shape == found.shape


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 6, 4), (3, 0, 1), (1, 3, 6, 4)])
def test_what_does_not_fit_is_refused(shape):
    with pytest.raises(AgwmError, match=r"a gate of shape .* does not fit a kernel of shape \(3, 6, 4\)"):
        spread_gate(jnp.ones(shape), SHAPE)


@pytest.mark.parametrize("parametrisation", ["projection", "sigmoid"])
@pytest.mark.parametrize("form", ["low_rank", "full", "row", "column", "kernel"])
@pytest.mark.parametrize("start", [0.3, 0.9])
def test_a_gate_starts_where_it_is_told(form, parametrisation, start):
    parts = partition({"w": jnp.ones((2, 40, 30))}, mixed="w")
    for rank in (1, 3) if form == "low_rank" else (1,):
        known = {"gate": form, "rank": rank, "start": start, "parametrisation": parametrisation}
        exact = bound_alpha(init_alpha(jax.random.key(0), parts, noise=0.0, **known), parametrisation)
        np.testing.assert_allclose(gate(exact["w"]), start, rtol=1e-6)
        alpha = init_alpha(jax.random.key(0), parts, noise=0.02, **known)
        bounded = bound_alpha(alpha, parametrisation)
        assert all(bool(jnp.all((x >= 0) & (x <= 1))) for x in jax.tree.leaves(bounded))
        assert np.mean(gate(bounded["w"])) == pytest.approx(start, abs=0.03)
        assert np.std(jax.tree.leaves(alpha)[0]) > 0
    if parametrisation == "sigmoid":
        assert jax.tree.leaves(alpha)[0].max() > 1 or start < 0.9  # before the sigmoid, and not clipped


def test_noise_is_the_standard_deviation_of_what_is_trained():
    parts = partition({"w": jnp.ones((100, 100))}, mixed="w")
    for parametrisation, centre in (("projection", 0.5), ("sigmoid", 0.0)):
        alpha = init_alpha(
            jax.random.key(0), parts, gate="full", start=0.5, noise=0.05, parametrisation=parametrisation
        )
        assert np.mean(alpha["w"]) == pytest.approx(centre, abs=2e-3)
        assert np.std(alpha["w"]) == pytest.approx(0.05, rel=0.05)


def test_gates_by_shape_are_drawn_for_those_paths_alone():
    parts = partition({"a": jnp.ones((2, 4, 4)), "b": jnp.ones((4, 4), "bfloat16")}, mixed="[ab]")
    alpha = init_alpha(jax.random.key(0), parts, gate={"b": (1, 2)}, noise=0.0)
    assert {path: (x.shape, x.dtype) for path, x in alpha.items()} == {"b": ((1, 2), "float32")}


def test_a_shared_number_gets_the_gradient_of_all_that_share_it(x64, rng):
    weights = {"a": jnp.asarray(rng.normal(size=(2, 3))), "b": jnp.asarray(rng.normal(size=(3, 1)))}
    parts, task = partition(weights, mixed="[ab]"), {path: 2 * x for path, x in weights.items()}
    owners = {"a": "a", "b": "a"}

    def loss(params, batch):
        return jnp.sum(params["a"] ** 2) * jnp.sum(params["b"])

    one = {"a": jnp.full((1, 1), 0.25)}
    problem = mixup_problem(loss, parts, gates=lambda alpha: share_gates(alpha, owners))
    own = mixup_problem(loss, parts)
    apart = {path: jnp.full((1, 1), 0.25) for path in weights}
    assert problem.outer_loss(task, one, None) == own.outer_loss(task, apart, None)
    assert problem.inner_loss(task, one, None) == own.inner_loss(task, apart, None)
    found = jax.grad(problem.outer_loss, 1)(task, one, None)
    each = jax.grad(own.outer_loss, 1)(task, apart, None)
    np.testing.assert_allclose(found["a"], each["a"] + each["b"], rtol=1e-13)


def test_statistics_count_a_number_as_often_as_it_acts(rng):
    rows = np.array([[0.01], [0.5], [0.99]], np.float32)
    alpha = {"a": jnp.asarray(rows), "b": jnp.array([[0.2]]), "c": LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)))}
    shapes = {"a": (3, 5), "b": (4, 2), "c": (2, 2)}
    entries = np.concatenate([np.repeat(rows, 5), np.full(8, 0.2), np.ones(4)])
    found = alpha_statistics(alpha, shapes)
    expected = [entries.mean(), entries.std(), (entries < 0.05).mean(), (entries > 0.95).mean()]
    np.testing.assert_allclose(list(found.values()), expected, rtol=1e-6)
    once = np.concatenate([rows.ravel(), [0.2], np.ones(4)])
    assert float(alpha_statistics(alpha)["alpha_mean"]) == pytest.approx(once.mean())
