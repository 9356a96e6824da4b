"""Implicit differentiation: the inner response from a linear system."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import curvature as curvatures
from agwm_jax.core import trees
from agwm_jax.core.curvature import Curvature, Hvp
from agwm_jax.core.estimators.base import ESTIMATORS, Estimate, Estimator
from agwm_jax.core.inner import InnerState
from agwm_jax.core.solvers.base import SOLVERS, LinearSolver
from agwm_jax.core.types import Batch, Loss, Vector
from agwm_jax.errors import AgwmError

Product = Callable[[Vector], Vector]
JointProduct = Callable[[Vector], tuple[Vector, Vector]]


def _check(settings: Any, *, inner_steps: int) -> None:
    if settings.resample and inner_steps == 1:
        raise AgwmError(
            "implicit(resample=True): the look-ahead has 1 inner step, so that all products would see the same batch; "
            "take more inner steps, or resample=False."
        )


@ESTIMATORS.register(
    "implicit", cost="k + 2n + 4, n the products of its solver", paper="arXiv 1602.02355, 1911.02590", check=_check
)
def implicit(
    solver: Annotated[LinearSolver, SOLVERS],
    *,
    hvp: Hvp = "linearize",
    curvature: Curvature = "hessian",
    resample: bool = False,
) -> Estimator:
    """Implicit differentiation at the end of the inner solve: ``d_o g - J x`` with ``x ~ B^-1 v`` from `solver`.

    B is the Hessian H of the inner loss, or its Gauss-Newton part; B and J are taken on the last inner batch. By the
    implicit function theorem this is the hypergradient of the solved inner problem (Pedregosa 2016, arXiv 1602.02355;
    Lorraine et al. 2020, arXiv 1911.02590): right where the inner variable is near its optimum, and blind to how it
    came there. In weight mixup give the inner loss an anchor, without which the exact answer is zero.

    Products assume a symmetric Hessian but with ``hvp="reverse"`` (see `agwm_jax.core.curvature.Hvp`), which conjugate
    gradients and Nystrom need in any case.

    Cost, for k inner steps and a solver of n products: ``k + 2n + 4`` fb with ``hvp="linearize"`` or ``"reverse"``,
    ``k + n + 3`` with ``"finite_difference"``, ``k + 2 2/3 n + 4`` with ``"jvp"``. One last application to the solution
    gives ``J x`` and the residual. With ``curvature="gauss_newton"`` a product costs 4/3 fb, and J stays that of the
    true loss: ``k + 4/3 n + 5 2/3`` with ``"linearize"``. Memory: the activations of a forward and backward pass are
    kept for the products (``"linearize"`` and ``"reverse"``; of a forward pass for Gauss-Newton), else those of one
    product at a time; and the solver's vectors.

    Args:
        solver: of ``B x = v``, from `agwm_jax.linear_solve`: `neumann` (K terms: n = K - 1), `conjugate_gradient`,
            `nystrom`, `gradient_descent` (single-loop), `dense`.
        hvp: how the products are taken.
        curvature: the matrix of the system; ``"gauss_newton"`` needs a `Composite` inner loss.
        resample: let product i see inner batch ``i mod k`` of the look-ahead instead of the last (Ji et al. 2021,
            stocBiO, arXiv 2010.07962); for solvers that bear a matrix drawn anew each time. Nothing can be
            linearised once, so neither with ``hvp="linearize"`` nor with ``"reverse"``; with ``"finite_difference"`` a
            product then costs 2 fb.

    Raises:
        AgwmError: options that do not go together, or at the first trace ``"gauss_newton"`` without a `Composite`.
    """
    if not isinstance(solver, LinearSolver):
        name = getattr(solver, "__name__", repr(solver))
        raise AgwmError(
            f"implicit({name}): expected a linear solver, such as linear_solve.neumann(num_terms=3); is it called?"
        )
    curvatures.check("implicit", hvp, curvature)
    if resample and not solver.resamples:
        raise AgwmError(
            "implicit(resample=True): this solver needs one and the same matrix for all of its products; "
            "use neumann or gradient_descent, or resample=False."
        )
    if resample and hvp in ("linearize", "reverse"):
        raise AgwmError(
            f"implicit(resample=True, hvp={hvp!r}): what is linearised once serves one batch only; "
            "use hvp='jvp' or 'finite_difference'."
        )

    def estimate(problem, solve, inner, outer, inner_batches, outer_batch, state) -> Estimate:
        inner, losses = solve.run(problem.inner_loss, inner, outer, inner_batches)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(inner.params, outer, outer_batch)
        w = trees.after(inner.params, v)

        def products(batch) -> tuple[Product, JointProduct]:
            return _products(problem.inner_loss, w, outer, batch, hvp, curvature)

        def on_batch(i) -> Product:
            return products(jax.tree.map(lambda x: x[i % len(losses)], inner_batches))[0]

        matrix, joint = products(jax.tree.map(lambda x: x[-1], inner_batches))
        solution = solver.solve(lambda p, i: on_batch(i)(p) if resample else matrix(p), v, state)
        bx, jx = joint(solution.x)
        bx = bx if curvature == "hessian" else matrix(solution.x)
        # Where the outer loss does not feel the inner variable, v = x = 0 solves the system: residual 0, not 0 / 0.
        residual = trees.norm(optax.tree.sub(bx, v)) / trees.divisor(trees.norm(v))
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value, "residual": residual, **solution.info}
        return Estimate(optax.tree.sub(direct, jx), inner, solution.state, info)

    def init(inner: InnerState, outer: Vector):
        del outer
        return solver.init(inner.params)

    return Estimator(init, estimate, forward_mode=hvp != "finite_difference")


def _products(
    loss: Loss, w: Vector, outer: Vector, batch: Batch, hvp: Hvp, curvature: Curvature
) -> tuple[Product, JointProduct]:
    """``p -> B p`` and ``p -> (H p, J p)`` on one batch; where B = H the two share what is computed once."""
    # Beside a Gauss-Newton solve the joint gradient is needed once, at the end: nothing is kept for it meanwhile.
    joint_hvp: Hvp = "jvp" if curvature == "gauss_newton" and hvp == "linearize" else hvp
    _, _, saved = curvatures.linearize(loss, w, outer, batch, joint_hvp)

    def joint(p):
        return curvatures.product(loss, w, outer, batch, saved, p, joint_hvp)

    if curvature == "gauss_newton":
        return curvatures.gauss_newton(loss, w, outer, batch, hvp), joint
    return lambda p: joint(p)[0], joint
