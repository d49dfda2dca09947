"""End a local Ray whose driver was killed. Run as a separate process that waits for the driver's end.

    python reaper.py PRIVATE_DIR < pipe from the driver

The word OVER means that the driver ended its Ray itself. An end of the pipe without it means that the
driver was killed: the reaper then kills every process that uses the private directory, and removes it.
It runs in its own session, so that a hang-up or an interrupt of the driver's terminal does not reach it.
It imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

OVER = b"over"
REAP_EVERY_S, REAP_FOR_S = 0.1, 30.0


def reap(private_dir: str) -> None:
    """Kill all processes of a private directory, then remove the directory."""
    deadline = time.monotonic() + REAP_FOR_S
    while (found := _belonging(private_dir)) and time.monotonic() < deadline:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(REAP_EVERY_S)
    shutil.rmtree(private_dir, ignore_errors=True)


def _belonging(private_dir: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            if process.name != str(os.getpid()) and _uses(process, private_dir):
                found.append(int(process.name))
    return found


def _uses(process: Path, private_dir: str) -> bool:
    """Return whether a process names the directory in its command line or environment, or has it open.

    Ray's processes change their titles, which may overwrite their command line and environment.
    """
    found = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
    return private_dir.encode() in found or any(
        os.readlink(each).startswith(private_dir) for each in (process / "fd").iterdir()
    )


if __name__ == "__main__" and sys.stdin.buffer.read() != OVER:
    reap(sys.argv[1])
