"""Layers of one kind, stacked and scanned, and the parts that families build them of."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from agwm_jax.core.deferred import is_deferred, materialise
from agwm_jax.models.family import Options
from agwm_jax.models.layers import layer_norm, linear

_FEW_LAYERS = 6
"""So many in one turn make a training step of MiniLM 10 to 15 % faster than a scan, and its programs compile one and a
half times as long; more would make compiling the longer part of a short run."""
_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def over_data(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """Keep the examples cut over the axis `data` of the mesh that is set (`jax.set_mesh`), if one is.

    Where weights are cut over that axis too, the partitioner may otherwise bring the examples of all devices to the
    parts of the weights, and not the weights, layer by layer, to the examples.
    """
    if "data" not in jax.sharding.get_abstract_mesh().axis_names:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data"))


def split(key: Key[Array, ""] | None, num: int) -> Key[Array, " num"] | list[None]:
    """`num` keys out of one, or as many None."""
    return [None] * num if key is None else jax.random.split(key, num)


def dense(module: nnx.Linear, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
    """``x @ kernel + bias``, if the module has one.

    A deferred kernel is computed here, and once more in the backward pass instead of kept.
    """
    kernel, bias = module.kernel.get_value(), None if module.bias is None else module.bias.get_value()
    if not is_deferred(kernel):
        return linear(x, jnp.asarray(kernel), None if bias is None else jnp.asarray(bias))
    return jax.checkpoint(lambda kernel, bias, x: linear(x, materialise(kernel), bias))(kernel, bias, x)


def norm(module: nnx.LayerNorm, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer norm with the module's weights."""
    bias = None if module.bias is None else jnp.asarray(module.bias.get_value())
    scale = jnp.asarray(module.scale.get_value())  # type: ignore[union-attr]  # it has one
    return layer_norm(x, scale, bias, epsilon=module.epsilon)


def make_linear(
    config: Any, options: Options, dtype: DTypeLike, rngs: nnx.Rngs, inputs: int, outputs: int, bias: bool = True
) -> nnx.Linear:
    """A dense layer that computes in `dtype`."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(
        inputs, outputs, use_bias=bias, dtype=dtype, param_dtype=options.wide, kernel_init=init, rngs=rngs
    )


def make_table(config: Any, options: Options, rngs: nnx.Rngs, rows: int, width: int | None = None) -> nnx.Embed:
    """A table of vectors of that width; None: that of the hidden state."""
    init = nnx.initializers.normal(config.initializer_range)
    width = width or config.hidden_size
    return nnx.Embed(rows, width, dtype=options.dtype, param_dtype=options.wide, embedding_init=init, rngs=rngs)


def make_norm(
    config: Any, options: Options, rngs: nnx.Rngs, width: int | None = None, *, bias: bool = True
) -> nnx.LayerNorm:
    """A norm over the width; None: that of the hidden state."""
    # The fast variance, E[x^2] - E[x]^2, loses too many digits for parity with the reference.
    return nnx.LayerNorm(
        width or config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=options.dtype,
        param_dtype=options.wide,
        use_fast_variance=False,
        use_bias=bias,
        rngs=rngs,
    )


class Stack(nnx.Module):
    """All layers of a model in one module whose weights carry a leading layer axis; applied by a scan over that axis.

    Layers that share their weights (``config.turns`` above 1) are there once, and the scan is taken as often.

    Args:
        layer: class of the layers: ``layer(config, options=, rngs=)``, called as ``(x, *shared, key=, **static)``.
        config: of the model.
        options: how it computes.
        rngs: stream "params" for the initial weights.
        kinds: of each layer, where they are not all computed alike; given to it as ``kind=``. The scan is over the
            shortest period of kinds, after the layers before the first of them.
    """

    def __init__(
        self,
        layer: Callable[..., nnx.Module],
        config: Any,
        *,
        options: Options,
        rngs: nnx.Rngs,
        kinds: Sequence[Any] | None = None,
    ) -> None:
        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> nnx.Module:
            return layer(config, options=options, rngs=rngs)

        self.layers = stack(rngs)
        self.depth, self.turns = config.depth, config.turns
        self.unroll = options.unroll or (self.depth if self.depth <= _FEW_LAYERS else 1)
        self.remat = options.remat
        self.kinds = None if kinds is None else tuple(kinds)

    def __call__(
        self, x: Float[Array, "b t d"], *shared: Any, key: Key[Array, ""] | None, **static: Any
    ) -> Float[Array, "b t d"]:
        """The last layer's output.

        Args:
            x: input of the first layer.
            shared: arrays, or pytrees of them, that every layer is given whole.
            key: of the dropout masks.
            static: keywords that every layer is given and that are part of the program.
        """
        graph, weights = nnx.split(self.layers)

        def layer(x, weights_and_key, **kind):
            weights, key = weights_and_key
            return nnx.merge(graph, weights)(x, *shared, key=key, **static, **kind), None

        def once_more(layer):
            """With what `remat` says computed again."""
            if self.remat == "none":
                return layer
            # Layers of one turn could share what they compute again, layers of two turns cannot.
            several = self.unroll > 1 or self.kinds is not None
            return jax.checkpoint(layer, policy=_POLICIES[self.remat], prevent_cse=several)

        def turn(x, key):
            own = weights, None if key is None else jax.random.split(key, self.depth)
            if self.kinds is None:
                return lax.scan(once_more(layer), x, own, unroll=self.unroll)[0], None
            layers = [once_more(partial(layer, kind=kind)) for kind in self.kinds]
            start, period, count = _period(self.kinds)
            end = start + period * count

            def several(x, own, first=start, number=period):
                for i in range(number):
                    x, _ = layers[first + i](x, jax.tree.map(lambda w, i=i: w[i], own))
                return x, None

            def between(low, high):
                return jax.tree.map(lambda w: w[low:high], own)

            x, _ = several(x, between(0, start), 0, start)
            stacked = jax.tree.map(lambda w: w.reshape(count, period, *w.shape[1:]), between(start, end))
            x, _ = lax.scan(several, x, stacked, unroll=max(1, self.unroll // period))
            return several(x, between(end, self.depth), end, self.depth - end)

        if self.turns == 1:
            return turn(x, key)[0]
        weights = materialise(weights)  # not in every turn again
        keys = None if key is None else jax.random.split(key, self.turns)
        return lax.scan(turn, x, keys, length=self.turns)[0]


def _period(kinds: Sequence[Any]) -> tuple[int, int, int]:
    """Where what repeats begins, the length of its period, and how often it comes whole; the shortest program."""
    best = (0, len(kinds), 1)
    for start in range(len(kinds)):
        for period in range(1, len(kinds) - start + 1):
            count = (len(kinds) - start) // period
            whole = kinds[start : start + period * count]
            if all(kind == whole[i % period] for i, kind in enumerate(whole)):
                found = (start, period, count)
                best = min(best, found, key=lambda each: (len(kinds) - each[1] * (each[2] - 1), each[0]))
    return best
