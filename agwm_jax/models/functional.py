"""Turning a Flax NNX module into a pure function of a flat dict of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Key

from agwm_jax.errors import AgwmError

Apply = Callable[..., Float[Array, "b c"]]


def functionalize(module: nnx.Module) -> tuple[Apply, dict[str, Any]]:
    """Split a module once into a pure function and its parameters.

    Use `jax.jit` and `jax.grad` on the result; `nnx.jit` and `nnx.grad` would need about twice the temporaries.

    Args:
        module: called as `module(batch, *, key=None)`, with whatever other keywords `apply` is given.
            Every `nnx.Param` becomes an entry of the flat dict. All other variables are constants of `apply` and what a
            call writes to them is dropped; randomness must therefore come from `key`, not from a stream the module
            holds.

    Returns:
        `apply(params, batch, *, key=None, **keywords)`, and `params`: a dict from path ("encoder.layers.query.kernel")
        to array. A module of shapes only (`nnx.eval_shape`) gives a dict of `jax.ShapeDtypeStruct`.

    Raises:
        AgwmError: by `apply`, if the paths are not exactly those of the module.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Head(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.classifier = nnx.Linear(3, 2, rngs=rngs)
    ...     def __call__(self, batch, *, key=None):
    ...         return self.classifier(batch["x"])
    >>> apply, params = functionalize(Head(nnx.Rngs(0)))
    >>> sorted(params)
    ['classifier.bias', 'classifier.kernel']
    >>> apply(params, {"x": jnp.ones((4, 3))}).shape
    (4, 2)
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]  # flax's own annotation
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}

    def apply(
        params: Mapping[str, Array], batch: Any, *, key: Key[Array, ""] | None = None, **keywords: Any
    ) -> Float[Array, "b c"]:
        if params.keys() != variables.keys():
            raise AgwmError(
                f"The parameters do not belong to this model: missing {sorted(variables.keys() - params.keys())}, "
                f"unknown {sorted(params.keys() - variables.keys())}."
            )
        state = nnx.from_flat_state(
            [(path, variable.replace(params[name])) for name, (path, variable) in variables.items()]
        )
        return nnx.merge(graph, state, rest)(batch, key=key, **keywords)

    return apply, {name: variable.get_value() for name, (_, variable) in variables.items()}
