"""Submit a training to a cluster, follow it and stop it, through the port `Jobs`.

Everything is checked before anything is sent. Only this program's code and the run file are sent; data,
keys and models are not.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.jobs.jobs import MODEL, Job, Jobs, Submission, model_digest
from sisa.config.runfile import load_for_cluster
from sisa.core.errors import Busy, EnvironmentFault
from sisa.flows.wiring.upper_houses import ROOT, check_upper_houses

RUN_FILE = "run.yaml"  # the run file's name in the folder that is sent
PACKAGES = ("sisa", "approx", "cluster")
SUFFIXES = frozenset({".py", ".yaml"})
COMMAND = ("python", "-m", "sisa", "train", RUN_FILE, "--address", "auto")
LOST_S = 30.0  # how long to retry while the cluster can't be reached
END_WITHIN_S = 30.0
AGAIN_S = 0.5


def submit_training(jobs: Jobs, run_file: Path, name: str, flags: Sequence[str]) -> Job:
    """Send a run file with the code that trains it, and return the job.

    Raise InvalidInput with every problem of the run file, Busy if another job trains the same model,
    EnvironmentFault if other packages hide this program's own.
    """
    text, config = load_for_cluster(run_file)
    model = model_digest(config.output_dir)
    for each in jobs.all():
        if each.model == model and not each.ended:
            raise Busy(
                "a job is training this model already",
                where=each.id,
                next_step=f"follow it: sisa cluster logs {each.id} --follow; "
                f"or end it: sisa cluster stop {each.id}",
            )
    check_upper_houses()
    with tempfile.TemporaryDirectory(prefix="sisa-job-") as scratch:
        folder = Path(scratch)
        for package in PACKAGES:
            _copy(ROOT / package, folder / package)
        (folder / RUN_FILE).write_text(text, encoding="utf-8")
        jobs.submit(Submission(name, folder, (*COMMAND, *flags), {MODEL: model}))
    return jobs.get(name)


def _copy(root: Path, target: Path) -> None:
    for path in sorted(root.rglob("*")):
        if path.suffix in SUFFIXES and path.is_file():
            place = target / path.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def follow(jobs: Jobs, job: str, show: Callable[[str], None]) -> Job:
    """Show a job's log until the job ends, and return the ended job.

    If the connection is lost, try again for LOST_S seconds. A new connection sends the log from its
    beginning; the part that was shown before is skipped.
    """
    num_shown, reached = 0, time.monotonic()
    while True:
        num_received = 0  # characters, by this connection
        try:
            for piece in jobs.follow(job):
                reached = time.monotonic()
                if new := piece[max(0, num_shown - num_received) :]:
                    show(new)
                num_received += len(piece)
                num_shown = max(num_shown, num_received)
            found = jobs.get(job)
            reached = time.monotonic()
            if found.ended:
                return found
        except EnvironmentFault:
            if time.monotonic() - reached > LOST_S:
                raise
        time.sleep(AGAIN_S)


def stop(jobs: Jobs, job: str) -> tuple[Job, bool]:
    """Stop a job; return it and whether it was running. Raise EnvironmentFault if it does not end."""
    was_running = jobs.stop(job)
    until = time.monotonic() + END_WITHIN_S
    while not (found := jobs.get(job)).ended:
        if time.monotonic() > until:
            raise EnvironmentFault(
                "the job has not ended",
                where=job,
                got=found.state,
                next_step="ask again: sisa cluster status",
            )
        time.sleep(AGAIN_S)
    return found, was_running
