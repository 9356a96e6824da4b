"""A solution as a function of the outer variable, which composes with the rest of JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agwm_jax.core.bilevel import hypergradient
from agwm_jax.core.estimators.base import Estimator
from agwm_jax.core.types import Problem, Scalar, Vector


def implicit_function(
    solve: Callable[[Any], Vector], inner_loss: Callable[[Any, Any], Scalar], estimator: Estimator
) -> Callable[[Any], Vector]:
    """``outer -> w``, whose value is ``solve(outer)`` and whose derivative is the estimator's.

    For an inner problem that is solved in any way: a loop of an optimiser with its own stopping rule, L-BFGS, SciPy in
    a `jax.pure_callback`. Nothing of `solve` is differentiated. What is made of w may be anything that JAX
    differentiates in reverse mode, once: several solutions in one loss, a Jacobian (`jax.jacrev`), a layer of a larger
    model. The derivative costs what the estimator says, per cotangent (Krantz and Parks 2003, The Implicit Function
    Theorem).

    Args:
        solve: returns the solution, or what is near it.
        inner_loss: ``inner_loss(w, outer) -> scalar``, of which w is the minimum. Both functions may close over data,
            in which JAX refuses a derivative: what is to be differentiated belongs to `outer`.
        estimator: one that needs no steps: ``hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=20))``.

    Returns:
        The function. It raises `AgwmError` where `hypergradient` does, when it is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agwm_jax import hypergrad, implicit_function, linear_solve
        >>> ridge = lambda w, o: ((w - 3) ** 2 + o * w**2) / 2
        >>> w = implicit_function(lambda o: 3 / (1 + o), ridge, hypergrad.implicit(linear_solve.dense()))
        >>> print(jax.grad(lambda o: w(o) ** 2)(jnp.float32(1)))  # 2 w dw/do = -2 * 1.5 * 3 / 4
        -2.25
    """

    @jax.custom_vjp
    def solution(outer: Any) -> Vector:
        return solve(outer)

    def forward(outer: Any) -> tuple[Vector, tuple[Vector, Any]]:
        w = solution(outer)
        return w, (w, outer)

    def backward(kept: tuple[Vector, Any], v: Vector) -> tuple[Vector]:
        w, outer = (jax.tree.map(jnp.asarray, tree) for tree in kept)

        def pairing(w: Vector, outer: Vector, batch: Any) -> Scalar:
            del outer, batch
            return sum((jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (v, w)), strict=True)), jnp.zeros(()))

        problem = Problem(lambda w, o, _: inner_loss(w, o), pairing)
        return (hypergradient(problem, estimator, w, outer, jnp.zeros(1), jnp.zeros(())).hypergradient,)

    solution.defvjp(forward, backward)
    return solution
