"""Fake a cluster that runs jobs in memory: each job plays the behaviour registered for its words.

A job runs until its log was followed to the end; an `endless` job runs until `stop`. An error among the
pieces is raised once at its position, like a lost connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from cluster.jobs.jobs import Job, Submission, taken_name, unknown_job


@dataclass
class Play:
    """Describe what a job writes, and how it ends."""

    pieces: list[str | BaseException] = field(default_factory=lambda: ["hello from a job\n"])
    exit_code: int | None = 0
    fault: str = ""
    endless: bool = False


class FakeJobs:
    """Run jobs in memory. `plays` maps a job's last word to its play; `sent` holds folders by job."""

    def __init__(self, plays: dict[str, Play]) -> None:
        self._plays = plays
        self._jobs: dict[str, Job] = {}
        self.words: dict[str, tuple[str, ...]] = {}
        self.sent: dict[str, dict[str, bytes]] = {}

    def submit(self, submission: Submission) -> None:
        if submission.id in self._jobs:
            raise taken_name(submission.id)
        files = (path for path in submission.folder.rglob("*") if path.is_file())
        self.sent[submission.id] = {
            path.relative_to(submission.folder).as_posix(): path.read_bytes() for path in files
        }
        self.words[submission.id] = submission.words
        started = float(len(self._jobs))
        self._jobs[submission.id] = Job(
            submission.id, "RUNNING", started_s=started, metadata=dict(submission.metadata)
        )

    def get(self, job: str) -> Job:
        if job not in self._jobs:
            raise unknown_job(job)
        return self._jobs[job]

    def all(self) -> list[Job]:
        return list(reversed(self._jobs.values()))

    def log(self, job: str) -> str:
        self.get(job)
        return "".join(each for each in self._play(job).pieces if isinstance(each, str))

    def follow(self, job: str) -> Iterator[str]:
        self.get(job)
        play = self._play(job)
        for place, piece in enumerate(play.pieces):
            if isinstance(piece, BaseException):
                del play.pieces[place]
                raise piece
            yield piece
        if not self._jobs[job].ended:
            assert not play.endless, "this would wait for ever"
            state = "SUCCEEDED" if play.exit_code == 0 else "FAILED"
            self._end(job, state=state, exit_code=play.exit_code, fault=play.fault)

    def stop(self, job: str) -> bool:
        if self.get(job).ended:
            return False
        self._end(job, state="STOPPED")
        return True

    def _play(self, job: str) -> Play:
        return self._plays.setdefault(self.words[job][-1], Play())

    def _end(self, job: str, **how: object) -> None:
        found = self._jobs[job]
        self._jobs[job] = replace(found, ended_s=(found.started_s or 0) + 1, **how)  # type: ignore[arg-type]
