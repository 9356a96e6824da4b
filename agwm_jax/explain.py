"""What went wrong, in one sentence and an exit code: for errors of any library that reach the command line."""

import errno
import os
import sys
from collections.abc import Iterator

from agwm_jax.errors import AgwmError

UNEXPECTED, MISTAKE = 1, 2

_OUT_OF_MEMORY = (
    "out of memory; say --run.vectorize none, --data.accumulate 2 or --model.remat full, or lower --data.batch_size or "
    "--data.max_length"
)
_DISK_FAULTS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again, it continues where it was saved",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EROFS: "the disk is read-only; choose another folder with --output",
    errno.EACCES: "no permission; choose another folder or change its permissions",
    errno.EPERM: "not permitted; choose another folder or change its permissions",
    errno.ENOENT: "no such file or folder",
    errno.EEXIST: "exists already",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EISDIR: "a folder, where a file is needed",
}


def explain(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for an error that reached the command line."""
    error = _lost_process(error) or _missing_platform(error) or error
    for cause in _causes(error):
        if isinstance(cause, AgwmError):
            return str(cause), MISTAKE
    for cause in _causes(error):
        if isinstance(cause, OSError):
            place = f"{cause.filename}: " if cause.filename else ""
            reason = _DISK_FAULTS.get(cause.errno or 0) or cause.strerror or " ".join(str(cause).split())
            return f"{place}{reason}", MISTAKE
        # The checkpoint library reports a full disk from C++, as a text in another kind of exception.
        if "No space left on device" in str(cause):
            return _DISK_FAULTS[errno.ENOSPC], MISTAKE
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return _OUT_OF_MEMORY, MISTAKE
    missing = getattr(error, "name", None)
    if isinstance(error, ModuleNotFoundError) and missing and not missing.startswith("agwm_jax"):
        return f"the package {missing} is not installed; pip install 'agwm-jax[train]'", MISTAKE
    first_line = next(iter(str(error).strip().splitlines()), "no message")
    return f"unexpected {type(error).__name__}: {first_line}; run again with --debug to see where", UNEXPECTED


def _lost_process(error: Exception) -> AgwmError | None:
    """The sentence, where one of several processes is gone; JAX then raises whatever it was waiting for."""
    jax, processes = sys.modules.get("jax"), sys.modules.get("agwm_jax.engine.processes")
    return processes.lost(error) if jax and processes and jax.distributed.is_initialized() else None


def _missing_platform(error: Exception) -> AgwmError | None:
    """The sentence, where the environment asks JAX for devices that it does not have here."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not asked or jax is None or not isinstance(error, AssertionError | RuntimeError):
        return None
    try:
        jax.devices()
    except (AssertionError, RuntimeError):
        jax.config.update("jax_platforms", None)
        there = ", ".join(sorted({device.platform for device in jax.devices()} | {"cpu"}))
        return AgwmError(
            f"JAX_PLATFORMS={asked} asks for devices that JAX does not find here; it finds {there}: unset "
            "JAX_PLATFORMS, or install what they need (pip install 'agwm-jax[cuda]', or [tpu])"
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__
