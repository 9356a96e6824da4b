"""Gradient descent on the linear system along with the search: the single-loop solver."""

import jax.numpy as jnp
import optax

from agwm_jax.core import trees
from agwm_jax.core.solvers.base import SOLVERS, LinearSolver, Matvec, Solution
from agwm_jax.core.solvers.iteration import StepSize, richardson, step_rule
from agwm_jax.core.types import Vector
from agwm_jax.errors import AgwmError


@SOLVERS.register(
    "gradient_descent",
    cost="num_steps products, with step_size auto power_iterations more",
    paper="arXiv 2201.13409, 2111.14580",
)
def gradient_descent(*, num_steps: int = 1, step_size: StepSize = "auto", power_iterations: int = 3) -> LinearSolver:
    r"""Gradient descent on ``x' B x / 2 - b' x`` from the solution of the outer step before: the single-loop solver.

    ``x <- x + eta (b - B x)``, n times, n products. The solution is carried, so that the error falls over the outer
    steps instead of within one: SOBA with n = 1 (Dagreou et al. 2022, arXiv 2201.13409), AmIGO with more (Arbel and
    Mairal 2022, arXiv 2111.14580). Memory: the carried solution. The choice where v and B change slowly.

    Args:
        num_steps: n, 1 or more.
        step_size: eta, above 0; below 2 / (largest eigenvalue of B) for convergence. ``"auto"``: as for `neumann`.
        power_iterations: products that ``"auto"`` spends on each solve, 1 or more.

    Raises:
        AgwmError: as for `neumann`.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise AgwmError(f"gradient_descent(num_steps={num_steps}): expected 1 step or more.")
    rule = step_rule("gradient_descent", step_size, power_iterations)

    def init(like: Vector):
        return optax.tree.zeros_like(like), rule.init(like)

    def solve(matvec: Matvec, b: Vector, state) -> Solution:
        x, rule_state = state
        x = optax.tree.where(jnp.isfinite(trees.norm(x)), x, optax.tree.zeros_like(x))  # a solve that overflowed
        eta, rule_state, info = rule.find(matvec, b, rule_state)
        x = richardson(matvec, b, x, eta, num_steps)
        return Solution(x, (x, rule_state), info)

    return LinearSolver(init, solve, resamples=True)
