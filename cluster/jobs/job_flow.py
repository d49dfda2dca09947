"""Submit a training to a cluster, follow it and stop it, through the port `Jobs`.

Everything is checked before anything is sent. A model that a job is training is not submitted again.
Following survives a lost connection and shows each piece of the log once. Interrupting it does not
affect the job.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.jobs.job_package import COMMAND, packaged
from cluster.jobs.jobs import MODEL, Job, Jobs, Submission, model_digest
from sisa.config.runfile import load_elsewhere
from sisa.core.errors import Busy, EnvironmentFault

LOST_S = 30.0  # how long to retry while the cluster can't be reached
STOP_S = 30.0
AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class Clock:
    """Read a monotonic clock and wait, both in seconds."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def submit_training(jobs: Jobs, run_file: Path, name: str, flags: Sequence[str] = ()) -> Job:
    """Send a run file with the code that trains it, and return the job.

    Raise InvalidInput with every problem of the run file, Busy if another job trains the same model.
    """
    text, config = load_elsewhere(run_file)
    model = model_digest(config.output_dir)
    for each in jobs.all():
        if each.model == model and not each.ended:
            raise Busy(
                "a job is training this model already",
                where=each.id,
                next_step=f"follow it: sisa cluster logs {each.id} --follow; "
                f"or end it: sisa cluster stop {each.id}",
            )
    with packaged(text) as folder:
        jobs.submit(Submission(name, folder, (*COMMAND, *flags), {MODEL: model}))
    return jobs.get(name)


def follow(jobs: Jobs, job: str, show: Callable[[str], None], clock: Clock | None = None) -> Job:
    """Show a job's log until the job ends, and return the ended job."""
    clock = clock or Clock()
    shown = 0
    reached = clock.now()
    while True:
        passed = 0
        try:
            for piece in jobs.follow(job):
                reached = clock.now()
                new = piece[max(0, shown - passed) :]
                passed += len(piece)
                shown = max(shown, passed)
                if new:
                    show(new)
            found = jobs.get(job)
            reached = clock.now()
            if found.ended:
                return found
        except EnvironmentFault:
            if clock.now() - reached > LOST_S:
                raise
        clock.sleep(AGAIN_S)


def stop(jobs: Jobs, job: str, clock: Clock | None = None) -> tuple[Job, bool]:
    """Stop a job; return it and whether it was running.

    Raise EnvironmentFault if the job does not end within STOP_S seconds.
    """
    clock = clock or Clock()
    was_running = jobs.stop(job)
    until = clock.now() + STOP_S
    while not (found := jobs.get(job)).ended:
        if clock.now() > until:
            raise EnvironmentFault(
                "the job has not ended",
                where=job,
                got=found.state,
                next_step="ask again: sisa cluster status",
            )
        clock.sleep(AGAIN_S)
    return found, was_running
