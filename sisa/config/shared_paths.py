"""Which places a run file names that another machine would not see as this one does.

A run file that is sent to a cluster is read there: its relative paths would mean a directory of the
package, and what is not named would lie in the home directory of a pod that goes away.

Rules: pure but for one look at the disk: a name that is a directory here would be taken for one of the
hub there. Every place must be absolute, as on a volume that all nodes mount. What keeps deletions and
keys must be named, for the default is a user's state directory. Whether a place exists is seen there.

Not covered: names of the hub and of packages, which mean the same everywhere.

>>> dict(unshared({"output_dir": "model", "datasets": [{"path": "/shared/a.jsonl"}]}, Path("/nowhere")))
{('output_dir',): "relative: 'model' is no place that the cluster shares; give an absolute path", \
('witness',): 'missing; null is the state directory of a machine of the cluster: give an absolute path'}
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sisa.config.config import HUB, KeyPath, is_local
from sisa.core.config_types import is_uri, shown

# Dotted keys by what may stand there: a place alone, or a place or a name.
PATH_KEYS = (
    *("output_dir", "storage", "witness", "keyring", "sisa.partition_key_file"),
    "base_model.scratch.directory",
)
NAME_KEYS = ("base_model", "sisa.embedder", "datasets.*.path", "base_model.scratch.corpus.*.path")


def unshared(data: dict[str, Any], directory: Path) -> Iterator[tuple[KeyPath, str]]:
    """(key path, what is wrong) of every place in a run file's data; `directory` is the run file's."""
    for path, value in _values(data, PATH_KEYS):
        if path == ("storage",) and is_uri(value):
            continue
        if problem := _of_place(value):
            yield path, problem
    for path, value in _values(data, NAME_KEYS):
        if problem := _of_name(value, directory):
            yield path, problem
    for key in ("witness", *(("keyring",) if data.get("encrypt") is True else ())):
        if data.get(key) is None:
            what = (
                "missing; null is the state directory of a machine of the cluster: give an absolute path"
            )
            yield (key,), what


def _values(data: dict[str, Any], keys: tuple[str, ...]) -> Iterator[tuple[KeyPath, str]]:
    for key in keys:
        for path, value in _at(data, key.split("."), ()):
            if isinstance(value, str):
                yield path, value


def _at(data: Any, parts: list[str], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if not parts:
        yield path, data
    elif parts[0] == "*" and isinstance(data, list):
        for index, each in enumerate(data):
            yield from _at(each, parts[1:], (*path, index))
    elif isinstance(data, dict) and parts[0] in data:
        yield from _at(data[parts[0]], parts[1:], (*path, parts[0]))


def _of_place(value: str) -> str:
    if value.startswith("~"):
        return f"{shown(value)} is another directory on the cluster; give an absolute path"
    if not value.startswith("/"):
        return f"relative: {shown(value)} is no place that the cluster shares; give an absolute path"
    return ""


def _of_name(value: str, directory: Path) -> str:
    if value.startswith("pypi:") or value == "hashing":
        return ""
    if is_local(value):
        return _of_place(value)
    if not HUB.fullmatch(value):
        return _of_place(value)
    if os.path.exists(directory / value):
        return f"{shown(value)} is a file or directory here, and a hub name there; give an absolute path"
    return ""
