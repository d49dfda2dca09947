"""Run commands in a process of their own, to see what they import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

CODE = """
import json, sys
from cluster.cli.cli import run
for command in json.loads(sys.argv[1]):
    assert run(command) == 0, command
print(*sys.modules, file=sys.stderr)
"""


def imported_by(*commands: Sequence[object]) -> set[str]:
    """Return the modules of a new process that carries out these commands."""
    words = json.dumps([[*map(str, command)] for command in commands])
    code = [sys.executable, "-c", CODE, words]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.splitlines()[-1].split())
