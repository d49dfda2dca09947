"""What a job is sent with: this program's code, how its parts find each other, and the run file.

Rules: no data, no keys, no models, nothing of the surroundings. The folder holds the three packages as
they are installed here, the distribution's name, version and entry points (by which executors are
found), and the run file, word for word. What is installed on the cluster comes after it on the path.

Not covered: the packages that all of it needs, which the cluster's image must hold.

    with packaged(text) as folder:
        jobs.submit(Submission(name, folder, COMMAND))
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.jobs.jobs import RUN_FILE
from sisa.core.errors import EnvironmentFault

PACKAGES = ("sisa", "approx", "cluster")
SUFFIXES = frozenset({".py", ".yaml"})
DISTRIBUTION = "deletion-ready-model"
COMMAND = ("python", "-m", "cluster", "train", RUN_FILE, "--address", "auto")


@contextmanager
def packaged(run_file: str) -> Iterator[Path]:
    """A folder with all that a job is sent with, while it is needed."""
    with tempfile.TemporaryDirectory(prefix="sisa-job-") as scratch:
        folder = Path(scratch)
        for name in PACKAGES:
            _copy(_root(name), folder / name)
        _describe(folder)
        (folder / RUN_FILE).write_text(run_file, encoding="utf-8")
        yield folder


def _root(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise EnvironmentFault(
            "this program's own code can't be packaged",
            where=name,
            expected="a package in a directory",
            next_step="install it with pip",
        )
    return Path(spec.origin).parent


def _copy(root: Path, target: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            place = target / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _describe(folder: Path) -> None:
    """What `importlib.metadata` reads of an installed distribution."""
    try:
        held = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentFault(
            "this program is not installed", where=DISTRIBUTION, next_step="install it with pip"
        ) from None
    place = folder / f"{DISTRIBUTION.replace('-', '_')}-{held.version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {held.version}\n"
    )
    (place / "entry_points.txt").write_text(held.read_text("entry_points.txt") or "")
