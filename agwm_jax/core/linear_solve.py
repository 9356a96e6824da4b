"""Approximate solutions of ``B x = b`` where B is known by its products with vectors."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from agwm_jax.core import trees
from agwm_jax.core.types import Scalar
from agwm_jax.errors import AgwmError

Matvec = Callable[[Any, Any], Any]
"""``matvec(p, i) -> B p``; i numbers the products of a solve, for a matrix that is drawn anew for each of them."""


class Solution(NamedTuple):
    """What a solver returns."""

    x: Any
    """Structure, shapes and dtypes of b."""
    state: Any
    """The solver's own, for the next outer step."""
    info: dict[str, Scalar]
    """Diagnostics, such as a step size that was found."""


class LinearSolver(NamedTuple):
    """A pair of pure functions on pytrees, made by the factories of this module."""

    init: Callable[[Any], Any]
    """``init(like_b) -> state``; shares no buffer with its argument."""
    solve: Callable[[Matvec, Any, Any], Solution]
    """``solve(matvec, b, state) -> Solution``."""
    resamples: bool = False
    """Whether the matrix may differ from product to product."""


def neumann(*, num_terms: int, step_size: float | Literal["auto"], power_iterations: int = 3) -> LinearSolver:
    r"""Truncated Neumann series, ``x = eta * sum_{k < K} (I - eta B)^k b``: exactly K terms, K - 1 products.

    Converges to ``B^-1 b`` where every eigenvalue of B is in (0, 2 / eta) and diverges otherwise; at the inner optimum
    it equals reverse mode through the last K gradient steps of size eta (Lorraine et al. 2020, arXiv 1911.02590,
    theorem 2). Memory: one vector. The choice for few terms, where its bias is that of stopping early.

    Args:
        num_terms: K, 1 or more; one term is ``eta * b``.
        step_size: eta, above 0; below 2 / (largest eigenvalue of B) for convergence. ``"auto"``: 1 / (largest
            eigenvalue), by power iterations that start at b and go on from one outer step to the next; found as
            ``step_size`` in info. They come closer from below: with too few of them a first solve may diverge.
        power_iterations: products that ``"auto"`` spends on each solve, 1 or more.

    Raises:
        AgwmError: ``num_terms`` below 1, ``step_size`` not above 0 or ``power_iterations`` below 1.
    """
    if not isinstance(num_terms, int) or num_terms < 1:
        raise AgwmError(f"neumann(num_terms={num_terms}): expected 1 term or more.")
    step = _step_size("neumann", step_size, power_iterations)

    def solve(matvec: Matvec, b, state) -> Solution:
        eta, state, info = step.find(matvec, b, state)
        first = trees.scale(eta, b)
        return Solution(_richardson(matvec, b, first, eta, num_terms - 1), state, info)

    return LinearSolver(step.init, solve, resamples=True)


def gradient_descent(
    *, num_steps: int = 1, step_size: float | Literal["auto"], power_iterations: int = 3
) -> LinearSolver:
    r"""Gradient descent on ``x' B x / 2 - b' x`` from the solution of the outer step before: the single-loop solver.

    ``x <- x + eta (b - B x)``, n times, n products. The solution is carried, so that the error falls over the outer
    steps instead of within one: SOBA with n = 1 (Dagreou et al. 2022, arXiv 2201.13409), AmIGO with more (Arbel and
    Mairal 2022, arXiv 2111.14580). Memory: the carried solution. The choice where v and B change slowly.

    Args:
        num_steps: n, 1 or more.
        step_size, power_iterations: as for `neumann`.

    Raises:
        AgwmError: as for `neumann`.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise AgwmError(f"gradient_descent(num_steps={num_steps}): expected 1 step or more.")
    step = _step_size("gradient_descent", step_size, power_iterations)

    def solve(matvec: Matvec, b, state) -> Solution:
        x, step_state = state
        x = optax.tree.where(jnp.isfinite(trees.norm(x)), x, optax.tree.zeros_like(x))  # a solve that overflowed
        eta, step_state, info = step.find(matvec, b, step_state)
        x = _richardson(matvec, b, x, eta, num_steps)
        return Solution(x, (x, step_state), info)

    return LinearSolver(lambda like: (optax.tree.zeros_like(like), step.init(like)), solve, resamples=True)


def conjugate_gradient(*, num_steps: int, damping: float = 0.0, warm_start: bool = False) -> LinearSolver:
    """K steps of conjugate gradients on ``(B + damping I) x = b``: K products, with a warm start one more.

    The best x of its Krylov space where B is positive definite (Hestenes and Stiefel 1952; as hypergradient: Pedregosa
    2016, arXiv 1602.02355; Rajeswaran et al. 2019, arXiv 1909.04630), without a step size: the choice where the inner
    problem is solved and the answer shall be accurate. On an indefinite B it may
    diverge, as the residual then says: use damping or ``curvature="gauss_newton"``. It stops moving once the system is
    solved to the last bit, or where its recursion overflows. With damping, info has ``damped_residual``, that of the
    damped system by the recursion. Memory: four vectors.

    Args:
        num_steps: K, 1 or more.
        damping: added to the diagonal, 0 or more; also bounds x along directions without curvature.
        warm_start: start from the solution of the outer step before, not from 0.

    Raises:
        AgwmError: ``num_steps`` below 1 or a negative damping.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise AgwmError(f"conjugate_gradient(num_steps={num_steps}): expected 1 step or more.")
    if not damping >= 0:
        raise AgwmError(f"conjugate_gradient(damping={damping}): expected a damping of 0 or more.")

    def solve(matvec: Matvec, b, state) -> Solution:
        def damped(p, i):
            return trees.add_scale(matvec(p, i), damping, p)

        def step(carry, i):
            x, r, p, rr = carry
            bp = damped(p, i)
            length = rr / trees.dot(p, bp)
            new_r = trees.add_scale(r, -length, bp)
            new_rr = trees.dot(new_r, new_r)
            new = trees.add_scale(x, length, p), new_r, trees.add_scale(new_r, new_rr / rr, p), new_rr
            moves = jnp.isfinite(length) & jnp.isfinite(new_rr) & (rr > 0)
            return jax.tree.map(lambda a, b: jnp.where(moves, a, b), new, carry)

        x, r = optax.tree.zeros_like(b), b
        if warm_start:
            # One that is worse than nothing is dropped: a solve that diverged once must not spoil all that follow.
            left = optax.tree.sub(b, damped(state, 0))
            x, r = optax.tree.where(trees.norm(left) < trees.norm(b), (state, left), (x, r))
        x, *_, rr = _repeat(step, (x, r, r, trees.dot(r, r)), num_steps)
        info = {"damped_residual": jnp.sqrt(rr) / _positive(trees.norm(b))} if damping else {}
        return Solution(x, x if warm_start else (), info)

    return LinearSolver(optax.tree.zeros_like if warm_start else _stateless, solve)


def nystrom(*, rank: int, rho: float, seed: int = 0) -> LinearSolver:
    """``(B_r + rho I)^-1 b`` with a random rank-r approximation of B: r products, each solve a new draw.

    ``B_r = Y (Q' Y)^+ Y'``, ``Y = B Q``, Q [n, r] Gaussian and, where r is near n, orthonormalised. The paper samples
    columns of B (Q of unit vectors; Hataya and Yamada 2023, arXiv 2302.09726); a Gaussian sketch needs as many products
    and does not miss a curvature that lies in few weights, such as the embeddings of one batch's words. The share of b
    outside the sketch is divided by rho, as by a one-term Neumann series with step 1 / rho: take a rank above the
    number of large eigenvalues (a batch of b texts has b or so) or a rho of the size of those that are left out.
    Memory: 3r vectors, whose algebra on a CPU outweighs the products.

    Args:
        rank: r, from 1 to the number of weights.
        rho: above 0; the curvature that unseen directions are taken to have. The relative error in float32 is about
            1e-6 times the largest eigenvalue over rho.
        seed: of the draws.

    Raises:
        AgwmError: ``rank`` below 1 or, at the first trace, above the number of weights; ``rho`` not above 0.
    """
    if not isinstance(rank, int) or rank < 1:
        raise AgwmError(f"nystrom(rank={rank}): expected a rank of 1 or more.")
    if not rho > 0:
        raise AgwmError(f"nystrom(rho={rho}): expected a rho above 0.")

    def init(like):
        size = sum(x.size for x in jax.tree.leaves(like))
        if rank > size:
            raise AgwmError(f"nystrom(rank={rank}): the inner variable has {size} entries; lower the rank.")
        return jnp.zeros((), jnp.int32)  # solves so far: plain numbers are what a checkpoint can hold

    def solve(matvec: Matvec, b, state) -> Solution:
        key = jax.random.fold_in(jax.random.key(seed), state)
        s = jax.vmap(lambda i: optax.tree.random_like(jax.random.fold_in(key, i), b))(jnp.arange(rank))
        # Few Gaussian vectors in many dimensions are orthogonal as they are; else Gram-Schmidt by Cholesky's factor, of
        # which the second pass removes the rounding of the first.
        for _ in range(2 if 10 * rank > sum(x.size for x in jax.tree.leaves(b)) else 0):
            factor = jnp.linalg.cholesky(trees.inner_products(s, s))
            s = trees.combine(jnp.linalg.inv(factor), s)
        y = jax.lax.map(lambda column: matvec(column[1], column[0]), (jnp.arange(rank), s))
        core = trees.inner_products(s, y)
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        size = jnp.abs(values)
        kept = size > rank * jnp.finfo(values.dtype).eps * jnp.max(size)
        z = trees.combine(jnp.where(kept, 1 / jnp.sqrt(_positive(size)), 0)[:, None] * vectors.T, y)
        # B_r = z' D z with the signs D of the eigenvalues, and by Woodbury's formula
        # (z' D z + rho I)^-1 b = (b - z' (z z' + rho D)^-1 z b) / rho.
        system = trees.inner_products(z, z) + rho * jnp.diag(jnp.where(values < 0, -1.0, 1.0))
        weights = jnp.linalg.solve(system, trees.inner_products(z, jax.tree.map(lambda x: x[None], b)))
        seen = jax.tree.map(lambda x: x[0], trees.combine(weights.T, z))
        return Solution(trees.scale(1 / rho, optax.tree.sub(b, seen)), state + 1, {})

    return LinearSolver(init, solve)


def dense() -> LinearSolver:
    """Exact: writes B out, one product a column, and factorises it. For tests and small problems."""

    def solve(matvec: Matvec, b, state) -> Solution:
        flat, unravel = ravel_pytree(b)
        columns = jax.vmap(lambda column: ravel_pytree(matvec(unravel(column), 0))[0])(
            jnp.eye(flat.size, dtype=flat.dtype)
        )
        wide = jnp.promote_types(flat.dtype, jnp.float32)
        x = jnp.linalg.solve(columns.T.astype(wide), flat.astype(wide))
        return Solution(unravel(x.astype(flat.dtype)), state, {})

    return LinearSolver(_stateless, solve)


class _StepSize(NamedTuple):
    init: Callable[[Any], Any]
    find: Callable[[Matvec, Any, Any], tuple[Any, Any, dict[str, Scalar]]]


def _step_size(name: str, step_size: float | Literal["auto"], power_iterations: int) -> _StepSize:
    """A given step size, or 1 / (largest eigenvalue in size) by power iterations whose direction is carried."""
    if step_size != "auto":
        if isinstance(step_size, str) or not step_size > 0:
            raise AgwmError(f"{name}(step_size={step_size!r}): expected a step size above 0, or 'auto'.")
        return _StepSize(_stateless, lambda matvec, b, state: (step_size, state, {}))
    if not isinstance(power_iterations, int) or power_iterations < 1:
        raise AgwmError(f"{name}(power_iterations={power_iterations}): expected 1 or more.")

    def find(matvec: Matvec, b, state):
        def iterate(q, i):
            return matvec(trees.scale(1 / _positive(trees.norm(q)), q), i)

        # At the first solve there is no direction yet; b lies where the curvature is, a random one hardly does.
        seen = trees.norm(state) > 0
        start = jax.tree.map(lambda q, bi: jnp.where(seen, q, bi), state, b)
        q = _repeat(iterate, start, power_iterations)
        largest = trees.norm(q)
        eta = jnp.where(largest > 0, 1 / _positive(largest), 0)
        return eta, q, {"step_size": eta}

    return _StepSize(optax.tree.zeros_like, find)


def _richardson(matvec: Matvec, b, x, eta, num_steps: int):
    """``x <- x + eta (b - B x)``: from ``eta b`` each step adds one term of Neumann's series, and keeps one vector."""

    def step(x, i):
        new = jax.tree.map(lambda xi, bi, hi: xi + jnp.asarray(eta, xi.dtype) * (bi - hi), x, b, matvec(x, i))
        moves = jnp.isfinite(trees.dot(new, new))  # a series that diverges ends in the huge, not in inf - inf
        return jax.tree.map(lambda xi, old: jnp.where(moves, xi, old), new, x)

    return _repeat(step, x, num_steps)


def _repeat(step: Callable[[Any, Any], Any], carry, count: int):
    """``carry = step(carry, i)`` for i from 0 to `count` - 1."""
    # No scan: mapped over lanes, that moves the lanes of all that `step` closes over to the front, and what was
    # linearised once, which has the layers there, would be copied (2 lanes of `neumann` took 2.8 times one's memory).
    return jax.lax.while_loop(
        lambda loop: loop[0] < count, lambda loop: (loop[0] + 1, step(loop[1], loop[0])), (0, carry)
    )[1]


def _positive(x):
    return jnp.where(x > 0, x, 1)


def _stateless(like) -> tuple[()]:
    del like
    return ()
