"""Paths in a run file: made absolute on this machine, or checked before the file goes to another one.

A run file that is sent to a cluster is read there. A relative path would mean a directory of the job's
package, and a default one the home directory of a temporary pod. So every path must be absolute, and the
directories that keep deletions and keys must be named.

>>> data = {"output_dir": "model", "datasets": [{"path": "/shared/a.jsonl"}]}
>>> for path, what in shared_path_problems(data, Path("/nowhere")):
...     print(path, what)
('output_dir',) relative: the cluster does not share 'model'; give an absolute path
('witness',) missing; null is the state directory of a machine of the cluster: give an absolute path
>>> list(resolve_paths(data, Path("/here"))), data["output_dir"]
([(('datasets', 0, 'path'), "no such file or directory: '/shared/a.jsonl'")], '/here/model')
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sisa.config.config import KeyPath, value_at
from sisa.config.fields import HUB, HUB_MODEL, NAME_PATTERN, PYPI, is_local, is_uri, shown

# Dotted keys (`*`: every item of a list) that hold a path, and those that hold a path or a name.
PATH_KEYS = (
    *("output_dir", "storage", "witness", "keyring", "sisa.partition_key_file"),
    *("signing.keys", "base_model.scratch.directory", "service.engines.*.token_file"),
    *("service.webhooks.*.secret_file", "service.opendsr.certificate", "service.opendsr.key"),
    *("service.tls.cert", "service.tls.key"),
)
NAME_KEYS = ("base_model", "sisa.embedder", "datasets.*.path", "base_model.scratch.corpus.*.path")
MUST_EXIST = "sisa.partition_key_file"  # the only one of PATH_KEYS
# The model's directory must hold no text that `forget` does not know of.
OUTSIDE_OUTPUT = {
    "witness": "the witness is",
    "keyring": "the keys are",
    "signing.keys": "the signing keys are",
    "storage": "the storage is",
    "datasets.*.path": "the data is",
    "base_model.scratch.directory": "the base is",
    "base_model.scratch.corpus.*.path": "the corpus is",
}


def resolve_paths(data: dict[str, Any], directory: Path) -> Iterator[tuple[KeyPath, str]]:
    """Make local paths absolute, in place, against `directory`; yield (key path, problem) of others."""
    for key in (*NAME_KEYS, *PATH_KEYS):
        for path, value in _values(data, key):
            if not NAME_PATTERN.fullmatch(value) or _is_no_path(key, value):
                continue
            local = Path(os.path.abspath(directory / os.path.expanduser(value)))
            if os.path.exists(local) or (key in PATH_KEYS and key != MUST_EXIST):
                value_at(data, path[:-1])[path[-1]] = str(local)
            elif key == MUST_EXIST or is_local(value):
                yield path, f"no such file or directory: {shown(value)}"
            elif not _is_hub_name(key, value):
                yield path, f"neither a local path nor a hub name: {shown(value)}"
    for key, what in OUTSIDE_OUTPUT.items():
        for path, value in _values(data, key):
            if _is_inside(value, data.get("output_dir")):
                yield path, f"conflict: {what} inside output_dir"
    for key in ("keyring", "signing.keys"):
        for path, value in _values(data, key):
            if _is_inside(value, data.get("storage")):
                yield path, "conflict: the keys are inside the storage"


def shared_path_problems(data: dict[str, Any], directory: Path) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key path, problem) for every path that another machine would not see as this one does.

    `directory` is the run file's: a name that is a directory here would be taken for one of the hub
    there. Whether a path exists is checked there.
    """
    for key in PATH_KEYS:
        for path, value in _values(data, key):
            if (key != "storage" or not is_uri(value)) and (problem := _not_absolute(value)):
                yield path, problem
    for key in NAME_KEYS:
        for path, value in _values(data, key):
            if not _is_no_path(key, value) and (problem := _not_shared(key, value, directory)):
                yield path, problem
    for key in ("witness", *(("keyring",) if data.get("encrypt") is True else ())):
        if data.get(key) is None:
            what = "null is the state directory of a machine of the cluster: give an absolute path"
            yield (key,), f"missing; {what}"


def _is_no_path(key: str, value: str) -> bool:
    """Return whether a value means the same on every machine."""
    if key == "storage" and is_uri(value):
        return True
    return value.startswith(PYPI) or (key, value) == ("sisa.embedder", "hashing")


def _values(data: Any, key: str, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield the texts at a dotted key below `path`, each with its key path."""
    part, _, rest = key.partition(".")
    if not key:
        if isinstance(data, str):
            yield path, data
    elif part == "*" and isinstance(data, list):
        for index, each in enumerate(data):
            yield from _values(each, rest, (*path, index))
    elif isinstance(data, dict) and part in data:
        yield from _values(data[part], rest, (*path, part))


def _not_absolute(value: str) -> str:
    if value.startswith("~"):
        return f"{shown(value)} is another directory on the cluster; give an absolute path"
    if not value.startswith("/"):
        return f"relative: the cluster does not share {shown(value)}; give an absolute path"
    return ""


def _is_hub_name(key: str, value: str) -> bool:
    return (HUB if key.endswith(".path") else HUB_MODEL).fullmatch(value) is not None


def _not_shared(key: str, value: str, directory: Path) -> str:
    if is_local(value) or not _is_hub_name(key, value):
        return _not_absolute(value)
    if os.path.exists(directory / value):
        return f"{shown(value)} is a file or directory here, and a hub name there; give an absolute path"
    return ""


def _is_inside(path: Any, directory: Any) -> bool:
    if not isinstance(path, str) or not isinstance(directory, str) or not os.path.isabs(path):
        return False
    return Path(path).is_relative_to(directory)


def state_dir() -> Path:
    """Return this user's state directory: `$XDG_STATE_HOME/sisa`, else `~/.local/state/sisa`."""
    home = os.environ.get("XDG_STATE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".local" / "state") / "sisa"
