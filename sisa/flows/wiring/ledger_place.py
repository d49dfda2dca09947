"""Find a model's ledger, open it, and lock it: a file in its directory, or a database on a server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from sisa.config.fields import ledger_url
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.store.blobs import files
from sisa.store.ledger.database import ledger_version
from sisa.store.ledger.ledger import SqlLedger

LEDGER, LOCK = "ledger.sqlite", "lock"
LEDGER_URL = "ledger.url"  # names a ledger on a server, in place of the file


def ledger_place(directory: Path) -> Path | str:
    """Return where a model's ledger is: the URL that its directory names, or the path of its file."""
    try:
        text = (directory / LEDGER_URL).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return directory / LEDGER
    except (OSError, UnicodeDecodeError) as error:
        raise EnvironmentFault(f"can't be read: {error}", where=str(directory / LEDGER_URL)) from error
    try:
        return ledger_url(text)
    except ValueError as error:
        where, step = str(directory / LEDGER_URL), "restore it from a backup"
        raise IntegrityError("names no ledger", where=where, got=str(error), next_step=step) from None


def has_ledger(directory: Path) -> bool:
    """Return whether a directory has a ledger, or names one."""
    return any((directory / each).is_file() for each in (LEDGER, LEDGER_URL))


def check_model(directory: Path) -> None:
    """Raise InvalidInput if there is no model in a directory."""
    if not has_ledger(directory):
        raise no_model(directory)


def no_model(directory: Path) -> InvalidInput:
    """Return the error for a directory without a model. It names a model in a folder of it."""
    inside = [each.parent for name in (LEDGER, LEDGER_URL) for each in directory.glob(f"*/{name}")]
    return InvalidInput(
        "there is no model in this directory",
        where=str(directory),
        expected=f"a directory with {LEDGER}",
        next_step=f"name the folder in it that is one: {min(inside)}"
        if inside
        else "train one with `sisa train RUN.yaml`",
    )


def ledger_name(directory: Path) -> str:
    """Return the name of the ledger's file, or of the file that names its server."""
    return LEDGER if isinstance(ledger_place(directory), Path) else LEDGER_URL


def open_ledger(directory: Path, *, create: bool = False) -> AbstractContextManager[SqlLedger]:
    """Open a model's ledger until the end of the block. Raise IntegrityError, EnvironmentFault."""
    return contextlib.closing(SqlLedger(ledger_place(directory), create=create))


def claim_ledger(directory: Path, url: str | None) -> None:
    """Reserve a URL for a new model's ledger. Raise ConfigConflict if another ledger is there."""
    here = ledger_place(directory)
    if isinstance(here, str) and here != url:
        raise ConfigConflict(
            "the directory names another ledger than the run file",
            where=str(directory / LEDGER_URL),
            expected=url or "no ledger on a server",
            got=here,
            next_step="correct the run file, or choose an empty directory",
        )
    if url is None or here == url:
        return
    check_free(url)
    files.write_atomic(directory / LEDGER_URL, f"{url}\n".encode())


def check_free(url: str) -> None:
    """Raise ConfigConflict if there is a ledger at a URL."""
    if ledger_version(url) != 0:
        raise ConfigConflict(
            "there is a ledger already, of another model or of another directory",
            where=url,
            next_step="give each model a database or a schema of its own",
        )


@contextlib.contextmanager
def model_lock(directory: Path, url: str | None = None) -> Iterator[Path | str]:
    """Hold a model's only writer lock, beside its ledger; a new model's will be at `url`.

    Yield the place of the present ledger. Raise Busy.
    """
    place = ledger_place(directory)
    with lock_beside(place if isinstance(place, str) else url or place):
        if ledger_place(directory) != place:
            raise Busy("the ledger has just been moved", where=str(directory), next_step="try again")
        yield place


def lock_beside(place: Path | str) -> AbstractContextManager[None]:
    """Return the writer lock of a ledger: a file beside its own, or a lock of its server."""
    if isinstance(place, Path):
        return files.writer_lock(place.with_name(LOCK))
    from sisa.store.ledger.postgres import advisory_lock

    return advisory_lock(place, "writer")
