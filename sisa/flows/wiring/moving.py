"""Move a model's ledger to a server, to another one, or back to a file, with all rows compared.

    MODEL/ledger.url     names the ledger's server: while it is there, it is the ledger
    MODEL/ledger.left    URLs that a move writes to, or moved away from: what MODEL/ledger.url does not
                         name of them is erased

The new ledger is filled and compared in one transaction. Writing or removing MODEL/ledger.url
completes the move: before, the model uses the old ledger, and afterwards the new one. The next writer
erases what a killed move left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core.errors import InvalidInput
from sisa.core.ports import Change
from sisa.flows.wiring.description import describe, model_id
from sisa.flows.wiring.ledger_place import (
    LEDGER,
    LEDGER_URL,
    check_free,
    check_model,
    ledger_place,
    lock_beside,
    model_lock,
    open_ledger,
)
from sisa.store.blobs import files
from sisa.store.blobs.sqlite_files import SQLITE_FILES
from sisa.store.ledger.database import backend_at, upgrade_ledger
from sisa.store.ledger.ledger import SqlLedger, erase_ledger

LEDGERS_LEFT = "ledger.left"  # URLs of ledgers to erase, unless LEDGER_URL names them
UNFINISHED = f"{files.TEMPORARY_PREFIX}{LEDGER}"  # a file that a move fills


@dataclass(frozen=True, slots=True)
class LedgerMoved:
    """Where a ledger was and is, its last commit, and its rows by table, all compared."""

    before: str
    now: str
    seq: int
    rows: dict[str, int]


def move_ledger(directory: Path, to: str | None) -> LedgerMoved:
    """Move a model's ledger to a URL, or to a file in its directory. Raise ConfigConflict, Busy.

    The target must be empty. The model's run file, as the ledger keeps it, names the new place.
    """
    check_model(directory)
    describe(directory)  # refuses what was never committed, and another model's key
    target = directory / LEDGER if to is None else to
    with _alone(directory, target) as place:
        erase_left(directory)
        if isinstance(target, str):
            check_free(target)
        urls = [each for each in (place, target) if isinstance(each, str)]
        files.write_atomic(directory / LEDGERS_LEFT, "\n".join(urls).encode())
        moved = _fill(directory, place, target)
        if isinstance(target, str):
            files.write_atomic(directory / LEDGER_URL, f"{target}\n".encode())
        else:
            files.erase_all(directory, [LEDGER_URL])
        erase_left(directory)
    return moved


@contextlib.contextmanager
def _alone(directory: Path, target: Path | str) -> Iterator[Path | str]:
    """Lock out writers and decisions about requests at both locations; yield the present one."""
    with model_lock(directory) as place:
        if target == place:
            raise InvalidInput("the ledger is there already", where=str(target))
        with contextlib.closing(backend_at(place)) as own, lock_beside(target), own.exclusive():
            yield place


def _fill(directory: Path, place: Path | str, target: Path | str) -> LedgerMoved:
    """Fill and compare the new ledger, which then names its place in the run file."""
    new = target if isinstance(target, str) else directory / UNFINISHED
    with (
        contextlib.closing(SqlLedger(place)) as old,
        contextlib.closing(SqlLedger(new, create=True)) as ledger,
    ):
        rows = ledger.copy(old)
        config = RunConfig.from_canonical(ledger.meta()["config"])
        named = config.model_copy(update={"ledger": target if isinstance(target, str) else None})
        seq = ledger.commit(Change(meta={"config": named.to_canonical()}))
        ledger.scrub()
    if isinstance(new, Path):
        with files.disk_errors(directory):
            new.rename(directory / LEDGER)
            files.sync_directory(directory)
    return LedgerMoved(str(place), str(target), seq, rows)


def is_unfinished(directory: Path) -> bool:
    """Return whether a killed move of the ledger left something to erase."""
    both = all((directory / each).is_file() for each in (LEDGER, LEDGER_URL))
    return both or (directory / LEDGERS_LEFT).is_file()


def erase_left(directory: Path) -> None:
    """Erase the ledgers that a move left, if one did; the caller holds the writer lock."""
    place, left = ledger_place(directory), directory / LEDGERS_LEFT
    if isinstance(place, str):
        _erase_file(directory / LEDGER)
    if left.is_file():
        _erase_file(directory / UNFINISHED)
        for url in left.read_text(encoding="utf-8").split():
            if url != place:
                erase_ledger(url, _model(directory))
        files.erase_all(directory, [LEDGERS_LEFT])


def upgrade_model(directory: Path) -> tuple[str, bool]:
    """Upgrade a ledger of an earlier version; return where it is, and whether it was upgraded."""
    check_model(directory)
    with model_lock(directory) as place:
        return str(place), upgrade_ledger(place)


def _model(directory: Path) -> str:
    with open_ledger(directory) as ledger:
        return model_id(ledger.meta())


def _erase_file(path: Path) -> None:
    """Overwrite and remove a SQLite ledger and the files beside it."""
    held = [each for each in (Path(f"{path}{suffix}") for suffix in SQLITE_FILES) if each.exists()]
    with files.disk_errors(path):
        for each in held:
            files.overwrite(each)
    files.erase_all(path.parent, [each.name for each in held])
