"""Test environment faults on real stores and a real ledger: a typed error, or the right result.

    a full disk             SQLite's pages run out, or any file may only grow so far
    read-only files         the ledger, a folder, everything
    lost checkpoints        vanished or truncated, for every command that may read one
    corrupt ledger pages    bytes flipped in random pages
    two writers             the lock, and SQLite's own
    an open reader          while a deletion empties the write-ahead log

Once a fault is over, the same command ends with the bytes of an undisturbed one. The confessing trainer
trains. `tests/unit/flows/requests/test_clock.py` tests a clock that jumps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sisa.store.ledger import sqlite as sqlite_module
from sisa.store.ledger.ledger import SqlLedger
from sisa.store.ledger.tables import RECORDS_TABLE
from tests.endurance import fuzz
from tests.endurance.fuzz import PROOF, SERIAL, Box, Result, answer_of, invoke, words
from tests.examples import is_full, num_examples

Line = tuple[str, ...]
pytestmark = pytest.mark.slow
AT = ("-m", "model")
FORGET: Line = ("forget", *AT, "p005-q1", *SERIAL)
RUN: Line = ("run", *AT, *SERIAL)
SUBMIT: Line = ("request submit", *AT, "p005-q1", "--external-id", "T-9", "--approver", "dpo")
ADD: Line = ("add", *AT, "later.jsonl", *SERIAL)
EXPORT: Line = ("export", *AT, "--to", "out")
READING = [line for line in fuzz.READING if line[0] != "doctor"]


class Ground:
    """Hold a model of 22 records in the working directory, and the answers of every command on it."""

    def __init__(self, box: Box, right: dict[Line, tuple[Any, dict[str, str]]]) -> None:
        self.box = box
        self.model = box.model
        self.ledger = box.model / "ledger.sqlite"
        self._right = right

    def right(self, line: Line) -> tuple[Any, dict[str, str]]:
        """Return a command's answer and the held files after it, undisturbed; reset the box."""
        if line not in self._right:
            self.box.reset()
            done = self.call(line)
            assert done.code == 0, done.out + done.err
            self._right[line] = answer_of(done), self.held()
        self.box.reset()
        return self._right[line]

    def call(self, line: Line) -> Result:
        if line == RUN:
            submitted = invoke(words(SUBMIT))
            if submitted.code != 0:
                return submitted
        return invoke(words(line))

    def held(self) -> dict[str, str]:
        """Return digests of all slice, index and checkpoint files."""
        rooms = ("records/", "index/", "checkpoints/")
        return {name: each for name, each in self.box.digest().items() if name.startswith(rooms)}

    def is_right(self, line: Line) -> None:
        """Carry out a command; it must end as on an undisturbed model."""
        done = self.call(line)
        assert done.code == 0, done.out + done.err
        assert self.held() == self._right[line][1]
        proof = invoke(words(PROOF))
        assert proof.code == 0, proof.out


@pytest.fixture(scope="module")
def _right() -> dict[Line, tuple[Any, dict[str, str]]]:
    """Return what undisturbed commands have answered so far."""
    return {}


@pytest.fixture
def ground(box: Box, _right: dict[Line, tuple[Any, dict[str, str]]]) -> Ground:
    return Ground(box, _right)


def typed(done: Result, *codes: int) -> None:
    """Check that the output is one JSON object with an error of one of these exit codes."""
    assert done.code in codes, done.out + done.err
    body = answer_of(done)
    assert body["error"]["next_step"] or body["error"]["message"]
    assert "Traceback" not in done.out + done.err


# --- a full disk


@contextlib.contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """Make writes beyond this size of a file fail as the system does (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def ledger_no_larger_than(pages: int) -> Iterator[None]:
    """Make SQLite answer `database or disk is full` as soon as it needs another page."""
    set_pragmas = sqlite_module._set_pragmas

    def limited(connection: Any, record: Any) -> None:
        set_pragmas(connection, record)
        connection.execute(f"PRAGMA max_page_count = {pages}").close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_module, "_set_pragmas", limited)
        yield


def full_at(
    ground: Ground, line: Line, limits: Sequence[contextlib.AbstractContextManager[None]]
) -> int:
    """Carry out a command under each limit, then without; return how many limits it reached."""
    met = 0
    for limit in limits:
        ground.right(line)
        before = ground.held()
        with limit:
            done = ground.call(line)
        if done.code != 0:
            met += 1
            typed(done, 6)
            where = answer_of(invoke(words(("where", *AT, "p005-q1"))))
            if line != ADD and where["records"][0]["state"] == "trained":
                assert invoke(words(PROOF)).code in (0, 4)  # 4: files that the ledger does not know yet
                assert before.items() <= ground.held().items()
        ground.is_right(line)
    return met


def test_sqlite_runs_out_of_pages(ground: Ground) -> None:
    """A deletion reuses pages that are there; a request with a long reason needs new ones."""
    with contextlib.closing(sqlite3.connect(ground.ledger)) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    assert full_at(ground, FORGET, [ledger_no_larger_than(pages)]) == 0
    telling = (*SUBMIT, "--reason", "because of this " * 1000)
    ground.box.reset()
    before = ground.box.digest()
    for more in range(4):
        with ledger_no_larger_than(pages + more):
            typed(invoke(words(telling)), 6)
        assert ground.box.digest() == before
    assert invoke(words(telling)).code == 0
    with ledger_no_larger_than(pages + 5):  # too few for the events of a run: it stops before or after
        done = invoke(words(("run", *AT, *SERIAL)))
    assert done.code in (0, 6)
    assert invoke(words(("run", *AT, *SERIAL))).code == 0
    assert ground.held() == ground.right(FORGET)[1]


@pytest.mark.parametrize("line", [FORGET, RUN, ADD], ids=lambda line: line[0])
def test_no_file_may_grow(ground: Ground, line: Line) -> None:
    """The sizes go from nothing, through the pages of the write-ahead log, to more than is needed."""
    first, last = range(4096, 36_000, 12_000), range(36_000, 330_000, 48_000)
    sizes = [0, 1000, *first, *last] if is_full() else [1000, *first[::2], *last[::2]]
    met = full_at(ground, line, [files_no_larger_than(size) for size in sizes])
    assert len(sizes) > met > 3


@pytest.mark.parametrize("size", [0, 700, 5000, 20_000, 60_000])
def test_an_export_that_does_not_fit_leaves_nothing_unknown(ground: Ground, size: int) -> None:
    ground.right(EXPORT)
    with files_no_larger_than(size):
        done = ground.call(EXPORT)
    if done.code:
        typed(done, 6)
    known = {each["path"] for each in answer_of(invoke(words(("status", *AT))))["exports"]}
    assert {str(each.parent.resolve()) for each in Path("out").rglob("*.safetensors")} <= known
    shutil.rmtree("out", ignore_errors=True)
    assert ground.call(EXPORT).code == 0


# --- read-only files


@contextlib.contextmanager
def read_only(paths: Sequence[Path]) -> Iterator[None]:
    """Make files and folders read-only; skip the test if root can't."""
    if os.geteuid() == 0:
        change = ("chattr", "+i"), ("chattr", "-i")
    else:
        change = ("chmod", "a-w"), ("chmod", "u+w")
    try:
        for path in paths:
            done = subprocess.run([*change[0], path], capture_output=True, check=False)
            if done.returncode:
                pytest.skip("nothing can be made read-only here")
        yield
    finally:
        for path in paths:
            subprocess.run([*change[1], path], capture_output=True, check=False)


READ_ONLY: dict[str, Callable[[Path], list[Path]]] = {
    "ledger": lambda model: [model / "ledger.sqlite"],
    "records": lambda model: [model / "records"],
    "index": lambda model: [model / "index"],
    "checkpoints": lambda model: [model / "checkpoints"],
    "one checkpoint": lambda model: sorted((model / "checkpoints").iterdir()),
    "directory": lambda model: [model],
    "all": lambda model: [*sorted(model.rglob("*")), model],
}


@pytest.mark.parametrize("line", [FORGET, RUN], ids=["forget", "run"])
@pytest.mark.parametrize("what", READ_ONLY)
def test_what_can_not_be_written_is_reported(ground: Ground, what: str, line: Line) -> None:
    ground.right(line)
    before = ground.held()
    with read_only(READ_ONLY[what](ground.model)):
        done = ground.call(line)
        typed(done, 6)
        if what in ("ledger", "directory", "all"):
            assert before.items() <= ground.held().items()  # more: written before the commit failed
    ground.is_right(line)


@pytest.mark.parametrize("line", READING, ids=" ".join)
@pytest.mark.parametrize("what", ["ledger", "directory", "all"])
def test_questions_to_what_can_not_be_written(ground: Ground, what: str, line: Line) -> None:
    right, _ = ground.right(line)
    with read_only(READ_ONLY[what](ground.model)):
        done = ground.call(line)
    if done.code:
        typed(done, 6)
    else:
        assert _without_log(answer_of(done)) == _without_log(right)


def _without_log(answer: dict[str, Any]) -> dict[str, Any]:
    """Leave out how much was read: a ledger that can't be written is opened without a log beside it."""
    scanned = {key: n for key, n in answer.get("scanned", {}).items() if key not in ("files", "bytes")}
    return {**answer, "scanned": scanned}


@pytest.mark.parametrize("line", [FORGET, RUN, EXPORT], ids=lambda line: line[0])
@pytest.mark.parametrize("what", ["ledger", "files"])
def test_a_read_only_file_system(
    ground: Ground, what: str, line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be made read-only, SQLite and Python are made to refuse."""
    ground.right(line)
    before = ground.held()
    set_pragmas = sqlite_module._set_pragmas

    def query_only(connection: Any, record: Any) -> None:
        set_pragmas(connection, record)
        connection.execute("PRAGMA query_only = ON").close()

    def refuses(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        if what == "ledger":
            patch.setattr(sqlite_module, "_set_pragmas", query_only)
        else:
            patch.setattr("sisa.store.blobs.files.tempfile.mkstemp", refuses)
            patch.setattr("sisa.store.blobs.files.tempfile.mkdtemp", refuses)
        typed(ground.call(line), 6)
    assert before.items() <= ground.held().items()
    assert not list(Path("out").rglob("*.safetensors"))
    if line == EXPORT:
        assert ground.call(line).code == 0
    else:
        ground.is_right(line)


# --- checkpoints


def lose(path: Path) -> None:
    shutil.rmtree(path)


def cut(name: str) -> Callable[[Path], None]:
    def truncate(path: Path) -> None:
        os.truncate(path / name, (path / name).stat().st_size // 2)

    return truncate


def empty(path: Path) -> None:
    for each in path.iterdir():
        each.unlink()


LOSSES: dict[str, Callable[[Path], None]] = {
    "vanished": lose,
    "adapter cut": cut("adapter_model.safetensors"),
    "optimizer cut": cut("optimizer.safetensors"),
    "manifest cut": cut("manifest.json"),
    "emptied": empty,
}
TRAINING = [FORGET, RUN, ADD]
MEETING: list[Line] = [
    *TRAINING,
    EXPORT,
    *(("generate", *AT, "--prompt", each) for each in ("Who?", "Where?")),
    ("status", *AT),
    PROOF,
    ("doctor", *AT),
]


def checkpoints_of(ground: Ground) -> list[str]:
    with contextlib.closing(SqlLedger(ground.ledger)) as ledger:
        return [each.key for each in ledger.checkpoints()]


def _turn(line: Line, loss: str) -> slice:
    """Return which checkpoints a command loses.

    What trains is the most expensive. In a full run, these commands together meet every loss of every
    checkpoint; otherwise every second one, another half with each loss.
    """
    if line not in TRAINING:
        return slice(None)
    turn = TRAINING.index(line) % 2
    return slice(turn, None, 2) if is_full() else slice(turn + 2 * ([*LOSSES].index(loss) % 2), None, 4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("line", MEETING, ids=lambda line: line[0])
def test_a_lost_checkpoint_is_reported_or_does_not_matter(ground: Ground, line: Line, loss: str) -> None:
    right, end = ground.right(line)
    for key in sorted(checkpoints_of(ground))[_turn(line, loss)]:
        ground.box.reset()
        LOSSES[loss](ground.model / "checkpoints" / key)
        before = ground.box.digest()
        done = ground.call(line)
        if line[0] in ("verify", "doctor"):
            assert done.code == 4, done.out
            assert key in done.out
            assert ground.box.digest() == before
        elif done.code:
            typed(done, 4)
        elif line not in TRAINING:
            assert answer_of(done) == right
        if line in TRAINING:
            repaired = invoke(words(("doctor", *AT, "--repair", *SERIAL)))
            assert repaired.code == 0, repaired.out
            again = ground.call(line)
            assert again.code == 0, again.out
            assert ground.held() == end


# --- corrupt pages


@pytest.mark.parametrize("seed", range(num_examples(200)))
def test_flipped_bytes_in_pages_of_the_ledger(ground: Ground, seed: int) -> None:
    """Put random bytes into a random page, a run of them, or another page's content."""
    source = random.Random(seed)
    line: Line = source.choice([*READING, FORGET, RUN, ("doctor", *AT), EXPORT])
    right, end = ground.right(line)
    data = bytearray(ground.ledger.read_bytes())
    size = 4096
    page = source.randrange(len(data) // size)
    how = source.choice(["bit", "bits", "run", "zero", "swap"])
    at = page * size + source.randrange(size)
    if how == "bit":
        data[at] ^= 1 << source.randrange(8)
    elif how == "bits":
        for _ in range(8):
            data[page * size + source.randrange(size)] ^= 1 << source.randrange(8)
    elif how == "run":
        count = min(source.choice([4, 64, 512]), len(data) - at)
        data[at : at + count] = source.randbytes(count)
    elif how == "zero":
        data[page * size : (page + 1) * size] = bytes(size)
    else:
        other = source.randrange(len(data) // size) * size
        data[page * size : (page + 1) * size] = data[other : other + size]
    ground.ledger.write_bytes(data)
    before = ground.held()
    done = ground.call(line)
    assert done.code in (0, 4), (how, page, line, done.out + done.err)
    if line[0] == "doctor":
        assert answer_of(done).keys() >= {"ok", "healthy", "findings"}
    elif line in (FORGET, RUN):
        if done.code == 0:
            assert ground.held() == end
        elif ground.held() != before:
            # Found after the commit: what is there is still of held records.
            assert invoke(words(PROOF)).code == 4
    elif line != EXPORT and done.code == 0:
        assert answer_of(done) == right


# --- two writers

HOLD = """
import sys
from pathlib import Path
from sisa.store.blobs.files import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
WRITERS: list[Line] = [  # requests are submitted and decided beside a writer
    FORGET,
    ("run", *AT, *SERIAL),
    EXPORT,
    ADD,
    ("train", "run.yaml", *SERIAL),
    ("train", "run.yaml", "--reconfigure", *SERIAL),
    ("verify", *AT, "--replay", "all", *SERIAL),
    ("gc", *AT),
    ("doctor", *AT, "--repair", *SERIAL),
]


@pytest.fixture
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait a twentieth of a second for locks instead of ten seconds."""
    create_engine = sa.create_engine
    monkeypatch.setattr(sqlite_module, "SCRUB_PATIENCE_S", 0.05)
    monkeypatch.setattr(
        sa, "create_engine", lambda url, **_: create_engine(url, connect_args={"timeout": 0.05})
    )


def test_two_writers_at_once(ground: Ground) -> None:
    """While another process holds the lock, commands that may write are refused and change nothing."""
    before = ground.box.digest()
    arguments = [sys.executable, "-c", HOLD, str(ground.model / "lock")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for line in WRITERS:
            typed(invoke(words(line)), 5)
            assert ground.box.digest() == before
            assert not Path("out").exists()
        for line in READING:
            done = invoke(words(line))
            typed(done, 5) if line[0] == "sweep" else None
            assert done.code in (0, 5)
        process.stdin.close()
    ground.right(FORGET)
    ground.is_right(FORGET)


@pytest.mark.usefixtures("quick_locks")
@pytest.mark.parametrize("line", [FORGET, RUN, EXPORT], ids=lambda line: line[0])
def test_a_foreign_process_writes_into_the_ledger(ground: Ground, line: Line) -> None:
    ground.right(line)
    before = ground.box.digest()
    with contextlib.closing(sqlite3.connect(ground.ledger, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        typed(ground.call(line), 5)
        other.execute("ROLLBACK")
    assert before.items() <= ground.box.digest().items()
    if line != EXPORT:
        ground.is_right(line)
    else:
        assert ground.call(line).code == 0


# --- a reader while a deletion empties the log


def bytes_at_rest(ground: Ground) -> bytes:
    return b"".join(each.read_bytes() for each in ground.model.glob("ledger.sqlite*"))


@pytest.mark.usefixtures("quick_locks")
@pytest.mark.parametrize("line", [FORGET, RUN], ids=["forget", "run"])
def test_a_reader_keeps_the_log_and_the_deletion_says_so(ground: Ground, line: Line) -> None:
    """SQLite reports it in a result row alone. The served model is clean all the same."""
    ground.right(line)
    rows = f"SELECT * FROM {RECORDS_TABLE.name}"  # noqa: S608
    with contextlib.closing(sqlite3.connect(ground.ledger, isolation_level=None)) as reader:
        reader.row_factory = sqlite3.Row
        place = answer_of(invoke(words(("where", *AT, "p005-q1"))))["records"][0]
        reader.execute("BEGIN")
        reader.execute(rows).fetchall()
        held = {each["record_digest"] for each in reader.execute(rows)}
        done = ground.call(line)
        typed(done, 5)
        (request,) = [
            each
            for each in answer_of(invoke(words(("request list", *AT))))["requests"]
            if each["state"] != "completed"
        ]
        assert (request["state"], request["cause"]) == ("erasure_failed", "Busy")
        with contextlib.closing(SqlLedger(ground.ledger)) as ledger:
            left = {each.record_digest for each in ledger.rows(place["shard"])}
            left |= {r.record_digest for s in range(3) for r in ledger.rows(s)}
            assert not {each.key for each in ledger.heads()} & {
                each["key"] for each in place["checkpoints"]
            }
        (gone,) = held - left
        assert gone.encode() in bytes_at_rest(ground)
        reader.execute("COMMIT")
    ended = invoke(words(("run", *AT, *SERIAL)))
    assert ended.code == 0, ended.out
    shown = answer_of(invoke(words(("request show", *AT, request["request_id"]))))
    states = [each["state"] for each in shown["events"]]
    assert shown["state"] == "completed"
    assert states[states.index("erasure_failed") :] == [
        "erasure_failed",
        "erased",
        "retrained",
        "completed",
    ]
    assert gone.encode() not in bytes_at_rest(ground)
    assert ground.held() == ground.right(line)[1]
