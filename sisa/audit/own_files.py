"""Search a model's own files for what a deletion removed: a certificate states what was found."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sisa.audit.foreign_files import SealedFiles, Shredded, Unreadable, parquet_ids
from sisa.audit.search_strings import SearchStrings, is_short
from sisa.flows.context.context import Context
from sisa.store.blobs.files import walk
from sisa.store.blobs.local_blobs import local_root


@dataclass(frozen=True, slots=True)
class Searched:
    """Hold what a search of a model's own files read and left out, and the files by string in them."""

    num_files: int
    num_bytes: int
    num_left_out: int
    found: Mapping[str, int] = field(repr=False)


def search_model(
    context: Context, directory: Path, ids: Sequence[str], texts: Sequence[str], max_bytes: int
) -> Searched:
    """Search a model's own files for what was deleted, smaller ones first, up to a number of bytes.

    The rows of its slices are those of held records, so there an id is compared with ids alone. Strings
    that are too short for raw bytes are searched nowhere else. Objects in a bucket are left out.
    """
    strings = [each for each in dict.fromkeys((*ids, *texts)) if not is_short(each)]
    search, sealed = SearchStrings(strings), SealedFiles(context.stores.keyring)
    slices = {each.name for each in context.stores.ledger.slices()}
    found, num_files, num_bytes = Counter[str](), 0, 0
    left_out = _num_objects(context)
    for size, path in sorted(_own_files(context, directory)):
        if num_bytes + size > max_bytes:
            left_out += 1
            continue
        try:
            plain = sealed.plaintext(path)
            if path.name in slices:
                rows = parquet_ids(path if plain is None else io.BytesIO(plain))
                found.update({each for row in rows for each in row}.intersection(ids))
            else:
                hits = {each.number for each in search.in_file(path, plain, tables=False)}
                hits |= {*search.in_value(path.name)}
                found.update(strings[number] for number in hits)
        except FileNotFoundError:
            continue
        except (OSError, Unreadable):
            left_out += 1
            continue
        except Shredded:
            pass  # no key opens it
        num_files, num_bytes = num_files + 1, num_bytes + size
    return Searched(num_files, num_bytes, left_out, found)


def _own_files(context: Context, directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield the files of a model on this machine with their sizes."""
    roots = [root for each in context.stores.blobs.values() if (root := local_root(each)) is not None]
    for place in resolved([directory, *roots]):
        for path in walk(place):
            with contextlib.suppress(FileNotFoundError):
                if stat.S_ISREG((facts := path.lstat()).st_mode):
                    yield facts.st_size, path


def _num_objects(context: Context) -> int:
    stores = [each for each in context.stores.blobs.values() if local_root(each) is None]
    return sum(len(each.held()) for each in stores)


def resolved(paths: Iterable[Path]) -> list[Path]:
    """Return the real paths, without those below an earlier one."""
    found: list[Path] = []
    for path in paths:
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(each) for each in found):
            found.append(real)
    return found
