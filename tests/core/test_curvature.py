"""Products with second derivatives against NumPy, and what Gauss-Newton curvature is for: saddles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import Composite, Problem, hypergrad, linear_solve, mixup_problem, partition
from agwm_jax.core import curvature
from tests.core.problems import (
    NO_BATCH,
    conjugate_gradient,
    dense,
    diagonal_quadratic,
    estimate_at,
    estimates_at,
    logistic,
    mixed_linear,
    neumann,
    random_gate,
    ridge,
    tanh_regression,
)

HVPS = {"linearize": 1e-10, "jvp": 1e-10, "finite_difference": 1e-6, "reverse": 1e-10}
"""The ways of taking products, and how near to the true one they are in float64."""


def written_out(product, n):
    """The matrix of a product, a column at a time."""
    return np.stack([product(column) for column in jnp.eye(n)], axis=1)


@pytest.mark.parametrize(("hvp", "tolerance"), HVPS.items(), ids=HVPS)
def test_products_are_those_of_numpy(x64, hvp, tolerance):
    case = tanh_regression()
    loss, w, o, d = case.problem.inner_loss, jnp.asarray(case.w), jnp.asarray(case.penalty), len(case.w)
    value, grad, rest = curvature.linearize(loss, w, o, NO_BATCH, hvp)
    z = np.tanh(case.x @ case.w)
    expected = 0.5 * np.mean((z - case.y) ** 2) + 0.5 * case.penalty * case.w @ case.w
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    slope = case.x.T @ ((z - case.y) * (1 - z**2)) / len(z) + case.penalty * case.w
    np.testing.assert_allclose(grad, slope, rtol=1e-12)

    product = jax.jit(lambda p: curvature.product(loss, w, o, NO_BATCH, rest, p, hvp))
    size = np.abs(case.hessian()).max()
    hessian = written_out(lambda p: product(p)[0], d)
    np.testing.assert_allclose(hessian, case.hessian(), rtol=tolerance, atol=size * tolerance)
    # J is d_o (d_w f) = w. Products are linear in p, of whatever length it is.
    for scale in (1e-6, 1.0, 1e6):
        p = scale * jnp.arange(1.0, d + 1)
        np.testing.assert_allclose(product(p)[1], case.w @ p, rtol=10 * tolerance)
    np.testing.assert_allclose(product(jnp.zeros(d))[0], np.zeros(d), atol=1e-7)  # not 0 / 0

    if hvp == "reverse":  # nothing to transpose in what follows
        return
    matvec = jax.jit(curvature.gauss_newton(loss, w, o, NO_BATCH, hvp))
    gauss_newton = written_out(matvec, d)
    np.testing.assert_allclose(gauss_newton, case.gauss_newton(), rtol=tolerance, atol=size * tolerance)
    assert np.linalg.eigvalsh(case.hessian())[0] < -0.01  # else the two do not differ much
    assert np.linalg.eigvalsh(case.gauss_newton())[0] > 0.01


@pytest.mark.parametrize(("hvp", "tolerance"), HVPS.items(), ids=HVPS)
@pytest.mark.parametrize("case", [diagonal_quadratic(), ridge()], ids=["diagonal", "ridge"])
def test_products_of_quadratics_are_exact_to_rounding(x64, hvp, tolerance, case):
    if hasattr(case, "moment"):
        w, o, hessian = jnp.asarray(case.solution()), jnp.asarray(case.penalty), case.hessian
    else:
        w, o, hessian = jnp.ones(3), jnp.zeros(3), np.diag(case.h)
    _, _, rest = curvature.linearize(case.problem.inner_loss, w, o, NO_BATCH, hvp)
    product = jax.jit(lambda p: curvature.product(case.problem.inner_loss, w, o, NO_BATCH, rest, p, hvp)[0])
    np.testing.assert_allclose(written_out(product, len(w)), hessian, rtol=tolerance, atol=1e-8)


WAYS = {
    "neumann": lambda hvp: hypergrad.implicit(linear_solve.neumann(num_terms=3, step_size=0.3), hvp=hvp),
    "conjugate_gradient": lambda hvp: hypergrad.implicit(
        linear_solve.conjugate_gradient(num_steps=2, damping=0.1),
        hvp="jvp" if hvp == "reverse" else hvp,
        curvature="gauss_newton",
    ),
    "nystrom": lambda hvp: hypergrad.implicit(linear_solve.nystrom(rank=2, rho=0.3), hvp=hvp),
    "unrolled": lambda hvp: hypergrad.unrolled(hvp=hvp),
    "unrolled_last": lambda hvp: hypergrad.unrolled(num_steps=1, hvp=hvp),
}


@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_all_ways_agree_in_every_estimator(x64, make):
    case, tx = logistic(), optax.sgd(0.3, momentum=0.9)
    w, o = (
        jnp.asarray(case.optimum) + 1,
        jnp.asarray(case.log_penalty),
    )  # away from the optimum, where f is no quadratic
    reference, *others = (estimate_at(case.problem, make(hvp), w, o, tx=tx, num_steps=3) for hvp in HVPS)
    for estimate, tolerance in zip(others, list(HVPS.values())[1:], strict=True):
        np.testing.assert_allclose(estimate.hypergradient, reference.hypergradient, rtol=10 * tolerance)
        for name, value in reference.info.items():
            np.testing.assert_allclose(estimate.info[name], value, rtol=10 * tolerance, err_msg=name)


@pytest.mark.parametrize("hvp", [hvp for hvp in HVPS if hvp != "reverse"])
def test_gauss_newton_of_a_linear_model_is_the_hessian(x64, hvp):
    case, smooth = ridge(), logistic()
    for problem, w, o, exact in (
        (case.problem, case.solution(), case.penalty, case.exact(case.solution())),
        (smooth.problem, smooth.optimum, smooth.log_penalty, smooth.hypergradient),
    ):
        estimator = hypergrad.implicit(linear_solve.dense(), hvp=hvp, curvature="gauss_newton")
        estimate = estimate_at(problem, estimator, jnp.asarray(w), jnp.asarray(o))
        np.testing.assert_allclose(estimate.hypergradient, exact, rtol=10 * HVPS[hvp])


@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_a_composite_loss_makes_a_composite_problem(x64, anchor):
    case, alpha = mixed_linear(anchor), {"w": jax.tree.map(jnp.asarray, random_gate(1))}
    frozen, task = {"w": jnp.asarray(case.pretrained)}, {"w": jnp.asarray(case.pretrained) + 0.3}
    batch = jax.tree.map(jnp.asarray, case.train)
    loss = Composite(lambda p, b: jnp.tanh(b[0] @ p["w"]), lambda z, b: jnp.mean((z - b[1]) ** 2))
    parts = partition(frozen, mixed="w")
    composite = mixup_problem(loss, parts, anchor=anchor)
    plain = mixup_problem(lambda p, b: loss(p, b), parts, anchor=anchor)
    assert isinstance(composite.inner_loss, Composite)
    assert not isinstance(plain.inner_loss, Composite)
    for a, b in zip(composite, plain, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15),
            jax.value_and_grad(a, argnums=(0, 1))(task, alpha, batch),
            jax.value_and_grad(b, argnums=(0, 1))(task, alpha, batch),
        )
    # The anchor's curvature is part of B: it is what bounds the Gauss-Newton matrix from below.
    matvec = curvature.gauss_newton(composite.inner_loss, task, alpha, batch, "linearize")
    matrix = written_out(lambda p: matvec({"w": p.reshape(4, 2)})["w"].ravel(), 8)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    without = curvature.gauss_newton(mixup_problem(loss, parts).inner_loss, task, alpha, batch, "jvp")
    bare = written_out(lambda p: without({"w": p.reshape(4, 2)})["w"].ravel(), 8)
    np.testing.assert_allclose(matrix - bare, anchor * np.eye(8), atol=1e-12)


def saddle(estimator, *, calls=1):
    case = tanh_regression()
    v = case.w - 1  # of g = |w - 1|^2 / 2
    (*_, estimate) = estimates_at(case.problem, estimator, jnp.asarray(case.w), jnp.asarray(case.penalty), calls=calls)
    return case, v, estimate


@pytest.mark.parametrize("num_steps", [1, 2, 10, 300])
def test_conjugate_gradients_on_a_saddle(num_steps):
    """In float32, as users run it: whatever comes out is finite, and the residual says how good it is."""
    case, v, estimate = saddle(conjugate_gradient(num_steps, warm_start=True))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(estimate))
    x = np.asarray(estimate.state)  # where a warm start carries the solution
    residual = np.linalg.norm(case.hessian() @ x - v) / np.linalg.norm(v)
    assert float(estimate.info["residual"]) == pytest.approx(residual, rel=1e-2, abs=1e-4)
    assert num_steps > 2 or residual > 0.9  # worse than nothing, or hardly better


def test_conjugate_gradients_break_down_without_a_trace():
    """p' B p = 0 at the first step: x stays 0, and the residual of 1 says so."""
    hessian, v = jnp.array([1.0, -1.0]), jnp.array([1.0, 1.0])
    problem = Problem(lambda w, o, _: 0.5 * jnp.sum(hessian * (w - o) ** 2), lambda w, o, _: jnp.sum(v * w))
    for num_steps in (1, 10, 300):
        estimate = estimate_at(problem, conjugate_gradient(num_steps), jnp.zeros(2), jnp.zeros(2))
        np.testing.assert_array_equal(estimate.hypergradient, [0, 0])
        assert float(estimate.info["residual"]) == pytest.approx(1)


@pytest.mark.parametrize("num_terms", [1, 10, 300])
def test_neumann_on_a_saddle(num_terms):
    case, v, estimate = saddle(neumann(num_terms, 1.0))
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves(estimate))
    # What is left over is (I - eta H)^K v: along the negative curvature it grows.
    left_over = np.linalg.matrix_power(np.eye(len(v)) - case.hessian(), num_terms) @ v
    residual = np.linalg.norm(left_over) / np.linalg.norm(v)
    if residual < 1e18:  # beyond, its square is too large for a float32
        assert float(estimate.info["residual"]) == pytest.approx(residual, rel=1e-2)
    assert num_terms < 300 or estimate.info["residual"] > 1


@pytest.mark.parametrize(
    "solver",
    [
        linear_solve.conjugate_gradient(num_steps=5),
        linear_solve.conjugate_gradient(num_steps=2, warm_start=True),
        linear_solve.neumann(num_terms=2000, step_size="auto"),
        linear_solve.gradient_descent(num_steps=40, step_size=1.0),
        linear_solve.nystrom(rank=5, rho=3e-8),
        linear_solve.dense(),
    ],
    ids=["conjugate_gradient", "conjugate_gradient_warm", "neumann", "gradient_descent", "nystrom", "dense"],
)
def test_gauss_newton_converges_on_a_saddle(x64, solver):
    case, v, estimate = saddle(hypergrad.implicit(solver, curvature="gauss_newton"), calls=40)
    assert estimate.info["residual"] < 1e-6
    # J is that of the true loss, w, and the direct term is 0.
    expected = -case.w @ np.linalg.solve(case.gauss_newton(), v)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-5)
    assert not np.allclose(expected, -case.w @ np.linalg.solve(case.hessian(), v), rtol=0.1)


def test_a_series_diverges_on_the_hessian_of_that_saddle(x64):
    assert saddle(neumann(2000, 1.0))[2].info["residual"] > 1
    exact = saddle(dense())[2]  # indefinite, but not singular
    assert exact.info["residual"] < 1e-10


def test_resampling_takes_the_batches_in_turn(x64):
    """f = h_b (w - o)^2 / 2: each product has the Hessian of its own batch, J and the residual that of the last."""
    h = np.array([0.5, 2.0, 1.0])
    problem = Problem(
        Composite(lambda w, o, b: jnp.sqrt(b) * (w - o), lambda z, b: 0.5 * jnp.sum(z**2)), lambda w, o, _: 3 * w
    )
    x = 0.3 * 3
    for b in (*h, h[0]):
        x = x + 0.3 * (3 - b * x)
    for hvp, kind in (("jvp", "hessian"), ("finite_difference", "hessian"), ("jvp", "gauss_newton")):
        estimator = hypergrad.implicit(
            linear_solve.neumann(num_terms=5, step_size=0.3), hvp=hvp, curvature=kind, resample=True
        )
        one = jnp.ones(())
        estimate = estimate_at(problem, estimator, one, 0 * one, inner_batches=jnp.asarray(h))
        np.testing.assert_allclose(estimate.hypergradient, h[-1] * x, rtol=1e-6)
        np.testing.assert_allclose(estimate.info["residual"], abs(h[-1] * x - 3) / 3, rtol=1e-6)
