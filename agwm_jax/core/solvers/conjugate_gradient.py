"""Conjugate gradients."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Matvec, Solution, stateless
from agwm_jax.core.solvers.iteration import repeat
from agwm_jax.core.types import Vector
from agwm_jax.errors import AgwmError


@SOLVERS.register("conjugate_gradient", cost="K products, with warm_start one more", paper="arXiv 1602.02355")
def conjugate_gradient(*, num_steps: int = 5, damping: float = 0.0, warm_start: bool = False) -> LinearSolver:
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

    def solve(matvec: Matvec, b: Vector, state) -> Solution:
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
        x, *_, rr = repeat(step, (x, r, r, trees.dot(r, r)), num_steps)
        info = {"damped_residual": jnp.sqrt(rr) / trees.divisor(trees.norm(b))} if damping else {}
        return Solution(x, x if warm_start else (), info)

    return LinearSolver(optax.tree.zeros_like if warm_start else stateless, solve)
