"""The solvers of B x = b against closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import agwm_jax
from agwm_jax.linear_solve import conjugate_gradient, dense, gradient_descent, neumann, nystrom
from tests.core.problems import registered

H = np.array([0.2, 1.0, 3.0])
B = np.array([1.0, -2.0, 0.5])
ETA = 0.4  # 1 - 0.4 * 3 < 0: a sign error shows

SOLVERS = {
    **registered(agwm_jax.SOLVERS),
    "neumann given": neumann(num_terms=3, step_size=0.1),
    "gradient_descent given": gradient_descent(num_steps=3, step_size=0.1),
    "conjugate_gradient damped": conjugate_gradient(num_steps=3, damping=0.1),
    "conjugate_gradient warm": conjugate_gradient(num_steps=3, warm_start=True),
}


def solve(solver, matrix, b, state=None):
    """With a dense matrix, or with the diagonal of one."""
    matrix, b = jnp.asarray(matrix), jnp.asarray(b)
    state = solver.init(b) if state is None else state
    return solver.solve(lambda p, i: matrix * p if matrix.ndim == 1 else matrix @ p, b, state)


def definite(n, seed=0):
    half = np.random.default_rng(seed).normal(size=(n, n))
    return half @ half.T / n + 0.1 * np.eye(n), np.random.default_rng(seed + 1).normal(size=n)


@pytest.mark.parametrize("num_terms", [1, 2, 3, 10])
def test_neumann_has_exactly_k_terms(x64, num_terms):
    expected = sum((1 - ETA * H) ** k * ETA * B for k in range(num_terms))
    x = solve(neumann(num_terms=num_terms, step_size=ETA), H, B).x
    np.testing.assert_allclose(x, expected, rtol=1e-13)


def products(solver):
    """Which products a solve takes, in order."""
    taken, b = [], jnp.ones(3)

    def matvec(p, i):
        taken.append(int(i))
        return jnp.asarray(H) * p

    with jax.disable_jit():
        solver.solve(matvec, b, solver.init(b))
    return taken


def test_number_of_products():
    assert products(neumann(num_terms=5, step_size=0.1)) == [0, 1, 2, 3]
    assert products(neumann(num_terms=2, step_size="auto", power_iterations=4)) == [0, 1, 2, 3, 0]
    assert products(gradient_descent(num_steps=2, step_size=0.1)) == [0, 1]
    assert products(conjugate_gradient(num_steps=2)) == [0, 1]
    assert products(conjugate_gradient(num_steps=2, warm_start=True)) == [0, 0, 1]
    assert products(nystrom(rank=3, rho=1.0)) == [0, 1, 2]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_gradient_descent_goes_on_from_where_it_was(x64, num_steps):
    solver = gradient_descent(num_steps=num_steps, step_size=ETA)
    state, expected = None, np.zeros(3)
    for call, b in enumerate((B, B, B[::-1].copy()), start=1):
        x, state, info = solve(solver, H, b, state)
        for _ in range(num_steps):
            expected = expected + ETA * (b - H * expected)
        np.testing.assert_allclose(x, expected, rtol=1e-12)
        assert info == {}
        if call == 2:  # two calls from zero are one of twice the steps
            series = sum((1 - ETA * H) ** k * ETA * B for k in range(2 * num_steps))
            np.testing.assert_allclose(x, series, rtol=1e-12)


def krylov_solution(matrix, b, num_steps, start=0.0):
    """What conjugate gradients find: the energy's minimum over start + span{r, B r, ..}, by Galerkin's condition."""
    r = b - matrix @ (start + np.zeros_like(b))
    basis = np.zeros((len(b), 0))
    for _ in range(min(num_steps, len(b))):
        r -= basis @ (basis.T @ r)
        r -= basis @ (basis.T @ r)  # twice is enough
        basis = np.column_stack([basis, r / np.linalg.norm(r)])
        r = matrix @ basis[:, -1]
    change = np.linalg.solve(basis.T @ matrix @ basis, basis.T @ (b - matrix @ (start + np.zeros_like(b))))
    return start + basis @ change


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_conjugate_gradient_is_the_best_of_its_krylov_space(x64, num_steps, damping):
    matrix, b = definite(12)
    damped = matrix + damping * np.eye(12)
    solver = conjugate_gradient(num_steps=num_steps, damping=damping)
    solution, expected = solve(solver, matrix, b), krylov_solution(damped, b, num_steps)
    np.testing.assert_allclose(solution.x, expected, rtol=1e-8)
    residual = np.linalg.norm(damped @ expected - b) / np.linalg.norm(b)
    assert solution.info == (pytest.approx({"damped_residual": residual}) if damping else {})
    diagonal = solve(solver, H, B).x
    np.testing.assert_allclose(diagonal, krylov_solution(np.diag(H + damping), B, num_steps), rtol=1e-10)
    if num_steps >= 3:
        np.testing.assert_allclose(diagonal, B / (H + damping), rtol=1e-8)


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_conjugate_gradient_starts_warm(x64, num_steps):
    matrix, b = definite(6)
    damped = matrix + 0.2 * np.eye(6)
    solver = conjugate_gradient(num_steps=num_steps, damping=0.2, warm_start=True)
    state, expected = None, np.zeros(6)
    for b_now in (b, b, b + 0.1):
        x, state, _ = solve(solver, matrix, b_now, state)
        expected = krylov_solution(damped, b_now, num_steps, expected)
        np.testing.assert_allclose(x, expected, rtol=1e-8)
        np.testing.assert_array_equal(state, x)
    assert solve(conjugate_gradient(num_steps=num_steps), matrix, b).state == ()


def test_a_warm_start_that_is_worse_than_nothing_is_dropped(x64):
    matrix, b = definite(6)
    solver = conjugate_gradient(num_steps=2, warm_start=True)
    cold = krylov_solution(matrix, b, 2)
    for state in (-cold, 1e200 * b, np.full(6, np.inf)):
        np.testing.assert_allclose(solve(solver, matrix, b, jnp.asarray(state)).x, cold, rtol=1e-8)


def test_a_single_loop_that_overflowed_starts_anew(x64):
    solver = gradient_descent(num_steps=2, step_size=ETA)
    cold = solve(solver, H, B).x
    for x in (np.inf, np.nan, 1e200):  # the square of the last is infinite
        np.testing.assert_array_equal(solve(solver, H, B, (jnp.full(3, x), ())).x, cold)


@pytest.mark.parametrize("num_steps", [1, 10, 300])
def test_conjugate_gradient_stops_where_it_breaks_down(num_steps):
    solver = conjugate_gradient(num_steps=num_steps)
    # Solved: no 0 / 0 after the last bit.
    np.testing.assert_allclose(solve(solver, [2.0, 2.0], [1.0, -1.0]).x, [0.5, -0.5])
    np.testing.assert_array_equal(solve(solver, [1.0, 2.0], [0.0, 0.0]).x, [0, 0])
    # p' B p = 0 at the first step: an infinite step length.
    np.testing.assert_array_equal(solve(solver, [1.0, -1.0], [1.0, 1.0]).x, [0, 0])
    # Almost so: the next step length overflows a square.
    assert jnp.all(jnp.isfinite(solve(solver, [1.0, -1.0, 1e-20], [1.0, 1.0 + 1e-6, 1e15]).x))
    assert jnp.all(jnp.isfinite(solve(solver, np.diag([3.0, -2.0, 1.0, -0.1, 0.0]), np.arange(1.0, 6)).x))


@pytest.mark.parametrize("rho", [0.3, 2.0])
def test_nystrom_of_full_rank_is_a_damped_solve(x64, rho):
    matrix, b = definite(6)
    solution = solve(nystrom(rank=6, rho=rho), matrix, b)
    np.testing.assert_allclose(solution.x, np.linalg.solve(matrix + rho * np.eye(6), b), rtol=1e-8)
    indefinite = matrix - 0.8 * np.eye(6)  # Woodbury's formula needs no sign
    solution = solve(nystrom(rank=6, rho=rho), indefinite, b)
    np.testing.assert_allclose(solution.x, np.linalg.solve(indefinite + rho * np.eye(6), b), rtol=1e-8)


def test_nystrom_of_the_matrix_rank_is_exact(x64):
    rng = np.random.default_rng(0)
    half, b = rng.normal(size=(9, 3)), rng.normal(size=9)
    for rank in (3, 5):  # S'Y is singular at 5: its pseudo-inverse serves
        x = solve(nystrom(rank=rank, rho=0.1), half @ half.T, b).x
        np.testing.assert_allclose(x, np.linalg.solve(half @ half.T + 0.1 * np.eye(9), b), rtol=1e-8)


def test_nystrom_below_the_matrix_rank(x64):
    """The sketch is recorded as it is drawn; Nystrom's formula and the solve are NumPy's."""
    matrix, b = definite(9)
    draws = []

    def matvec(p, i):
        draws.append(np.asarray(p))
        return jnp.asarray(matrix) @ p

    solver = nystrom(rank=4, rho=0.3)
    with jax.disable_jit():
        x, state, _ = solver.solve(matvec, jnp.asarray(b), solver.init(jnp.asarray(b)))
    s = np.stack(draws, axis=1)
    y = matrix @ s
    approximation = y @ np.linalg.inv(s.T @ y) @ y.T
    np.testing.assert_allclose(x, np.linalg.solve(approximation + 0.3 * np.eye(9), b), rtol=1e-8)
    assert np.all(s != 0)  # no unit vectors
    # Another solve draws another sketch; a solver made anew, or of another seed, does as its seed says.
    again = solve(solver, matrix, b, state).x
    assert not np.allclose(again, x, rtol=1e-3)
    np.testing.assert_allclose(solve(nystrom(rank=4, rho=0.3), matrix, b).x, x, rtol=1e-10)
    assert not np.allclose(solve(nystrom(rank=4, rho=0.3, seed=1), matrix, b).x, x, rtol=1e-3)


def test_nystrom_is_bounded_without_curvature():
    for size in (0.0, 1e-20):
        np.testing.assert_allclose(solve(nystrom(rank=2, rho=0.5), size * H, B).x, B / 0.5, rtol=1e-5)


@pytest.mark.parametrize("make", [neumann, gradient_descent])
def test_automatic_step_size_finds_the_largest_eigenvalue(x64, make):
    count = {"num_terms": 4} if make is neumann else {"num_steps": 4}
    solver = make(**count, step_size="auto", power_iterations=2)
    matrix, b = definite(5)
    largest = np.linalg.eigvalsh(matrix)[-1]
    state, gaps, q, x = None, [], b, np.zeros(5)
    for _ in range(25):
        solution = solve(solver, matrix, b, state)
        state = solution.state
        for _ in range(2):
            q = matrix @ (q / np.linalg.norm(q))
        eta = 1 / np.linalg.norm(q)
        np.testing.assert_allclose(solution.info["step_size"], eta, rtol=1e-10)
        # What is carried is the direction, and the solve uses the step size that it reports.
        x = sum(np.linalg.matrix_power(np.eye(5) - eta * matrix, k) @ (eta * b) for k in range(4)) + (
            0 if make is neumann else np.linalg.matrix_power(np.eye(5) - eta * matrix, 4) @ x
        )
        np.testing.assert_allclose(solution.x, x, rtol=1e-9)
        gaps.append(float(solution.info["step_size"]) * largest - 1)
    assert gaps[0] > 0.01  # from below: the first step size is too large
    assert np.all(np.diff(gaps) < 1e-12)
    assert abs(gaps[-1]) < 1e-6


def test_automatic_step_size_takes_the_largest_in_size(x64):
    solution = solve(neumann(num_terms=1, step_size="auto", power_iterations=60), [0.5, -2.0, 1.0], B)
    np.testing.assert_allclose(solution.info["step_size"], 0.5, rtol=1e-10)


def test_automatic_step_size_without_curvature_or_outer_gradient():
    solver = neumann(num_terms=3, step_size="auto")
    flat = solve(solver, 0 * H, B)
    assert float(flat.info["step_size"]) == 0
    np.testing.assert_array_equal(flat.x, np.zeros(3))
    silent = solve(solver, H, 0 * B)
    np.testing.assert_array_equal(silent.x, np.zeros(3))
    # Nothing was seen, so that the next solve starts at its b.
    assert float(solve(solver, H, B, silent.state).info["step_size"]) > 0.3


def test_a_matrix_drawn_anew_for_each_product(x64):
    matrices = np.stack([definite(3, seed)[0] for seed in range(4)])

    def matvec(p, i):
        return jnp.asarray(matrices)[i] @ p

    expected = ETA * B
    for matrix in matrices[:3]:
        expected = expected + ETA * (B - matrix @ expected)
    solver = neumann(num_terms=4, step_size=ETA)
    b = jnp.asarray(B)
    np.testing.assert_allclose(solver.solve(matvec, b, solver.init(b)).x, expected, rtol=1e-12)
    assert solver.resamples
    assert gradient_descent(step_size=0.1).resamples
    assert not any(SOLVERS[name].resamples for name in ("conjugate_gradient", "nystrom", "dense"))


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (dense(), 1e-10),
        (nystrom(rank=5, rho=1e-9), 1e-6),
        (conjugate_gradient(num_steps=5), 1e-8),
        (gradient_descent(num_steps=2000, step_size="auto", power_iterations=20), 1e-8),
        (neumann(num_terms=2000, step_size="auto", power_iterations=20), 1e-8),
    ],
    ids=["dense", "nystrom", "conjugate_gradient", "gradient_descent", "neumann"],
)
def test_exact_on_a_pytree(x64, solver, tolerance):
    matrix, flat = definite(5)
    b = {"a": jnp.asarray(flat[:3]), "b": jnp.asarray(flat[3:, None])}

    def matvec(p, i):
        out = jnp.asarray(matrix) @ jnp.concatenate([p["a"], p["b"][:, 0]])
        return {"a": out[:3], "b": out[3:, None]}

    x = solver.solve(matvec, b, solver.init(b)).x
    expected = np.linalg.solve(matrix, flat)
    np.testing.assert_allclose(x["a"], expected[:3], rtol=tolerance)
    np.testing.assert_allclose(x["b"], expected[3:, None], rtol=tolerance)


def test_dense_needs_no_symmetry(x64):
    matrix = np.random.default_rng(0).normal(size=(5, 5)) + 3 * np.eye(5)
    np.testing.assert_allclose(solve(dense(), matrix, np.ones(5)).x, np.linalg.solve(matrix, np.ones(5)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SOLVERS)
def test_structure_shapes_and_dtypes(name, dtype):
    solver = SOLVERS[name]
    b = {"a": jnp.ones((2, 3), dtype), "b": [jnp.ones((), dtype)]}
    state = solver.init(b)
    assert not {x.unsafe_buffer_pointer() for x in jax.tree.leaves(b)} & {
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)
    }
    x, after, _ = solver.solve(lambda p, i: p, b, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(x, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_tree_all_finite(x)
