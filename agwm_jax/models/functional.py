"""Turning a Flax NNX module into a pure function of a flat dict of parameters."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import nnx

from agwm_jax.core.deferred import materialise
from agwm_jax.errors import AgwmError


def functionalize(
    module: nnx.Module, method: str = "__call__", scanned: Collection[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Split a module once into a pure function and its parameters.

    Use `jax.jit` and `jax.grad` on the result; `nnx.jit` and `nnx.grad` would need about twice the temporaries.

    Args:
        module: every `nnx.Param` becomes an entry of the flat dict. All other variables are constants of the function
            and what a call writes to them is dropped; randomness must therefore come in as an argument, not from a
            stream the module holds.
        method: the name of the method that is called.
        scanned: paths of weights whose `Deferred` values the module materialises by itself; all others are materialised
            before the call.

    Returns:
        ``call(params, *arguments, **keywords)``, and `params`: a dict from path ("encoder.layers.query.kernel") to
        array. A module of shapes only (`nnx.eval_shape`) gives a dict of `jax.ShapeDtypeStruct`.

    Raises:
        AgwmError: by the function, if the paths are not exactly those of the module.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> class Head(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.classifier = nnx.Linear(3, 2, rngs=rngs)
    ...     def logits(self, x):
    ...         return self.classifier(x)
    >>> logits, params = functionalize(Head(nnx.Rngs(0)), "logits")
    >>> sorted(params)
    ['classifier.bias', 'classifier.kernel']
    >>> logits(params, jnp.ones((4, 3))).shape
    (4, 2)
    """
    graph, state, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]  # flax's own annotation
    variables = {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}

    def call(params: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        if params.keys() != variables.keys():
            raise AgwmError(
                f"The parameters do not belong to this model: missing {_some(variables.keys() - params.keys())}, "
                f"unknown {_some(params.keys() - variables.keys())}."
            )
        values = {name: params[name] if name in scanned else materialise(params[name]) for name in variables}
        state = nnx.from_flat_state([(path, v.replace(values[name])) for name, (path, v) in variables.items()])
        return getattr(nnx.merge(graph, state, rest), method)(*arguments, **keywords)

    return call, {name: variable.get_value() for name, (_, variable) in variables.items()}


def _some(paths: Collection[str]) -> str:
    listed = sorted(paths)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") or "none"
