"""What every `Jobs` promises, asked of three jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.jobs.jobs import Jobs, Submission
from sisa.core.errors import InvalidInput
from tests.waiting import wait_for

METADATA = {"sisa_model": "a digest"}

HELLO = "hello from a job"

PROGRAM = f"""import sys, time
print({HELLO!r}, flush=True)
if sys.argv[1] == "endless":
    time.sleep(600)
sys.exit(int(sys.argv[1]))
"""


@dataclass
class Ground:
    """Submit three jobs: one that succeeds, one that fails, and one that does not end."""

    jobs: Jobs
    folder: Path
    good: str
    bad: str
    endless: str


def submit_three(jobs: Jobs, folder: Path) -> Ground:
    folder.mkdir(exist_ok=True)
    (folder / "program.py").write_text(PROGRAM)
    for name, word in (("good", "0"), ("bad", "5"), ("endless-1", "endless")):
        jobs.submit(Submission(name, folder, ("python", "program.py", word), METADATA))
    return Ground(jobs, folder, "good", "bad", "endless-1")


def ends_well(ground: Ground) -> None:
    text = "".join(ground.jobs.follow(ground.good))
    job = ground.jobs.get(ground.good)
    assert (job.state, job.exit_code, job.fault) == ("SUCCEEDED", 0, "")
    assert HELLO in text
    assert ground.jobs.log(ground.good) == text == "".join(ground.jobs.follow(ground.good))
    assert job.metadata == METADATA
    assert job.started_s is not None
    assert job.ended_s is not None
    assert job.ended_s >= job.started_s


def exit_codes_are_kept(ground: Ground) -> None:
    assert HELLO in "".join(ground.jobs.follow(ground.bad))
    job = ground.jobs.get(ground.bad)
    assert (job.state, job.exit_code, job.model) == ("FAILED", 5, "a digest")


def a_running_job_is_stopped(ground: Ground) -> None:
    wait_for(lambda: HELLO in ground.jobs.log(ground.endless), 300, every_s=0.1)
    assert ground.jobs.get(ground.endless).state == "RUNNING"
    assert ground.jobs.stop(ground.endless)
    assert HELLO in "".join(ground.jobs.follow(ground.endless))
    job = ground.jobs.get(ground.endless)
    assert (job.state, job.exit_code) == ("STOPPED", None)
    assert not ground.jobs.stop(ground.endless)


def unknown_jobs_are_refused(ground: Ground) -> None:
    calls: list[Callable[[str], object]] = [
        ground.jobs.get,
        ground.jobs.log,
        ground.jobs.stop,
        lambda job: list(ground.jobs.follow(job)),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match="knows no such job"):
            call("nobody")


def a_name_is_taken_once(ground: Ground) -> None:
    with pytest.raises(InvalidInput, match="has had a job of this name"):
        ground.jobs.submit(Submission(ground.good, ground.folder, ("python", "program.py", "7")))
    assert ground.jobs.get(ground.good).exit_code in (None, 0)


def all_jobs_are_listed_newest_first(ground: Ground) -> None:
    found = ground.jobs.all()
    assert {ground.good, ground.bad, ground.endless} <= {job.id for job in found}
    starts = [job.started_s or 0.0 for job in found]
    assert starts == sorted(starts, reverse=True)


PROMISES = (
    *(ends_well, exit_codes_are_kept, a_running_job_is_stopped),
    *(unknown_jobs_are_refused, a_name_is_taken_once, all_jobs_are_listed_newest_first),
)
