"""Deterministic kernels on a GPU: what JAX must be told before it starts a device."""

import os

from jax._src import xla_bridge

from agwm_jax.errors import AgwmError

_FLAG = "--xla_gpu_deterministic_ops=true"


def use_deterministic_kernels() -> None:
    """Let every program of this process give the same bits each time it runs on a GPU; a CPU's do anyway.

    Raises:
        AgwmError: JAX has started a device already, so that it is too late.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG in flags.split():
        return
    if xla_bridge.backends_are_initialized():
        raise AgwmError(
            f"run.deterministic: JAX has started its devices already; set XLA_FLAGS={_FLAG} before Python starts, or "
            "train before anything else asks for a device."
        )
    os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}".strip()
