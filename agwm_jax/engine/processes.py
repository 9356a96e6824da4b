"""Several processes as one run: who writes, what all agree on, and how the death of one ends the others."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from agwm_jax.errors import AgwmError

_HEARTBEAT_SECONDS = 60  # after so long without a sign of life a process is given up
_MESSAGE_BYTES = 2000
_SHARED_FILE_SECONDS = 15  # a network file system may show a new file late
_LAST_WORDS_SECONDS = 3  # for the others to say what they met

_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "OUT_OF_RANGE")
_SIGNS = (
    "gloo",
    "connection closed",
    "connection reset",
    "coordination",
    "heartbeat",
    "nccl",
    "barrier",
    "unavailable:",
)


class Launch(NamedTuple):
    """How this process finds the others."""

    coordinator: str
    """``host:port`` of process 0, or ``auto``: as SLURM, Open MPI, Kubernetes or a TPU pod say."""
    num_processes: int | None = None
    process_id: int | None = None


def connect(launch: Launch) -> None:
    """Join the processes of a run; call it before anything else asks JAX for a device.

    Raises:
        AgwmError: bad numbers, a cluster that was not recognised, or processes that did not come in time.
    """
    given = (launch.num_processes, launch.process_id)
    if launch.coordinator == "auto":
        address = None
        if given != (None, None):
            raise AgwmError("--coordinator auto takes the number of processes from the cluster: leave out the rest.")
    else:
        address = launch.coordinator
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise AgwmError(f"--coordinator {address}: expected host:port of process 0, such as node0:1234, or auto.")
        if launch.num_processes is None or launch.process_id is None:
            raise AgwmError(
                f"--coordinator {address} needs --num-processes N and --process-id I (0 to N - 1; 0 runs on that host)."
            )
        if not 0 <= launch.process_id < launch.num_processes:
            raise AgwmError(
                f"--process-id {launch.process_id} is outside 0 to {launch.num_processes - 1}, the numbers of "
                f"--num-processes {launch.num_processes}."
            )
    try:
        jax.distributed.initialize(
            address, launch.num_processes, launch.process_id, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS
        )
    except (RuntimeError, ValueError, TypeError) as error:
        what = "no cluster was recognised" if address is None else f"{address} was not reached"
        raise AgwmError(
            f"--coordinator {launch.coordinator}: {what} ({first_line(error)}); check that all processes were "
            "started, with one address and one number of processes, and that the port is free."
        ) from error


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_main() -> bool:
    """Whether this is the process that writes reports and exports."""
    return jax.process_index() == 0


def any_of(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    return bool(most(int(flag)))


def most(number: int) -> int:
    """The largest of what the processes say; all must ask."""
    return int(np.max(multihost_utils.process_allgather(np.array(number, np.int32)))) if several() else number


def all_see(path: Path) -> bool:
    """Whether a file that the main process has written is there for every process; all must ask."""
    deadline = time.monotonic() + _SHARED_FILE_SECONDS
    while several() and not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return not any_of(not path.exists())


def wait_for_all(what: str) -> None:
    """Go on when every process has come here."""
    if several():
        multihost_utils.sync_global_devices(what)


def fail_together(error: AgwmError | None) -> None:
    """Raise, in every process, what went wrong in the main one; all must call it.

    Raises:
        AgwmError: the main process's.
    """
    if not several():
        if error is not None:
            raise error
        return
    text = np.zeros(_MESSAGE_BYTES, np.uint8)
    encoded = str(error or "").encode()[:_MESSAGE_BYTES]
    text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    told = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="ignore")
    if told:
        raise AgwmError(told)


def lost(error: BaseException) -> AgwmError | None:
    """The sentence for an error that a peer's death caused, or None for any other.

    Which of its errors JAX raises then depends on what it was waiting for. So every error of its runtime is taken for
    it, but those that say what else is wrong, and so is what others (Orbax, a thread) made of one.
    """
    if not several() or isinstance(error, AgwmError):
        return None
    causes = list(_causes(error))
    if not any(_tells_of_a_peer(cause) for cause in causes):
        return None
    return AgwmError(
        f"process {jax.process_index()} of {jax.process_count()}: another process of this run died or cannot be "
        f"reached ({first_line(error)}); start the same command on all processes again, it continues at the last "
        "checkpoint."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _tells_of_a_peer(error: BaseException) -> bool:
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError):
        return not text.startswith(_OWN_FAULTS)
    return isinstance(error, Exception) and any(sign in text.lower() for sign in _SIGNS)


def leave(code: int) -> None:
    """End this process at once where others may wait for it: an orderly exit would wait for them in turn."""
    if jax.distributed.is_initialized() and several():
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main():
            time.sleep(_LAST_WORDS_SECONDS)  # with this process goes what connects the others
        os._exit(code)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a sentence."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
