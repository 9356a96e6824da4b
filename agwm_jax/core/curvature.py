"""Products with the second derivatives of the inner loss: Hessian or Gauss-Newton, in three ways of taking them."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from agwm_jax.core import trees
from agwm_jax.core.precision import precise
from agwm_jax.core.types import Batch, Composite, Loss, Scalar, Vector
from agwm_jax.errors import AgwmError

Hvp = Literal["linearize", "jvp", "finite_difference"]
"""How a product with second derivatives is taken, and its cost in fb:

``"linearize"``: the gradient is linearised once (1 fb, its activations are kept), then 2 fb a product.
``"jvp"``: forward over reverse anew for every product, 3 fb (2 2/3 where J p is not asked for); nothing is kept.
``"finite_difference"``: a forward difference of gradients, 1 fb and one more for the gradient at the point itself; no
second-order differentiation, so that any kernel with a gradient will do. Its step has the norm
``sqrt((1 + |w|) 64 eps)``, eps that of the narrowest dtype in the computation (Knoll and Keyes 2004, and 64 for what a
deep network's gradient loses to rounding). Both ends are taken at full matrix precision; below float32 it is refused.
"""

Curvature = Literal["hessian", "gauss_newton"]
"""``"hessian"``, or its Gauss-Newton part, which is positive semi-definite where the criterion is convex: conjugate
gradients and Neumann series then cannot diverge for want of convexity. Needs a `Composite` inner loss."""

_DIFFERENCE = "hvp='finite_difference'"


def check(name: str, hvp: str, curvature: str = "hessian") -> None:
    """Refuse an unknown way of taking products, for the factory `name`."""
    for option, value, kind in (("hvp", hvp, Hvp), ("curvature", curvature, Curvature)):
        if value not in get_args(kind):
            raise AgwmError(f"{name}({option}={value!r}): expected one of {', '.join(map(repr, get_args(kind)))}.")


def linearize(loss: Loss, w: Vector, o: Vector, batch: Batch, hvp: Hvp) -> tuple[Scalar, Vector, Any]:
    """The loss, its gradient in w, and what `product` needs besides the point."""
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
    if hvp == "linearize":
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


def _difference_step(w: Vector, p: Vector, eps: float) -> Array:
    return jnp.sqrt((1 + trees.norm(w)) * 64 * eps) / trees.divisor(trees.norm(p))


def _difference(end, start, step):
    return jax.tree.map(lambda end, start: (end - start) / step.astype(end.dtype), end, start)
