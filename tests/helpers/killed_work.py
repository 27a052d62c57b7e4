"""A command that works in parts and is killed: ``COMMAND=NAME KILL=N python -m tests.helpers.killed_work OVERRIDES…``.

The process that writes the Nth file kills itself with SIGKILL when the file is written but not yet in its place. Without ``KILL``
the command goes through.
"""

from __future__ import annotations

import os
import signal
import stat

from rae.cli import main

if __name__ == "__main__":
    command = os.environ["COMMAND"]  # not an argument: further processes are started with the same ones
    if os.environ.get("KILL"):
        sync, left = os.fsync, int(os.environ["KILL"])

        def count(handle: int) -> None:
            global left
            left -= stat.S_ISREG(os.fstat(handle).st_mode)  # folders are written through too
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = count
    getattr(main, command)()
