"""A process that another one started ends when that one is killed."""

import ctypes
import os
import signal
import sys

PARENT = "AGWM_JAX_PARENT"
"""Environment variable: the number of the process that started this one and is not to be outlived."""

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Be killed when the process that `PARENT` names dies, on Linux; nothing where it is not set.

    A killed sweep cannot stop what it started, which would go on writing and hold its folder against the same command
    given again. A checkpoint is as good as after any other kill.
    """
    parent = os.environ.pop(PARENT, None)  # what this process starts has another one
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before that was said
        os.kill(os.getpid(), signal.SIGKILL)
