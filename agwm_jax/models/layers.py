"""The parts that every encoder is made of, as pure functions whose derivatives keep little and compile to fast code.

Each has rules of its own in place of what automatic differentiation makes of its formula, which keeps up to five arrays
of the size of the result for the backward pass. The rules are forward-mode ones that refer to the functions
themselves, so they serve reverse mode, forward mode and products with second derivatives alike.

Softmax, norm and the exact gelu are computed in float32 where the arguments are narrower, and in float64 there.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key


@jax.custom_jvp
def softmax(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Softmax over the last axis; keeps its result alone for the derivative.

    `jax.nn.softmax` does so only under `jax_softmax_custom_jvp`, which is off unless a program sets it for all others.
    """
    weights = jnp.exp(x - x.max(axis=-1, keepdims=True))
    return weights * (1 / weights.sum(axis=-1, keepdims=True))


@softmax.defjvp
def _softmax_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = softmax(x)
    weighted = y * dx
    return y, weighted - y * weighted.sum(axis=-1, keepdims=True)


@jax.custom_jvp
def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Exact Gaussian error linear unit, ``x Phi(x)``; keeps its derivative alone.

    By the error function and not its complement (`jax.nn.gelu`), which takes 2 to 5 times as long on a CPU; what is
    lost is below one rounding of the largest results. Source: Hendrycks and Gimpel, arXiv 1606.08415.
    """
    wide = _wide(x)
    return (wide * _normal_cdf(wide)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    wide = _wide(x)
    cdf = _normal_cdf(wide)
    derivative = cdf + wide * (jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi))
    return (wide * cdf).astype(x.dtype), derivative.astype(x.dtype) * dx


def layer_norm(
    x: Float[Array, "*shape d"], scale: Float[Array, "d"], bias: Float[Array, "d"] | None, *, epsilon: float
) -> Float[Array, "*shape d"]:
    """Layer norm over the last axis: mean 0 and variance 1 before `scale` and `bias`; in the dtype of `x`.

    Keeps the standardised rows and one number a row. The variance is that of the centred rows: E[x^2] - E[x]^2 loses
    too many digits for parity with other implementations. Source: Ba et al., arXiv 1607.06450.

    Args:
        epsilon: added to the variance.
    """
    rows, _ = _standardise(_wide(x), epsilon)
    scaled = rows * jnp.expand_dims(scale, range(x.ndim - 1))
    return (scaled if bias is None else scaled + jnp.expand_dims(bias, range(x.ndim - 1))).astype(x.dtype)


def rms_norm(x: Float[Array, "*shape d"], scale: Float[Array, "d"], *, epsilon: float) -> Float[Array, "*shape d"]:
    """Root-mean-square norm over the last axis, times `scale`; in the dtype of `x`.

    Source: Zhang and Sennrich, arXiv 1910.07467.

    Args:
        epsilon: added to the mean square.
    """
    rows, _ = _scale_rows(_wide(x), epsilon)
    return (rows * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


@jax.custom_jvp
def _scale_rows(x, epsilon):
    inverse = lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)
    return x * inverse, inverse


@_scale_rows.defjvp
def _scale_rows_jvp(primals, tangents):
    x, epsilon = primals
    dx, _ = tangents  # epsilon is a constant
    rows, inverse = _scale_rows(x, epsilon)
    along = (rows * dx).mean(axis=-1, keepdims=True)
    return (rows, inverse), (inverse * (dx - rows * along), -(inverse * inverse) * along)


@jax.custom_jvp
def _standardise(x, epsilon):
    centred = x - x.mean(axis=-1, keepdims=True)
    inverse = lax.rsqrt((centred * centred).mean(axis=-1, keepdims=True) + epsilon)
    return centred * inverse, inverse


@_standardise.defjvp
def _standardise_jvp(primals, tangents):
    x, epsilon = primals
    dx, _ = tangents  # epsilon is a constant
    rows, inverse = _standardise(x, epsilon)
    along = (rows * dx).mean(axis=-1, keepdims=True)
    d_rows = inverse * (dx - dx.mean(axis=-1, keepdims=True) - rows * along)
    return (rows, inverse), (d_rows, -(inverse * inverse) * along)


def linear(
    x: Float[Array, "*shape d"], kernel: Float[Array, "d n"], bias: Float[Array, "n"] | None = None
) -> Float[Array, "*shape n"]:
    """``x kernel + bias`` in the dtype of `x`.

    As a product of two matrices: with more axes than two XLA writes out a transpose of the gradient of the result, on a
    CPU, before it multiplies that with `x` for the gradient of `kernel`.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = rows @ kernel.astype(x.dtype)
    product = product if bias is None else product + bias.astype(x.dtype)[None]
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def dropout(x: Float[Array, "*shape"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*shape"]:
    """Zero each entry with probability `rate` and scale the others by the inverse of the probability to be kept.

    Flax's own draws one 32-bit word an entry, a notable part of a training step on a CPU (measured); a word here serves
    two entries. The rate is rounded to a multiple of 2^-16 and the scale is that of the rounded rate, so the
    expectation is exact.

    Args:
        x: any array with at least one axis.
        rate: probability to be zeroed, in [0, 1).
        key: typed PRNG key; None means no dropout.
    """
    kept = 65536 - round(rate * 65536)
    if key is None or kept == 65536:
        return x
    *leading, last = x.shape
    words = jax.random.bits(key, (*leading, -(-last // 2)), jnp.uint32)
    bits = lax.bitcast_convert_type(words, jnp.uint16).reshape(*leading, -1)[..., :last]
    return jnp.where(bits < kept, x * jnp.asarray(65536 / kept, x.dtype), jnp.zeros((), x.dtype))


def attention(
    query: Float[Array, "b q h e"],
    keys: Float[Array, "b k h e"],
    value: Float[Array, "b k h e"],
    bias: Float[Array, "#b #h #q k"],
    *,
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "b q h e"]:
    """``softmax(q k' / sqrt(e) + bias) v``, a head at a time, as plain products; softmax in float32 at least.

    Args:
        query, keys, value: heads of width e, before the scale.
        bias: added to the scores; finite and very small for positions of padding.
        rate, key: dropout of the probabilities, as for `dropout`.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bqhe,bkhe->bhqk", query, keys, preferred_element_type=wide)
    return scored_attention(scores * query.shape[-1] ** -0.5 + bias, value, rate=rate, key=key)


def scored_attention(
    scores: Float[Array, "b h q k"], value: Float[Array, "b k h e"], *, rate: float, key: Key[Array, ""] | None
) -> Float[Array, "b q h e"]:
    """``softmax(scores) v``, a head at a time; `rate` and `key` of the probabilities' dropout."""
    probabilities = softmax(scores).astype(value.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", dropout(probabilities, rate, key), value)


def bias_of(seen: Bool[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """What is added to the scores of attention: 0 where a position is seen, else very small.

    Finite, so that a row in which nothing is seen, of padding alone, gives an even softmax and no NaN.
    """
    return jnp.where(seen, 0.0, jnp.finfo(dtype).min).astype(dtype)


def local_attention(
    query: Float[Array, "b t h e"],
    keys: Float[Array, "b t h e"],
    value: Float[Array, "b t h e"],
    real: Bool[Array, "b t"],
    *,
    reach: int,
    rate: float,
    key: Key[Array, ""] | None,
) -> Float[Array, "b t h e"]:
    """Attention of each position to those at most `reach` away, as plain products.

    Of long texts the score matrix is never whole: a block of `reach` queries meets its own keys and those of the blocks
    on both sides, ``t * 3 reach`` scores a head instead of ``t * t``. Source: Beltagy et al., arXiv 2004.05150.

    Args:
        query, keys, value: heads of width e, before the scale.
        real: which positions are no padding.
        reach: farthest distance.
        rate, key: dropout of the probabilities, as for `dropout`.
    """
    b, t, h, e = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)

    if t <= 3 * reach:
        near = np.abs(np.arange(t)[:, None] - np.arange(t)[None]) <= reach
        return attention(query, keys, value, bias_of(real[:, None, None] & near[None, None], wide), rate=rate, key=key)
    blocks = -(-t // reach)
    short = blocks * reach - t

    def with_neighbours(x):
        """``[b * blocks, 3 reach, ...]``."""
        padded = jnp.pad(x, [(0, 0), (reach, reach + short), *[(0, 0)] * (x.ndim - 2)])
        cut = padded.reshape(b, blocks + 2, reach, *x.shape[2:])
        joined = jnp.concatenate([cut[:, :-2], cut[:, 1:-1], cut[:, 2:]], axis=2)
        return joined.reshape(b * blocks, 3 * reach, *x.shape[2:])

    queries = jnp.pad(query, [(0, 0), (0, short), (0, 0), (0, 0)]).reshape(b * blocks, reach, h, e)
    near = np.abs(reach + np.arange(reach)[:, None] - np.arange(3 * reach)[None]) <= reach
    seen = with_neighbours(real)[:, None, None] & near[None, None]
    around = with_neighbours(keys), with_neighbours(value)
    found = attention(queries, *around, bias_of(seen, wide), rate=rate, key=key)
    return found.reshape(b, blocks * reach, h, e)[:, :t]


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _normal_cdf(x: Array) -> Array:
    return 0.5 * (1 + lax.erf(x * math.sqrt(0.5)))
