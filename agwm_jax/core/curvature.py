"""Products with the second derivatives of the inner loss: Hessian or Gauss-Newton, in four ways of taking them."""

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from agwm_jax.core import trees
from agwm_jax.core.precision import TooNarrow, precise
from agwm_jax.core.types import Batch, Composite, Loss, Problem, Scalar, Vector
from agwm_jax.errors import AgwmError

Hvp = Literal["linearize", "jvp", "finite_difference", "reverse"]
"""How a product with second derivatives is taken, and its cost in fb:

``"linearize"``: the gradient is linearised once (1 fb, its activations are kept), then 2 fb a product.
``"jvp"``: forward over reverse anew for every product, 3 fb (2 2/3 where J p is not asked for); nothing is kept.
``"finite_difference"``: a forward difference of gradients, 1 fb and one more for the gradient at the point itself; no
second-order differentiation, so that any kernel with a gradient will do. Its step has the norm
``sqrt((1 + |w|) 64 eps)``, eps that of the narrowest dtype in the computation (Knoll and Keyes 2004, and 64 for what a
deep network's gradient loses to rounding). Both ends are taken at full matrix precision; below float32 it is refused.
``"reverse"``: the gradient is differentiated in reverse mode (1 fb, its activations are kept), then 2 fb a product.

What is needed are products with the *transpose* of the gradient's derivatives, ``(d_w F)' p`` and ``(d_o F)' p`` for
``F = d_w f``. The first three ways take ``d_w (d_w f, d_o f) p`` for it. That is the same where the loss has the
derivatives of one function. A `jax.custom_vjp` that gives another derivative than its function has (a clipped gradient,
a straight-through estimator) breaks it for all three, a `jax.lax.stop_gradient` for ``"finite_difference"``, which sees
what is behind it. Only ``"reverse"`` is right there. `check_hvp` tells.
"""

Curvature = Literal["hessian", "gauss_newton"]
"""``"hessian"``, or its Gauss-Newton part, which is positive semi-definite where the criterion is convex: conjugate
gradients and Neumann series then cannot diverge for want of convexity. Needs a `Composite` inner loss."""

_TOLERANCE = {"linearize": 1e-3, "finite_difference": 3e-2}
"""Of `check_hvp`: above what float32 loses to rounding in a deep network."""
_DIFFERENCE = "hvp='finite_difference'"


def check(name: str, hvp: str, curvature: str = "hessian") -> None:
    """Refuse an unknown way of taking products, for the factory `name`."""
    for option, value, kind in (("hvp", hvp, Hvp), ("curvature", curvature, Curvature)):
        if value not in get_args(kind):
            raise AgwmError(f"{name}({option}={value!r}): expected one of {', '.join(map(repr, get_args(kind)))}.")
    if (hvp, curvature) == ("reverse", "gauss_newton"):
        raise AgwmError(
            f"{name}(hvp='reverse', curvature='gauss_newton'): a Gauss-Newton matrix is its own transpose; take "
            "hvp='linearize' or 'jvp', or curvature='hessian'."
        )


def linearize(loss: Loss, w: Vector, o: Vector, batch: Batch, hvp: Hvp) -> tuple[Scalar, Vector, Any]:
    """The loss, its gradient in w, and what `product` needs besides the point."""
    if hvp == "reverse":
        grads, transpose, value = jax.vjp(lambda w, o: _gradient(loss, w, o, batch), w, o, has_aux=True)
        return value, grads, transpose
    joint = _joint_gradient(loss, o, batch)
    if hvp == "linearize":
        grads, linear, value = jax.linearize(joint, w, has_aux=True)
        return value, grads[0], linear
    if hvp == "jvp":
        grads, value = joint(w)
        return value, grads[0], None
    grads, value = precise(_DIFFERENCE, joint, w).call(w)
    return value, grads[0], grads


def product(loss: Loss, w: Vector, o: Vector, batch: Batch, saved: Any, p: Vector, hvp: Hvp) -> tuple[Vector, Vector]:
    """``(H p, J p)``, the derivative of ``w -> (d_w f, d_o f)`` along p; `saved` is what `linearize` returned."""
    if hvp in ("linearize", "reverse"):
        return saved(p)
    joint = _joint_gradient(loss, o, batch)
    if hvp == "jvp":
        # Within a loop over products the compiler would otherwise compute what depends on w alone once, and keep it.
        return jax.jvp(lambda w: joint(w)[0], (trees.after(w, p),), (p,))[1]
    gradient = precise(_DIFFERENCE, joint, w)
    step = _difference_step(w, p, gradient.eps)
    ahead, _ = gradient.call(trees.add_scale(w, step, p))
    return _difference(ahead, saved, step)


def gauss_newton(loss: Loss, w: Vector, o: Vector, batch: Batch, hvp: Hvp) -> Callable[[Vector], Vector]:
    """The product ``p -> Z' L Z p`` where Z = d model / d w and L is the criterion's Hessian in the outputs.

    Cost 4/3 fb a product, and 1/3 fb once with ``"linearize"``, in every product with ``"jvp"``;
    ``"finite_difference"`` is one of the outputs, also 4/3 fb. Source: Schraudolph 2002, Neural Computation 14(7).

    Raises:
        AgwmError: the loss is no `Composite`.
    """
    if not isinstance(loss, Composite):
        raise AgwmError(
            "curvature='gauss_newton' needs to know the model's outputs: expected the inner loss as "
            "agwm_jax.Composite(outputs, criterion), got a plain function; wrap it, or use curvature='hessian'."
        )

    def outputs(w):
        return loss.outputs(w, o, batch)

    def criterion_product(z, tangent):
        return jax.jvp(jax.grad(lambda z: loss.criterion(z, batch)), (z,), (tangent,))[1]

    def exact(w):
        z, forward = jax.linearize(outputs, w)
        transpose = jax.linear_transpose(forward, w)
        return lambda p: transpose(criterion_product(z, forward(p)))[0]

    def difference(p):
        model = precise(_DIFFERENCE, outputs, w)
        z, vjp = jax.vjp(model.call, trees.after(w, p))
        step = _difference_step(w, p, model.eps)
        tangent = _difference(model.call(trees.add_scale(w, step, p)), z, step)
        return vjp(criterion_product(z, tangent))[0]

    if hvp == "linearize":
        return exact(w)
    return difference if hvp == "finite_difference" else lambda p: exact(trees.after(w, p))(p)


def _joint_gradient(loss: Loss, o: Vector, batch: Batch):
    def joint(w):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(w, o, batch)
        return grads, value

    return joint


def _gradient(loss: Loss, w: Vector, o: Vector, batch: Batch) -> tuple[Vector, Scalar]:
    value, grads = jax.value_and_grad(loss)(w, o, batch)
    return grads, value


def check_hvp(problem: Problem, inner: Vector, outer: Vector, inner_batch: Batch, *, seed: int = 0) -> dict[str, float]:
    """How far the products with second derivatives of the inner loss are from the transposed ones, which are meant.

    Warns of the ways that are wrong for this loss, see `Hvp`; the estimator `finite_difference` stands and falls with
    the hvp of that name. Costs some 10 fb; call it once, outside of `jax.jit`.

    Args:
        problem: inner and outer loss.
        inner: the inner variable w; the weights that training starts from serve.
        outer: the outer variable.
        inner_batch: one batch, without the axis of inner steps.
        seed: of the random direction.

    Returns:
        ``|(H p, J p) - (H' p, J' p)| / |(H' p, J' p)|`` for one random direction p, of ``"linearize"`` (and ``"jvp"``,
        which is the same) and ``"finite_difference"``, which is left out where the loss computes in less than float32.
    """
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(inner))))
    p = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape, x.dtype), inner)

    @partial(jax.jit, static_argnames="hvp")
    def taken(w: Vector, o: Vector, batch: Batch, p: Vector, hvp: Hvp) -> tuple[Vector, Vector]:
        _, _, saved = linearize(problem.inner_loss, w, o, batch, hvp)
        return product(problem.inner_loss, w, o, batch, saved, p, hvp)

    meant = taken(inner, outer, inner_batch, p, hvp="reverse")
    found: dict[str, float] = {}
    for hvp in ("linearize", "finite_difference"):
        with contextlib.suppress(TooNarrow):
            error = trees.norm(optax.tree.sub(taken(inner, outer, inner_batch, p, hvp=hvp), meant))
            found[hvp] = float(error / trees.divisor(trees.norm(meant)))
    wrong = {hvp: error for hvp, error in found.items() if not error <= _TOLERANCE[hvp]}
    if wrong:
        listed = ", ".join(f"{hvp!r} by {error:.2g}" for hvp, error in wrong.items())
        warnings.warn(
            f"products with second derivatives of the inner loss differ from the transposed ones ({listed} of their "
            "norm): the loss holds a stop_gradient, or a custom_vjp with another derivative than its function has. "
            "Take hypergrad.unrolled(hvp='reverse') or implicit(..., hvp='reverse').",
            stacklevel=2,
        )
    return found


def _difference_step(w: Vector, p: Vector, eps: float) -> Array:
    return jnp.sqrt((1 + trees.norm(w)) * 64 * eps) / trees.divisor(trees.norm(p))


def _difference(end, start, step):
    return jax.tree.map(lambda end, start: (end - start) / step.astype(end.dtype), end, start)
