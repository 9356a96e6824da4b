"""Implicit differentiation: the inner response from a linear system."""

import jax
import jax.numpy as jnp
import optax

from agwm_jax.core import curvature as curvatures
from agwm_jax.core import trees
from agwm_jax.core.curvature import Curvature, Hvp
from agwm_jax.core.hypergrad._base import Estimate, Hypergradient
from agwm_jax.core.inner import InnerState, inner_steps
from agwm_jax.core.linear_solve import LinearSolver
from agwm_jax.core.types import Problem
from agwm_jax.errors import AgwmError


def implicit(
    solver: LinearSolver, *, hvp: Hvp = "linearize", curvature: Curvature = "hessian", resample: bool = False
) -> Hypergradient:
    """Implicit differentiation at the end of the look-ahead: ``d_o g - J x`` with ``x ~ B^-1 v`` from `solver`.

    B is the Hessian H of the inner loss, or its Gauss-Newton part; B and J are taken on the last inner batch. By the
    implicit function theorem this is the hypergradient of the solved inner problem (Pedregosa 2016, arXiv 1602.02355;
    Lorraine et al. 2020, arXiv 1911.02590): right where the inner variable is near its optimum, and blind to how it
    came there. In weight mixup give the inner loss an anchor, without which the exact answer is zero.

    Cost, for k inner steps and a solver of n products: ``k + 2n + 4`` fb with ``hvp="linearize"``, ``k + n + 3`` with
    ``"finite_difference"``, ``k + 2 2/3 n + 4`` with ``"jvp"``. One last application to the solution gives ``J x`` and
    the residual. With ``curvature="gauss_newton"`` a product costs 4/3 fb, and J stays that of the true loss:
    ``k + 4/3 n + 5 2/3`` with ``"linearize"``. Memory: the activations of a forward and backward pass are kept for the
    products (``"linearize"``; of a forward pass for Gauss-Newton), else those of one product at a time; and the
    solver's vectors.

    Args:
        solver: of ``B x = v``, from `agwm_jax.linear_solve`: `neumann` (K terms: n = K - 1), `conjugate_gradient`,
            `nystrom`, `gradient_descent` (single-loop), `dense`.
        hvp: how the products are taken.
        curvature: the matrix of the system; ``"gauss_newton"`` needs a `Composite` inner loss.
        resample: let product i see inner batch ``i mod k`` of the look-ahead instead of the last (Ji et al. 2021,
            stocBiO, arXiv 2010.07962); for solvers that bear a matrix drawn anew each time. Nothing can be
            linearised once, so not with ``hvp="linearize"``; with ``"finite_difference"`` a product then costs 2 fb.

    Raises:
        AgwmError: options that do not go together, or at the first trace ``"gauss_newton"`` without a `Composite`.
    """
    curvatures.check("implicit", hvp, curvature)
    if resample and not solver.resamples:
        raise AgwmError(
            "implicit(resample=True): this solver needs one and the same matrix for all of its products; "
            "use neumann or gradient_descent, or resample=False."
        )
    if resample and hvp == "linearize":
        raise AgwmError(
            "implicit(resample=True, hvp='linearize'): what is linearised once serves one batch only; "
            "use hvp='jvp' or 'finite_difference'."
        )

    def estimate(problem: Problem, tx: optax.GradientTransformation, inner, outer, inner_batches, outer_batch, state):
        loss = problem.inner_loss
        inner, losses = inner_steps(loss, tx, inner, outer, inner_batches)
        value, (v, direct) = jax.value_and_grad(problem.outer_loss, argnums=(0, 1))(inner.params, outer, outer_batch)
        w = trees.after(inner.params, v)
        last = jax.tree.map(lambda x: x[-1], inner_batches)
        k = len(losses)

        # Beside a Gauss-Newton solve the joint gradient is needed once, at the end: nothing is kept for it meanwhile.
        joint_hvp = "jvp" if curvature == "gauss_newton" and hvp == "linearize" else hvp

        def joint_product(batch):
            _, _, saved = curvatures.linearize(loss, w, outer, batch, joint_hvp)
            return lambda p: curvatures.product(loss, w, outer, batch, saved, p, joint_hvp)

        def matrix(batch, joint):
            gauss_newton = curvature == "gauss_newton"
            return curvatures.gauss_newton(loss, w, outer, batch, hvp) if gauss_newton else lambda p: joint(p)[0]

        joint = joint_product(last)
        fixed = matrix(last, joint)

        def matvec(p, i):
            if not resample:
                return fixed(p)
            batch = jax.tree.map(lambda x: x[i % k], inner_batches)
            return matrix(batch, joint_product(batch))(p)

        solution = solver.solve(matvec, v, state)
        bx, jx = joint(solution.x)
        bx = fixed(solution.x) if curvature == "gauss_newton" else bx
        v_norm = trees.norm(v)
        # Where the outer loss does not feel the inner variable, v = x = 0 solves the system: residual 0, not 0 / 0.
        residual = trees.norm(optax.tree.sub(bx, v)) / jnp.where(v_norm > 0, v_norm, 1)
        info = {"inner_loss": jnp.mean(losses), "outer_loss": value, "residual": residual, **solution.info}
        return Estimate(optax.tree.sub(direct, jx), inner, solution.state, info)

    def init(inner: InnerState, outer):
        del outer
        return solver.init(inner.params)

    return Hypergradient(init, estimate)
