"""Share one copy of the base model per node, and carry it to a node that lacks it.

Workers memory-map the safetensors of a directory on their own node: the page cache holds one copy for
all of them, and a write in place stays private (copy on write). The object store only carries *files*,
in blocks that are written to the node's cache directory. No tensor ever aliases the object store, since
a write to one would silently change the weights of the other workers.

A directory holds the base if every file has the listed size and sha256: another node may hold another
model under the same path. The check reads each file once per worker process, and only on a cluster of
several nodes. A carried copy appears in one rename, whole and checked, or not at all. A lock lets one
worker write while the other workers of the node wait.

>>> cached_base(Path("/scratch/sisa"), "5e6f").as_posix()
'/scratch/sisa/base/5e6f'
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sisa.core.digest import file_sha256
from sisa.core.domain import BaseFiles
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.store.blobs import files

COPY_PATIENCE_S = 3600.0  # how long to wait for a worker of this node that writes the same base
BLOCK_BYTES = 64 * 2**20  # memory that a worker needs while it writes a carried file

Block = NDArray[np.uint8]
ReadBlocks = Callable[[str], Iterable[Block]]  # name of a file -> its bytes, in order


@dataclass(frozen=True, slots=True)
class BaseFile:
    """Describe one file of the base: its name in the base directory, its size and its digest."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class BaseManifest:
    """List every file of a base, sorted by name."""

    digest: str
    files: tuple[BaseFile, ...]


def cached_base(cache: Path, digest: str) -> Path:
    """Return the cache directory for a carried copy of the base."""
    return cache / "base" / digest


@functools.lru_cache(maxsize=1)
def list_base(base: BaseFiles) -> BaseManifest:
    """Read and hash every file of a base. Raise EnvironmentFault if it has none."""
    found = base.directory.iterdir() if base.directory.is_dir() else iter(())
    paths = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise EnvironmentFault(
            "the base model's directory is missing or empty",
            where=str(base.directory),
            next_step="run the command again where the base model was fetched",
        )
    files = (BaseFile(path.name, path.stat().st_size, file_sha256(path)) for path in paths)
    return BaseManifest(base.digest, tuple(files))


def holds_base(directory: Path, manifest: BaseManifest) -> bool:
    """Return whether a directory has every file of the base, byte for byte. Compare sizes first."""
    paths = [(directory / file.name, file) for file in manifest.files]
    return all(path.is_file() and path.stat().st_size == file.num_bytes for path, file in paths) and all(
        file_sha256(path) == file.sha256 for path, file in paths
    )


def find_base(directory: Path, cache: Path, manifest: BaseManifest) -> Path | None:
    """Return where this node has the base: the driver's path or a carried copy; None if it has none."""
    places = (directory, cached_base(cache, manifest.digest))
    return next((each for each in places if holds_base(each, manifest)), None)


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield a file's bytes as memory-mapped arrays, so that copying them reads them once."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:  # an empty file can't be mapped
        return
    mapped = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    for start in range(0, num_bytes, block_bytes):
        yield mapped[start : start + block_bytes]


def write_base(cache: Path, manifest: BaseManifest, blocks: ReadBlocks) -> Path:
    """Write the cached copy of a base from `blocks`, unless the cache already holds it.

    Raise IntegrityError if the bytes differ from the manifest, EnvironmentFault if the disk fails.
    Neither leaves a partial copy.
    """
    final = cached_base(cache, manifest.digest)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        lock = final.parent / f".{manifest.digest}.lock"
        with lock.open("w") as file:
            files.take_lock(file.fileno(), lock, "has been writing this base", COPY_PATIENCE_S)
            if not holds_base(final, manifest):
                _replace(final, manifest, blocks)
    except OSError as error:
        raise EnvironmentFault(
            "the base model can't be cached on this node",
            where=str(final),
            got=error.strerror or type(error).__name__,
            next_step="free some space there, or point SISA_CACHE at a writable directory",
        ) from error
    return final


def _replace(final: Path, manifest: BaseManifest, blocks: ReadBlocks) -> None:
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=final.parent) as scratch:
        incoming = Path(scratch) / "base"
        incoming.mkdir()
        for file in manifest.files:
            _write_file(incoming / file.name, file, blocks(file.name))
        if final.exists():
            final.rename(Path(scratch) / "stale")
        incoming.rename(final)


def _write_file(path: Path, file: BaseFile, blocks: Iterable[Block]) -> None:
    sha256 = hashlib.sha256()
    with path.open("wb") as out:
        for block in blocks:
            sha256.update(block.data)
            out.write(block.data)
        out.flush()
        os.fsync(out.fileno())
    if sha256.hexdigest() != file.sha256:
        raise IntegrityError(
            "a file of the base model arrived changed",
            where=file.name,
            expected=file.sha256,
            got=sha256.hexdigest(),
            next_step="run the command again; if it fails again, check the driver's copy",
        )
