"""Truncated Neumann series."""

from agwm_jax.core import trees
from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Matvec, Solution
from agwm_jax.core.solvers.iteration import StepSize, richardson, step_rule
from agwm_jax.core.types import Vector
from agwm_jax.errors import AgwmError


@SOLVERS.register("neumann", cost="K - 1 products, with step_size auto power_iterations more", paper="arXiv 1911.02590")
def neumann(*, num_terms: int = 3, step_size: StepSize = "auto", power_iterations: int = 3) -> LinearSolver:
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
    rule = step_rule("neumann", step_size, power_iterations)

    def solve(matvec: Matvec, b: Vector, state) -> Solution:
        eta, state, info = rule.find(matvec, b, state)
        first = trees.scale(eta, b)
        return Solution(richardson(matvec, b, first, eta, num_terms - 1), state, info)

    return LinearSolver(rule.init, solve, resamples=True)
