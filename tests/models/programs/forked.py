"""Run code in its own process that has trained nothing, without the seconds of importing torch.

    assert run_forked("import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL

A process of multiprocessing that has only imported modules forks for each call.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence

IMPORTS = ["sisa", "sisa.train", "sisa.lm.train.trainer", "pyarrow.dataset", "pandas", "faiss", __name__]


def run_forked(code: str, *arguments: object) -> int:
    """Run code as `python -c CODE ARGUMENTS` would in this environment; return its exit code.

    The code is the negative number of the signal if one ended it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)
    words = [*map(str, arguments)]
    process = context.Process(target=_run, args=(code, words, os.getcwd(), dict(os.environ)))
    with contextlib.closing(process):
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode


def _run(code: str, arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})  # noqa: S102 - a test's own
