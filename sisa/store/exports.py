"""Exports at rest: directories of a few files, anywhere the caller chose.

A path from the ledger is not trusted. It is walked from the root, part by part, without following a
link. Only regular files of known names are removed, the weights only while their bytes are the recorded
ones, and then the directory if it is empty. A checkpoint's directory is not an export. A directory that
is gone or was changed belongs to somebody else and stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE
from sisa.core.domain import Export
from sisa.core.ports import ExportStanding
from sisa.store.blobs import files

CARD, MODEL_WEIGHTS = "README.md", "model.safetensors"
SIGNATURE = "model.sig"  # OpenSSF Model Signing, over the other files
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_BESIDE = (CONFIG_FILE, CARD, SIGNATURE, "config.json", "generation_config.json", *TOKENIZER)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)  # a link counts as no directory


class DirectoryExports:
    """An ExportStore of directories."""

    def write(self, path: str, content: Mapping[str, bytes]) -> None:
        files.write_directory(Path(path), content)

    def abandon(self, path: str) -> None:
        above = os.path.dirname(path)
        with files.disk_errors(Path(path)), _opened(above) as found:
            if found is None:
                return
            parent, folder = found
            for name in os.listdir(folder):
                if name.startswith(files.TEMPORARY_PREFIX):  # was never renamed to its path
                    with _opened(f"{above}/{name}") as half:
                        if half is not None:
                            _unlink(half[1], (*_BESIDE, ADAPTER_FILE, MODEL_WEIGHTS))
                    with contextlib.suppress(OSError):  # it holds somebody's file, too
                        os.rmdir(name, dir_fd=folder)
            os.fsync(folder)
            if not os.listdir(folder):
                os.rmdir(os.path.basename(above), dir_fd=parent)

    def standing(self, export: Export) -> ExportStanding:
        with files.disk_errors(Path(export.path)), _opened(export.path) as found:
            return "gone" if found is None else _standing(found[1], export)

    def erase(self, export: Export) -> bool:
        with files.disk_errors(Path(export.path)), _opened(export.path) as found:
            if found is None:
                return export.state == "erasing"
            parent, folder = found
            standing = _standing(folder, export)
            if standing == "held":
                os.unlink(_weights(export), dir_fd=folder)
            elif standing == "changed" or export.state != "erasing":
                return False
            _unlink(folder, _BESIDE)
            os.fsync(folder)
            if not os.listdir(folder):
                os.rmdir(os.path.basename(export.path), dir_fd=parent)
                os.fsync(parent)
            return True


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[int, int] | None]:
    """Open a directory's parent and the directory without following links; None when there is none."""
    parts = path.split("/")[1:]
    if not path.startswith("/") or not parts or {"", ".", ".."} & set(parts) or "\0" in path:
        yield None
        return
    with contextlib.ExitStack() as stack:
        handles: list[int] = []
        try:
            for part in ("/", *parts):
                handles.append(os.open(part, _DIRECTORY, dir_fd=handles[-1] if handles else None))
                stack.callback(os.close, handles[-1])
        except OSError as error:
            if error.errno not in _ABSENT:
                raise
            yield None
            return
        yield handles[-2], handles[-1]


def _unlink(folder: int, names: Iterable[str]) -> None:
    for name in names:
        if _is_regular(folder, name):
            os.unlink(name, dir_fd=folder)


def _is_regular(folder: int, name: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _weights(export: Export) -> str:
    return MODEL_WEIGHTS if export.form == "merged-model" else ADAPTER_FILE


def _standing(folder: int, export: Export) -> ExportStanding:
    names = set(os.listdir(folder))
    if MANIFEST_FILE in names:
        return "changed"
    weights = _weights(export)
    if weights not in names:
        return "gone"
    if not _is_regular(folder, weights):
        return "changed"
    with open(os.open(weights, _FILE, dir_fd=folder), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return "held" if found == export.adapter_sha256 else "changed"
