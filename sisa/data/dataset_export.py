"""Export a Hugging Face dataset (hub name, or a directory of `save_to_disk`) to one Parquet file.

A child process does it, with its caches, temporary files and Hugging Face home in one directory
that the caller erases in any case: the library's own cache would keep the text of deleted records. The
child reports names of exceptions only, since a message may quote a record. Datasets that need code of
their own are not supported.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sisa.config.sources import DatasetSource
from sisa.core.errors import EnvironmentFault
from sisa.data.record_rules import Broken
from sisa.store.blobs.temporary_directories import in_use

NEEDS_CODE = "needs code of its own, which is never run: save its rows as JSONL"


def export_rows(source: DatasetSource, folder: Path) -> Path:
    """Write the rows of a saved or a hub dataset to one Parquet file in `folder`, and return its path.

    Raise Broken (the dataset is wrong) and EnvironmentFault (it can't be fetched).
    """
    target = folder / "rows.parquet"
    local = os.path.isdir(source.path)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "sisa.data.dataset_export", source.path, source.split, str(target)],
        env=_environment(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    try:
        report: dict[str, Any] = dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        report = {"errors": ["Killed"]}
    errors = report.get("errors", [] if target.exists() else ["Killed"])
    if not errors:
        return target
    if "KeyError" in errors and source.split not in report.get("splits", [source.split]):
        raise Broken(f"no split '{source.split}'; it has {', '.join(report['splits'])}")
    if report.get("needs_code"):
        raise Broken(NEEDS_CODE)
    if "DatasetNotFoundError" in errors:
        raise Broken("no such dataset on the hub, or one that this user can't read")
    if "ValueError" in errors and not local:
        raise Broken(f"no split '{source.split}', or several configurations")
    machine = {"Killed", "ModuleNotFoundError", "MemoryError", "KeyboardInterrupt"} & set(errors)
    if local and not machine and report.get("errno") not in (errno.ENOSPC, errno.EDQUOT):
        raise Broken(f"not a readable dataset ({errors[0]}); corrupt or truncated")
    raise EnvironmentFault(
        f"the dataset '{source.path}' can't be fetched",
        got=errors[0],
        next_step="check the network, the free disk space and the name, then try again",
    )


def needs_code(error: BaseException) -> bool:
    """Return whether the library `datasets` refused a dataset because it has a script."""
    return str(error).startswith("Dataset scripts are no longer supported")


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment of the child: all caches in one directory, but the user's own token."""
    environ = dict(os.environ)
    caches = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = environ.get("HF_HOME") or str(caches / "huggingface")
    token = environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")
    for name in list(environ):
        if name.startswith(("HF_", "HUGGINGFACE_")) and name.endswith("_CACHE"):
            del environ[name]
    return environ | {
        "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMPDIR": str(folder),
        "HF_TOKEN_PATH": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


def _export(name: str, split: str, target: str) -> dict[str, Any]:
    """Do the child's work; errors come back as names."""
    report: dict[str, Any] = {}
    try:
        import datasets

        if Path(name).is_dir():
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                report["splits"] = sorted(data)
                data = data[split]
        else:
            data = datasets.load_dataset(name, split=split, cache_dir=target + ".cache")
        data.to_parquet(target)
    except BaseException as error:
        report["errors"] = [kind.__name__ for kind in type(error).__mro__]
        report["errno"] = getattr(error, "errno", None)
        report["needs_code"] = needs_code(error)
    return report


if __name__ == "__main__":
    with in_use(Path(sys.argv[-1]).parent):
        print(json.dumps(_export(*sys.argv[1:])))
