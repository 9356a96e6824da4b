"""Which calls run cuDNN's fused attention kernel, and how it is called; everything else is plain matrix products."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"
"""Of `jax.nn.dot_product_attention`, whose default is plain matrix products on every platform."""

_DTYPES = ("bfloat16", "float16")
_WIDEST_HEAD = 128  # 256 from compute capability 9.0 on, which no BERT needs


def fused_refusal(*, dtype: DTypeLike, head_width: int, length: int, dropout: bool) -> str | None:
    """Why a call that is differentiated in reverse mode only cannot run the fused kernel; None where it can.

    All of it is known when a program is traced, so a program has the one kernel or the other, never a choice of both.

    Args:
        dtype: of queries, keys and values.
        head_width: e, width of one head.
        length: t, tokens of a text with its padding.
        dropout: whether the call drops entries of the attention matrix, which the fused kernel never forms.
    """
    device, mesh = jax.devices()[0], jax.sharding.get_abstract_mesh()
    if "cuda" not in device.client.platform_version:
        return f"the device is no CUDA device but a {device.platform}"
    if tuple(int(x) for x in device.compute_capability.split(".")) < (8, 0):
        return f"the device has compute capability {device.compute_capability}, expected 8.0 or more"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"the computation is in {jnp.dtype(dtype).name}, expected {' or '.join(_DTYPES)}"
    if head_width % 8 or head_width > _WIDEST_HEAD:
        return f"a head is {head_width} wide, expected a multiple of 8 up to {_WIDEST_HEAD}"
    if length % 2:  # jax's check for gradients, which it makes as if there were a bias
        return f"texts are {length} tokens long, expected an even number"
    if dropout:
        return "attention dropout is on"
    # jax cuts the kernel's operands over a mesh each by itself: nothing keeps lengths and queries together.
    return f"the work is cut over {mesh.size} devices" if mesh.size > 1 else None


def fused_attention(
    query: Float[Array, "b t h e"],
    keys: Float[Array, "b t g e"],
    value: Float[Array, "b t g e"],
    lengths: Int[Array, "b"],
    *,
    causal: bool = False,
) -> Float[Array, "b t h e"]:
    """``softmax(q k' / sqrt(e)) v`` over the first ``lengths`` positions; the kernel has a reverse-mode rule alone.

    Padding must follow the real tokens, as `agwm_jax.data.encode` pads. A row of nothing but padding attends to its
    first position (plain attention: to all alike); what either gives means nothing, and is finite.

    Args:
        query, keys, value: heads of width e, before the scale; each key serves h / g heads.
        lengths: real tokens of each text.
        causal: attend to earlier positions and the own one alone.
    """
    # Not as a mask: the kernel wants one mask a pair of positions and, under `jax.vmap`, one a head too.
    # jax 0.10.2 maps the kernel over an axis only if all operands have it: lengths that several lanes share do not.
    zeros = jnp.logical_and(query[:, 0, 0, 0] > 0, False).astype(jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        keys,
        value,
        query_seq_lengths=zeros + query.shape[1],
        key_value_seq_lengths=zeros + jnp.maximum(lengths, 1).astype(jnp.int32),
        is_causal=causal,
        implementation=IMPLEMENTATION,
    )
