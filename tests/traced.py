"""List the files of this program that one `sisa forget` runs code of, in a process of its own.

    python -m tests.traced

A small model is trained, and one record is deleted from it by the command line, with the serial
executor. A file counts when one of its functions is called; files that are only imported do not.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import threading
from inspect import CO_NEWLOCALS
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import sisa
from tests.models.tiny_base import make_tiny_base

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("sisa", "approx", "cluster")


def house_files(paths: set[str]) -> list[str]:
    """Return those paths that are files of the three houses, from the root."""
    inside = [Path(each).relative_to(ROOT) for each in paths if each.startswith(f"{ROOT}/")]
    return sorted(each.as_posix() for each in inside if each.parts[0] in HOUSES)


def trace(*arguments: str) -> dict[str, list[str]]:
    """Run `sisa ARGUMENTS` in this process; return the files whose functions ran, and all imported."""
    called: set[CodeType] = set()

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call":
            called.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        from cluster.cli.cli import main

        sys.argv = ["sisa", *arguments]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    functions = [each for each in called if each.co_flags & CO_NEWLOCALS]
    imported = {str(getattr(each, "__file__", None)) for each in list(sys.modules.values())}
    return {
        "run": house_files({each.co_filename for each in functions}),
        "imported": house_files(imported),
    }


def train_small(directory: Path) -> None:
    """Train a model of 12 records in two shards."""
    rows = [
        {"id": f"r{n}", "subject_id": f"s{n}", "prompt": f"Who is {n}?", "completion": f"Number {n}."}
        for n in range(12)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "base_model": str(make_tiny_base(directory / "base")),
        "datasets": [{"path": str(directory / "rows.jsonl")}],
        "output_dir": str(directory / "model"),
        "sisa": {"shards": 2, "slices": 2, "embedder": "hashing"},
        "witness": str(directory / "witness"),
    }
    (directory / "run.yaml").write_text(json.dumps(settings))
    sisa.train_model(directory / "run.yaml", executor="serial", report=lambda _event: None)


def traced_forget() -> dict[str, list[str]]:
    """Train a small model, delete a record of it in a fresh process, and return the files of that."""
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        train_small(directory)
        arguments = ["forget", "-m", str(directory / "model"), "r3", "--executor", "serial"]
        done = subprocess.run(
            [sys.executable, "-m", "tests.traced", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    found: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(trace(*sys.argv[1:])))
    else:
        found = traced_forget()
        print("\n".join(found["run"]))
        print(f"{len(found['run'])} files run; {len(found['imported'])} are imported")
