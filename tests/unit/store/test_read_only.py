"""A model that cannot be written, on a read-only medium or in a backup, answers like any other."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sisa.flows.wiring.ledger_place import LEDGER
from sisa.model import Model
from tests.models.confessing import DELETED, build, built_pair, delete, record, use_fake_resources
from tests.models.programs.frozen import BOUND, freeze

pytestmark = pytest.mark.skipif(
    bool(BOUND) and shutil.which("setpriv") is None, reason="root, without setpriv"
)
ASK = """
import json, sys
from sisa import open_model
from sisa.core.errors import SisaError

model = open_model(sys.argv[1], executor="serial")
questions = {
    "status": lambda: model.status().records,
    "where": lambda: [place.state for place in model.where(json.loads(sys.argv[2]))],
    "find": lambda: model.find(text=sys.argv[3])[0].id,
    "requests": lambda: len(model.requests()),
    "verify": lambda: [each.what for each in model.verify().findings],
    "forget": lambda: model.forget(json.loads(sys.argv[2])),
}
found = {}
for name, question in questions.items():
    try:
        found[name] = question()
    except SisaError as error:
        found[name] = [type(error).__name__, error.what, error.next_step]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def frozen(pair: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """Yield a model after a deletion in which nothing can be written."""
    directory = Path(shutil.copytree(pair[1], tmp_path / "model"))
    yield directory
    freeze(directory, writable=True)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def asked(directory: Path) -> dict[str, Any]:
    """Return the answers of a process that can't write, with the directory as it was."""
    freeze(directory)
    before = content(directory)
    ids = json.dumps([record(1).id, record(DELETED).id])
    command = [*BOUND, sys.executable, "-c", ASK, str(directory), ids, record(1).text]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(directory) == before
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_can_not_be_written_is_asked_all_the_same(frozen: Path) -> None:
    found = asked(frozen)
    kind, what, _ = found.pop("forget")
    assert (kind, "disk refused" in what) == ("EnvironmentFault", True)
    assert found == {
        "status": 23,
        "where": ["trained", "deleted"],
        "find": record(1).id,
        "requests": 1,
        "verify": [],
    }


def test_a_log_that_was_copied_along_is_read(frozen: Path) -> None:
    """A backup that was made while a process was at work: the last commits are in the log alone."""
    ledger = frozen / LEDGER
    with closing(sqlite3.connect(ledger)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint = 0")
        writer.execute("SELECT 1 FROM meta").fetchall()
        delete(frozen, 8)
        writer.execute("SELECT 1 FROM meta").fetchall()
        for name in ("", "-wal", "-shm"):
            shutil.copy(f"{ledger}{name}", f"{ledger}{name}.copy")
    for name in ("", "-wal", "-shm"):
        Path(f"{ledger}{name}.copy").replace(f"{ledger}{name}")
    assert asked(frozen)["status"] == 22


def test_a_copy_that_is_behind_its_witness_is_not_asked_for_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_resources(monkeypatch)
    build(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "backup")
    Model(tmp_path / "model", executor="serial").forget([record(DELETED).id])
    found = asked(tmp_path / "backup")
    freeze(tmp_path / "backup", writable=True)
    assert (found.pop("status"), found.pop("verify")) == (24, [])
    del found["forget"]
    assert {kind for kind, _, _ in found.values()} == {"EnvironmentFault"}
    assert all(what.startswith("this copy of the model still holds") for _, what, _ in found.values())


def test_the_doctor_reads_a_ledger_that_can_not_be_written(frozen: Path) -> None:
    freeze(frozen)
    code = (
        "import sys\nfrom pathlib import Path\nfrom sisa.audit.doctor import diagnose\n"
        "print({each.kind for each in diagnose(Path(sys.argv[1])).findings})"
    )
    command = [*BOUND, sys.executable, "-c", code, str(frozen)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "{'read_only'}", done.stderr
