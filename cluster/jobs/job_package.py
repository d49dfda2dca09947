"""Package what is sent with a job: this program's code and the run file.

The folder holds the three packages as installed here and the run file, word for word: no data, no keys,
no models. It comes first on the job's import path. The packages that the code depends on must be
installed on the cluster.

    with packaged(text) as folder:
        jobs.submit(Submission(name, folder, COMMAND))
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.jobs.jobs import RUN_FILE
from sisa.flows.wiring.upper_houses import ROOT, check_upper_houses

PACKAGES = ("sisa", "approx", "cluster")
SUFFIXES = frozenset({".py", ".yaml"})
COMMAND = ("python", "-m", "sisa", "train", RUN_FILE, "--address", "auto")


@contextmanager
def packaged(run_file: str) -> Iterator[Path]:
    """Yield a folder with everything that a job needs, and remove it afterwards.

    Raise EnvironmentFault if other packages hide this program's own.
    """
    check_upper_houses()
    with tempfile.TemporaryDirectory(prefix="sisa-job-") as scratch:
        folder = Path(scratch)
        for name in PACKAGES:
            _copy(ROOT / name, folder / name)
        (folder / RUN_FILE).write_text(run_file, encoding="utf-8")
        yield folder


def _copy(root: Path, target: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            place = target / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
