"""A process of its own that trains a small method: ``python -m tests.engine.worker FOLDER``, to be killed by a test."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

import jax
import numpy as np

from agwm_jax.engine import processes
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.loop import Interrupted
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import gather_to_main
from agwm_jax.errors import AgwmError
from tests.engine.methods import build_members, layout, mixed, train


class Dying(InMemory):
    """Kills or interrupts this process when so many chunks were told."""

    def __init__(self, kill_at, interrupt_at):
        super().__init__(1)
        self.kill_at, self.interrupt_at, self.chunks = kill_at, interrupt_at, 0

    def chunk(self, member, phase, infos, *, step, offset):
        super().chunk(member, phase, infos, step=step, offset=offset)
        self.chunks += 1
        if self.chunks == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.chunks == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--interrupt-at", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--process", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.port is not None:
        processes.connect(processes.Launch(f"127.0.0.1:{arguments.port}", 2, arguments.process))
    observer = Dying(arguments.kill_at, arguments.interrupt_at)
    where = layout(1, jax.device_count())
    checkpoints = Checkpoints(arguments.folder / "checkpoints", keep=2, fingerprint="toy")
    options = {"checkpoint_minutes": 1e-9, "chunk_steps": 2, "checkpoints": checkpoints, "observer": observer}
    outcome, _ = train(build_members(mixed, (3,)), where, **options)
    learnt = gather_to_main(outcome.learnt[0], where.placement)
    print(*observer.said)
    if processes.is_main():
        leaves, _ = jax.tree.flatten(learnt)
        np.savez(arguments.folder / "learnt.npz", *leaves, losses=[one["loss"] for one in observer.records[0]])
    processes.wait_for_all("the end")


if __name__ == "__main__":
    try:
        main()
    except Interrupted as error:
        print(error)
        processes.leave(130)
        sys.exit(130)
    except Exception as error:
        lost = error if isinstance(error, AgwmError) else processes.lost(error)
        print(lost) if lost else traceback.print_exc()
        processes.leave(2 if lost else 1)
        sys.exit(2 if lost else 1)
