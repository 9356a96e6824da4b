"""Every estimator against hypergradients that are known without it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import AgwmError, LowRank, Problem, gate, hypergrad, hypergradient, inner_steps, linear_solve
from tests.core.problems import (
    ALL,
    NO_BATCH,
    TRANSFORMS,
    central_difference,
    conjugate_gradient,
    darts_toy,
    dense,
    diagonal_quadratic,
    estimate_at,
    estimates_at,
    logistic,
    mixed_linear,
    network,
    neumann,
    random_gate,
    ridge,
    warm_state,
)


@pytest.mark.parametrize("xi", [0.0, 0.125, 0.25, 0.5])
def test_toy_after_one_inner_step(xi):
    start = jnp.float32(-2), jnp.float32(2)
    for estimator, expected, exact in (
        (hypergrad.first_order(), -4 + 8 * xi, True),  # powers of two round nothing
        (hypergrad.unrolled(), -4 + 12 * xi, True),
        (hypergrad.unrolled(hvp="jvp"), -4 + 12 * xi, True),
        (hypergrad.unrolled(hvp="finite_difference"), -4 + 12 * xi, False),
        (hypergrad.finite_difference(precondition="adjoint"), -4 + 12 * xi, False),
        (hypergrad.finite_difference(step_size=xi or 1.0), -4 + 8 * xi + 4 * (xi or 1.0), False),
    ):
        estimate = estimate_at(darts_toy(), estimator, *start, tx=optax.sgd(xi))
        assert float(estimate.hypergradient) == pytest.approx(expected, abs=0 if exact else 1e-4)
        assert float(estimate.inner.params) == -2 + 8 * xi
        assert float(estimate.info["inner_loss"]) == 16
        assert float(estimate.info["outer_loss"]) == 2 * (-2 + 8 * xi) - 3


def test_toy_at_the_inner_optimum():
    two = jnp.float32(2)
    assert float(estimate_at(darts_toy(), hypergrad.first_order(), two, two).hypergradient) == 0
    for num_terms, expected in ((1, 1.0), (2, 1.5), (3, 1.75)):
        estimate = estimate_at(darts_toy(), neumann(num_terms, 0.25), two, two)
        assert float(estimate.hypergradient) == expected
        assert float(estimate.info["residual"]) == 0.5**num_terms
    for estimator in (dense(), conjugate_gradient(1)):
        exact = estimate_at(darts_toy(), estimator, two, two)
        assert (float(exact.hypergradient), float(exact.info["residual"])) == (2, 0)
    # The terms of that series, one an outer step; H + rho in the place of H; and one term by a difference along v.
    single_loop = hypergrad.implicit(linear_solve.gradient_descent(step_size=0.25))
    found = [float(e.hypergradient) for e in estimates_at(darts_toy(), single_loop, two, two, calls=3)]
    assert found == [1.0, 1.5, 1.75]
    sketched = hypergrad.implicit(linear_solve.nystrom(rank=1, rho=2.0))
    assert float(estimate_at(darts_toy(), sketched, two, two).hypergradient) == pytest.approx(1.0)
    along_v = hypergrad.finite_difference(step_size=0.25)
    assert float(estimate_at(darts_toy(), along_v, two, two).hypergradient) == pytest.approx(1.0)


def solve_with(matrix):
    return lambda h, v: np.linalg.solve(matrix(h), v)


def series(step_size, num_terms):
    def x(h, v):
        return sum(
            np.linalg.matrix_power(np.eye(len(h)) - step_size * h, k) @ (step_size * v) for k in range(num_terms)
        )

    return x


def steepest_descent(h, v):
    """One step of conjugate gradients."""
    return (v @ v) / (v @ h @ v) * v


SOLVED = {
    "dense": (linear_solve.dense(), solve_with(lambda h: h)),
    "conjugate_gradient": (linear_solve.conjugate_gradient(num_steps=4), solve_with(lambda h: h)),
    "conjugate_gradient, 1 step": (linear_solve.conjugate_gradient(num_steps=1), steepest_descent),
    "conjugate_gradient, damped": (
        linear_solve.conjugate_gradient(num_steps=4, damping=0.7),
        solve_with(lambda h: h + 0.7 * np.eye(len(h))),
    ),
    "nystrom": (linear_solve.nystrom(rank=4, rho=0.7), solve_with(lambda h: h + 0.7 * np.eye(len(h)))),
    "gradient_descent": (linear_solve.gradient_descent(num_steps=3, step_size=0.3), series(0.3, 3)),
    "neumann": (linear_solve.neumann(num_terms=3, step_size=0.3), series(0.3, 3)),
}


@pytest.mark.parametrize(("solver", "x"), SOLVED.values(), ids=SOLVED)
@pytest.mark.parametrize("hvp", ["linearize", "finite_difference"])
def test_ridge_with_each_solver_is_its_own_closed_form(x64, solver, x, hvp):
    """Away from the inner optimum too, and after a look-ahead: B, J and v are those of where it ends."""
    case, start = ridge(), np.arange(4.0)
    estimate = estimate_at(
        case.problem,
        hypergrad.implicit(solver, hvp=hvp),
        jnp.asarray(start),
        jnp.asarray(case.penalty),
        tx=optax.sgd(0.3),
        num_steps=2,
    )
    w = case.descend(start, 0.3, num_steps=2)
    v = case.outer_gradient(w)
    exact = hvp == "linearize"
    solution = x(case.hessian, v)
    np.testing.assert_allclose(estimate.inner.params, w, rtol=1e-12)
    np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(w, solution), rtol=1e-10 if exact else 1e-6)
    residual = np.linalg.norm(case.hessian @ solution - v) / np.linalg.norm(v)  # of B, not of what is damped
    np.testing.assert_allclose(estimate.info["residual"], residual, rtol=1e-6, atol=1e-10 if exact else 1e-6)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_ridge_in_a_single_loop(x64, num_steps):
    """T outer steps of n products each, at weights that stay: T n steps of gradient descent on the linear system."""
    case = ridge()
    estimator = hypergrad.implicit(linear_solve.gradient_descent(num_steps=num_steps, step_size=0.3))
    w = case.solution()
    estimates = estimates_at(case.problem, estimator, jnp.asarray(w), jnp.asarray(case.penalty), calls=10)
    for call, estimate in enumerate(estimates, start=1):
        x = series(0.3, call * num_steps)(case.hessian, case.outer_gradient(w))
        np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(w, x), rtol=1e-10)


@pytest.mark.parametrize("options", [{"num_steps": 1, "damping": 0.2}, {"num_steps": 2}])
def test_ridge_with_a_warm_start(x64, options):
    """The second solve gains on the first; without a warm start it repeats it."""
    case = ridge()
    w, penalty = jnp.asarray(case.solution()), jnp.asarray(case.penalty)
    system = case.hessian + options.get("damping", 0) * np.eye(4)
    exact = case.hypergradient(case.solution(), np.linalg.solve(system, case.outer_gradient(case.solution())))
    errors = {}
    for warm_start in (False, True):
        estimator = conjugate_gradient(**options, warm_start=warm_start)
        estimates = estimates_at(case.problem, estimator, w, penalty, calls=12)
        errors[warm_start] = [abs(float(e.hypergradient) - exact) for e in estimates]
    assert len(set(errors[False])) == 1
    assert errors[True][0] == pytest.approx(errors[False][0], rel=1e-9)
    assert errors[True][-1] < 1e-3 * errors[True][0]


def test_ridge_dense_is_the_closed_form(x64):
    case = ridge()
    for w in (case.solution(), np.arange(4.0)):  # the formula holds away from the optimum too
        estimate = estimate_at(case.problem, dense(), jnp.asarray(w), jnp.asarray(case.penalty))
        x = np.linalg.solve(case.hessian, case.outer_gradient(w))
        np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(w, x), rtol=1e-8)
        assert estimate.info["residual"] < 1e-12
    # The same from the solution's own derivative, dw/dlambda = -(X'X/n + lambda I)^-1 w.
    w = case.solution()
    response = -np.linalg.solve(case.hessian, w)
    total = 0.2 * case.penalty + case.outer_gradient(w) @ response
    estimate = estimate_at(case.problem, dense(), jnp.asarray(w), jnp.asarray(case.penalty))
    np.testing.assert_allclose(estimate.hypergradient, total, rtol=1e-8)


@pytest.mark.parametrize("num_terms", [1, 3, 1000])
def test_ridge_neumann_is_its_own_closed_form(x64, num_terms):
    case, eta = ridge(), 0.3
    w = case.solution()
    estimate = estimate_at(case.problem, neumann(num_terms, eta), jnp.asarray(w), jnp.asarray(case.penalty))
    v = case.outer_gradient(w)
    left_over = np.linalg.matrix_power(np.eye(4) - eta * case.hessian, num_terms) @ v
    x = np.linalg.solve(case.hessian, v - left_over)
    np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(w, x), rtol=1e-10)
    expected = np.linalg.norm(left_over) / np.linalg.norm(v)
    np.testing.assert_allclose(estimate.info["residual"], expected, rtol=1e-8, atol=1e-13)
    if num_terms == 1000:
        exact = case.hypergradient(w, np.linalg.solve(case.hessian, v))
        np.testing.assert_allclose(estimate.hypergradient, exact, rtol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 3, 1000])
def test_ridge_unrolled_is_its_own_closed_form(x64, num_steps):
    case, eta = ridge(), 0.3
    w, response = np.zeros(4), np.zeros(4)
    for _ in range(num_steps):
        w, response = w - eta * (case.hessian @ w - case.moment), response - eta * (case.hessian @ response + w)
    estimate = estimate_at(
        case.problem,
        hypergrad.unrolled(),
        jnp.zeros(4),
        jnp.asarray(case.penalty),
        tx=optax.sgd(eta),
        num_steps=num_steps,
    )
    np.testing.assert_allclose(estimate.inner.params, w, rtol=1e-10)
    np.testing.assert_allclose(
        estimate.hypergradient, 0.2 * case.penalty + case.outer_gradient(w) @ response, rtol=1e-10
    )
    if num_steps == 1000:
        exact = case.hypergradient(w, np.linalg.solve(case.hessian, case.outer_gradient(w)))
        np.testing.assert_allclose(estimate.hypergradient, exact, rtol=1e-8)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("hvp", ["linearize", "jvp", "finite_difference"])
def test_diagonal_quadratic(x64, count, hvp):
    case, eta = diagonal_quadratic(), 0.4
    w, o = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 0.0, -1.0])
    # dw_T/do = I - (I - eta H)^T; and K Neumann terms give H eta sum_{k<K} (I - eta H)^k v, which is the same.
    expected = (1 - (1 - eta * case.h) ** count) * case.v
    tolerance = 1e-6 if hvp == "finite_difference" else 1e-12
    unrolled = hypergrad.unrolled(hvp=hvp)
    estimate = estimate_at(case.problem, unrolled, w, o, tx=optax.sgd(eta), num_steps=count)
    np.testing.assert_allclose(estimate.hypergradient, expected, rtol=tolerance)
    # Truncated: of 12 steps only the last are differentiated.
    truncated = hypergrad.unrolled(num_steps=count, hvp=hvp)
    longer = estimate_at(case.problem, truncated, w, o, tx=optax.sgd(eta), num_steps=12)
    np.testing.assert_allclose(longer.hypergradient, expected, rtol=tolerance)
    np.testing.assert_allclose(longer.inner.params, o + (1 - eta * case.h) ** 12 * (w - o), rtol=1e-12)
    # A Neumann series, and its terms split over outer steps of a single loop.
    terms = hypergrad.implicit(linear_solve.neumann(num_terms=count, step_size=eta), hvp=hvp)
    np.testing.assert_allclose(estimate_at(case.problem, terms, w, o).hypergradient, expected, rtol=tolerance)
    loop = hypergrad.implicit(linear_solve.gradient_descent(num_steps=count, step_size=eta), hvp=hvp)
    first, second = estimates_at(case.problem, loop, w, o, calls=2)
    np.testing.assert_allclose(first.hypergradient, expected, rtol=tolerance)
    twice = (1 - (1 - eta * case.h) ** (2 * count)) * case.v
    np.testing.assert_allclose(second.hypergradient, twice, rtol=tolerance)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_neumann_equals_truncated_unrolling_at_the_optimum(x64, count):
    problem, log_penalty, optimum = logistic()[:3]
    w, o = jnp.asarray(optimum), jnp.asarray(log_penalty)
    series = estimate_at(problem, neumann(count, 0.3), w, o)
    reverse = estimate_at(problem, hypergrad.unrolled(num_steps=count), w, o, tx=optax.sgd(0.3), num_steps=12)
    np.testing.assert_allclose(reverse.inner.params, optimum, rtol=1e-12)
    np.testing.assert_allclose(series.hypergradient, reverse.hypergradient, rtol=1e-12)


def test_neumann_differs_from_unrolling_away_from_the_optimum(x64):
    problem, log_penalty, optimum = logistic()[:3]
    w, o = jnp.asarray(optimum), jnp.asarray(log_penalty)
    away = [
        estimate_at(problem, neumann(2, 0.3), w + 1, o),
        estimate_at(problem, hypergrad.unrolled(), w + 1, o, tx=optax.sgd(0.3), num_steps=2),
    ]
    assert not np.allclose(*(estimate.hypergradient for estimate in away), rtol=1e-2)


def at_the_optimum(case, alpha, estimator, **kwargs):
    """The hypergradient of weight mixup where the inner problem is solved."""
    a = np.asarray(gate(jax.tree.map(jnp.asarray, alpha)))
    batches = jax.tree.map(lambda x: jnp.asarray(x)[None], case.train)
    calls = kwargs.pop("calls", 1)
    if num_steps := kwargs.pop("num_steps", None):
        batches = jax.tree.map(lambda x: jnp.repeat(x, num_steps, axis=0), batches)
        start = case.pretrained
    else:
        start = case.solve(a)
    (*_, estimate) = estimates_at(
        case.problem,
        estimator,
        {"w": jnp.asarray(start)},
        {"w": jax.tree.map(jnp.asarray, alpha)},
        inner_batches=batches,
        outer_batch=jax.tree.map(jnp.asarray, case.validation),
        calls=calls,
        **kwargs,
    )
    return np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.hypergradient)])


@pytest.mark.parametrize("rank", [1, 2, "full"])
def test_null_case_of_weight_mixup(x64, rank):
    """Without an anchor W can undo alpha: the exact hypergradient vanishes, whatever the direct term says."""
    case, alpha = mixed_linear(anchor=0.0), random_gate(rank)
    direct = at_the_optimum(case, alpha, hypergrad.first_order())
    assert np.linalg.norm(direct) > 0.1
    exact = hypergrad.implicit(linear_solve.dense(), curvature="gauss_newton")  # the model is linear
    for estimator in (dense(), exact, conjugate_gradient(20)):
        assert np.abs(at_the_optimum(case, alpha, estimator)).max() < 1e-12
    counts = (50, 100, 150, 200)
    norms = [np.linalg.norm(at_the_optimum(case, alpha, neumann(k, 0.5))) for k in counts]
    ratios = np.divide(norms[1:], norms[:-1])
    assert np.all(ratios < 0.5)
    np.testing.assert_allclose(ratios[-1], ratios[-2], rtol=0.05)  # geometric: one rate


@pytest.mark.parametrize("rank", [1, "full"])
def test_with_an_anchor_all_agree_with_the_solved_problem(x64, rank):
    case, alpha = mixed_linear(anchor=0.1), random_gate(rank)
    if rank == "full":
        expected = central_difference(case.solved_outer_loss, alpha).ravel()
    else:
        left = central_difference(lambda x: case.solved_outer_loss(x @ alpha.right), alpha.left)
        right = central_difference(lambda x: case.solved_outer_loss(alpha.left @ x), alpha.right)
        expected = np.concatenate([left.ravel(), right.ravel()])
    assert np.linalg.norm(expected) > 1e-2
    cg = linear_solve.conjugate_gradient(num_steps=8)
    for estimator, kwargs, tolerance in (
        (dense(), {}, 1e-6),
        (neumann(400, 0.5), {}, 1e-6),
        (hypergrad.unrolled(), {"tx": optax.sgd(0.5), "num_steps": 400}, 1e-6),
        (hypergrad.implicit(cg), {}, 1e-6),
        (hypergrad.implicit(cg, curvature="gauss_newton"), {}, 1e-6),
        (hypergrad.implicit(cg, hvp="finite_difference", curvature="gauss_newton"), {}, 1e-4),
        (conjugate_gradient(2, warm_start=True), {"calls": 40}, 1e-6),
        (hypergrad.implicit(linear_solve.gradient_descent(num_steps=4, step_size=0.5)), {"calls": 100}, 1e-6),
        (hypergrad.implicit(linear_solve.nystrom(rank=8, rho=1e-6)), {}, 1e-3),
        (hypergrad.penalty(weight=1e4), {"tx": optax.sgd(0.5), "num_steps": 1000}, 1e-2),
    ):
        found = at_the_optimum(case, alpha, estimator, **kwargs)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    one_term = at_the_optimum(case, alpha, neumann(1, 0.5))
    assert not np.allclose(one_term, expected, rtol=1e-2)


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_unrolled_differentiates_the_optimiser_itself(x64, tx):
    """From a warm state, reverse mode equals finite differences of the whole step."""
    problem, log_penalty = logistic()[:2]
    warm = warm_state(problem, tx, log_penalty)
    whole = jax.jit(
        lambda o: problem.outer_loss(inner_steps(problem.inner_loss, tx, warm, o, jnp.zeros(2))[0].params, o, None)
    )
    expected = central_difference(lambda o: float(whole(jnp.asarray(o))), log_penalty)
    for hvp in ("linearize", "jvp"):
        estimator = hypergrad.unrolled(hvp=hvp)
        estimate = estimate_at(problem, estimator, warm, jnp.asarray(log_penalty), tx=tx, num_steps=2)
        np.testing.assert_allclose(estimate.hypergradient, expected, rtol=1e-6)
    direct = jax.grad(problem.outer_loss, argnums=1)(estimate.inner.params, jnp.asarray(log_penalty), None)
    assert not np.allclose(direct, expected, rtol=1e-3)


@pytest.mark.parametrize(
    "estimator",
    [
        hypergrad.unrolled(),
        hypergrad.unrolled(hvp="finite_difference"),
        hypergrad.finite_difference(precondition="adjoint"),
    ],
    ids=["unrolled", "unrolled_finite_difference", "finite_difference"],
)
@pytest.mark.parametrize("make", [optax.adam, optax.adamw, optax.amsgrad, optax.nadam])
def test_the_first_step_of_an_adam_has_derivative_zero(estimator, make):
    """From a zero state it is sign(g): only the direct term is left, also where g is exactly 0."""
    problem = Problem(lambda w, o, _: jnp.sum(o * w), lambda w, o, _: jnp.sum(w**2) + 3 * o[0] + o[1])
    w, o = jnp.ones(3), jnp.array([0.5, 0.0, -2.0])
    estimate = estimate_at(problem, estimator, w, o, tx=make(0.1))
    np.testing.assert_allclose(estimate.hypergradient, [3, 1, 0], atol=1e-5)
    assert float(estimate.info["hypergradient_norm"]) == pytest.approx(np.sqrt(10), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["unrolled", "finite_difference preconditioned", "implicit conjugate_gradient", "implicit neumann"]
)
def test_a_hypergradient_that_is_not_finite_shows_in_the_norm(name):
    problem = Problem(lambda w, o, _: jnp.sum(jnp.sqrt(o) * w**2), lambda w, o, _: jnp.sum(w))
    w, o = jnp.ones(2), jnp.array([1.0, -1.0])
    estimate = estimate_at(problem, ALL[name], w, o, tx=optax.adam(0.1), num_steps=2)
    assert not jnp.isfinite(estimate.info["hypergradient_norm"])


def test_implicit_uses_the_last_inner_batch():
    scale = jnp.array([5.0, 2.0])  # the Hessian of each batch
    problem = Problem(lambda w, o, h: 0.5 * h * (w - o) ** 2, lambda w, o, _: 3 * w)
    estimate = estimate_at(
        problem, neumann(1, 0.25), jnp.float32(1), jnp.float32(0), tx=optax.sgd(0.1), inner_batches=scale
    )
    assert float(estimate.hypergradient) == pytest.approx(2 * 0.25 * 3)  # -J x with J = -h
    assert float(estimate.inner.params) == pytest.approx(0.5 * 0.8)
    assert float(estimate.info["inner_loss"]) == pytest.approx((2.5 + 0.25) / 2)


def test_the_outer_loss_sees_its_own_batch_only():
    problem = Problem(lambda w, o, b: (w - o * b) ** 2, lambda w, o, b: w * o * b)
    # J = -2 on an inner batch of 1, and v = 30: the series adds 2 * 0.5 * 30; unrolled through no update nothing.
    for estimator, response in ((hypergrad.first_order(), 0), (hypergrad.unrolled(), 0), (neumann(1, 0.5), 30)):
        batches = {"inner_batches": jnp.ones(1), "outer_batch": jnp.float32(10)}
        two, three = jnp.float32(2), jnp.float32(3)
        estimate = estimate_at(problem, estimator, two, three, tx=optax.set_to_zero(), **batches)
        assert float(estimate.info["outer_loss"]) == 60
        assert float(estimate.hypergradient) == pytest.approx(20 + response)


@pytest.mark.parametrize(
    "name",
    [
        *("unrolled", "unrolled finite_difference", "finite_difference", "penalty"),
        *("neumann", "neumann resample", "conjugate_gradient warm", "implicit dense"),
    ],
)
def test_products_see_the_dropout_mask_of_the_gradient(name):
    """A key in the batch gives the hypergradient of the very network that its mask leaves."""
    net = network()
    batch, outer_batch = net.batches(1), net.batches(2)
    known = {"x": batch["x"], "y": batch["y"], "keep": net.mask(batch)}
    alpha = {path: random_low_rank(w.shape) for path, w in net.partition.frozen.items()}
    moved = {path: w + 0.1 for path, w in net.partition.task.items()}
    drawn, given = (
        estimate_at(
            net.problem(net.params),
            ALL[name],
            moved,
            alpha,
            tx=optax.sgd(0.5),
            inner_batches=jax.tree.map(lambda x: x[None], inner_batch),
            outer_batch=outer_batch,
        ).hypergradient
        for inner_batch in (batch, known)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), drawn, given)


def random_low_rank(shape):
    alpha = random_gate(1, shape)
    return LowRank(jnp.asarray(alpha.left, jnp.float32), jnp.asarray(alpha.right, jnp.float32))


def test_residual_of_a_vanished_outer_gradient_is_finite():
    problem = Problem(lambda w, o, _: (w - o) ** 2, lambda w, o, _: o**2 + 0 * w)
    estimate = estimate_at(problem, neumann(2, 0.1), jnp.float32(1), jnp.float32(3))
    assert float(estimate.hypergradient) == 6
    assert jnp.isfinite(estimate.info["residual"])


@pytest.mark.parametrize("name", ALL)
def test_an_estimate_leaves_its_inputs_as_they_are(name):
    case = ridge(d=5)
    w, penalty = jnp.asarray(case.solution(), jnp.float32), jnp.float32(case.penalty)
    before = np.array(w), np.array(penalty)
    estimate = estimate_at(case.problem, ALL[name], w, penalty, tx=optax.set_to_zero())
    for value, was in zip((w, penalty, estimate.inner.params), (*before, before[0]), strict=True):
        np.testing.assert_array_equal(value, was)
    assert estimate.inner.opt_state == optax.set_to_zero().init(w)


def needs_steps(name):
    return name.startswith(("unrolled", "forward_mode", "penalty")) or name.endswith("preconditioned")


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_at_a_solution_from_elsewhere(x64, name):
    """Ridge solved by NumPy: what an estimator finds there is what it finds after steps that do not move."""
    case = ridge(d=5)
    w, penalty = jnp.asarray(case.solution()), jnp.asarray(case.penalty)
    if needs_steps(name):
        with pytest.raises(AgwmError, match=r"needs the steps of an inner optimiser, .* pass inner_tx"):
            estimate_at(case.problem, ALL[name], w, penalty)
        return
    solved = estimate_at(case.problem, ALL[name], w, penalty)
    stayed = estimate_at(case.problem, ALL[name], w, penalty, tx=optax.set_to_zero())
    np.testing.assert_allclose(solved.hypergradient, stayed.hypergradient, rtol=1e-12)
    np.testing.assert_array_equal(solved.inner.params, w)
    assert solved.inner.opt_state == ()
    assert float(solved.info["inner_loss"]) == pytest.approx(float(case.problem.inner_loss(w, penalty, None)))
    if name in ("implicit dense", "implicit conjugate_gradient"):
        np.testing.assert_allclose(solved.hypergradient, case.exact(case.solution()), rtol=1e-8)


def test_a_state_of_the_estimator_goes_on_from_call_to_call(x64):
    """One product a call, at a solution that stays: gradient descent on the linear system."""
    case = ridge()
    single_loop = hypergrad.implicit(linear_solve.gradient_descent(step_size=0.3))
    state = None
    for count in (1, 2, 3):
        estimate = hypergradient(
            case.problem,
            single_loop,
            jnp.asarray(case.solution()),
            jnp.asarray(case.penalty),
            jnp.zeros(1),
            NO_BATCH,
            state=state,
        )
        state = estimate.state
        x = series(0.3, count)(case.hessian, case.outer_gradient(case.solution()))
        np.testing.assert_allclose(estimate.hypergradient, case.hypergradient(case.solution(), x), rtol=1e-10)


@pytest.mark.parametrize("tx", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_an_outer_variable_where_the_inner_steps_start(x64, tx):
    """MAML as the docstring of `hypergradient` says it, against reverse mode through the inner steps."""
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(4, 6, 3))), jnp.asarray(rng.normal(size=(4, 6)))
    theta = jnp.asarray(rng.normal(size=3))

    def loss(w, batch):
        return jnp.mean(jnp.tanh(batch[0] @ w - batch[1]) ** 2)

    def after_steps(theta):
        w, opt_state = theta, tx.init(theta)
        for i in range(3):
            updates, opt_state = tx.update(jax.grad(loss)(w, (x[i], y[i])), opt_state)
            w = w + updates
        return loss(w, (x[3], y[3]))

    problem = Problem(*[lambda change, theta, batch: loss(theta + change, batch)] * 2)
    estimate = hypergradient(
        problem, hypergrad.unrolled(), jnp.zeros(3), theta, (x[:3], y[:3]), (x[3], y[3]), inner_tx=tx
    )
    np.testing.assert_allclose(estimate.hypergradient, jax.grad(after_steps)(theta), rtol=1e-9)
