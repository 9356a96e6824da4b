"""Vectors that are pytrees: sums and products that keep each leaf's dtype, and the order of what is computed."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from agwm_jax.core.types import Scalar, Vector

T = TypeVar("T")


def scale(factor: float | Array, tree: Vector) -> Vector:
    """``factor * tree``; a factor of another dtype (a float32 scalar, bfloat16 leaves) changes no leaf's."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def add_scale(tree: Vector, factor: float | Array, direction: Vector) -> Vector:
    """``tree + factor * direction`` in the dtypes of `tree`."""
    return jax.tree.map(lambda x, d: (x + factor * d).astype(x.dtype), tree, direction)


def dot(left: Vector, right: Vector) -> Scalar:
    """The inner product, summed in float32 or better, and leaf by leaf as it lies: a sharded leaf stays sharded."""
    wide = jax.tree.map(lambda x: jnp.promote_types(x.dtype, jnp.float32), left)
    parts = jax.tree.map(lambda x, y, dtype: jnp.sum(x.astype(dtype) * y.astype(dtype)), left, right, wide)
    return sum(jax.tree.leaves(parts))  # type: ignore[return-value] # there is a leaf


def norm(tree: Vector) -> Scalar:
    """The Euclidean norm."""
    return jnp.sqrt(dot(tree, tree))


def divisor(x: Array) -> Array:
    """x, and 1 where it is 0: what may be divided by where a vanished numerator shall stay so. NaN stays NaN."""
    return jnp.where(x == 0, 1, x)


def inner_products(left: PyTree, right: PyTree) -> Float[Array, "r s"]:
    """``[r, s]`` of two stacks ``[r, ...]`` and ``[s, ...]``, in float32 or better."""

    def products(a, b):
        dtype = jnp.promote_types(jnp.promote_types(a.dtype, b.dtype), jnp.float32)
        axes = tuple(range(1, a.ndim))
        return jax.lax.dot_general(
            a, b, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
        )

    return sum(jax.tree.leaves(jax.tree.map(products, left, right)))  # type: ignore[return-value] # there is a leaf


def combine(weights: Float[Array, "s r"], stack: PyTree) -> PyTree:
    """``weights [s, r] @ stack [r, ...]`` in the dtypes of the stack."""
    return jax.tree.map(
        lambda y: jnp.tensordot(weights, y, 1, precision=jax.lax.Precision.HIGHEST).astype(y.dtype), stack
    )


def after(tree: T, done: PyTree) -> T:
    """The same tree, but what uses it is computed after `done`.

    Independent gradients that a compiler runs at once keep the activations of all of them alive.
    """
    return jax.lax.optimization_barrier((tree, done))[0]
