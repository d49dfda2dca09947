"""Define jobs on a remote cluster, what is sent with one, and the port to what runs them.

Pure. A job is sent as a folder of code with a run file and a command of fixed words; what goes
along says which model it trains, as a digest of where that lies, and nothing else: no record, no id, no
secret. A job that ended keeps its exit code; one without an exit code was ended by its surroundings.

>>> job_name(datetime(2026, 1, 2, 3, 4, 5), "9f")
'sisa-20260102-030405-9f'
>>> Job("sisa-a", "FAILED", exit_code=5).ended
True
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal, Protocol

from sisa.core.digest import sha256_hex
from sisa.core.errors import InvalidInput, Problem

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
ENDED_STATES = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})
MODEL = "sisa_model"  # the key under which a job says which model it trains
RUN_FILE = "run.yaml"  # the run file's name in the folder
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to be run: the folder that is its working directory, and the words of its command."""

    id: str
    folder: Path
    words: tuple[str, ...]
    said: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """What a cluster knows of a job. `fault` names what ended one that has no exit code."""

    id: str
    state: State
    exit_code: int | None = None
    fault: str = ""
    started_s: float | None = None  # since 1970
    ended_s: float | None = None
    said: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in ENDED_STATES

    @property
    def model(self) -> str | None:
        return self.said.get(MODEL)


class Jobs(Protocol):
    """A cluster that runs jobs. All raise InvalidInput for an id that it does not know (or, to `submit`,
    knows already), EnvironmentFault when it can't be reached."""

    def submit(self, submission: Submission) -> None: ...

    def get(self, job: str) -> Job: ...

    def all(self) -> list[Job]:
        """Newest first."""
        ...

    def log(self, job: str) -> str: ...

    def follow(self, job: str) -> Iterator[str]:
        """Yield the log from its beginning, piece by piece as it grows, until the job has ended."""
        ...

    def stop(self, job: str) -> bool:
        """Ask for its end; whether it was still running."""
        ...


def model_digest(output_dir: Path) -> str:
    """Return which model a job trains, without naming the place.

    >>> model_digest(Path("/shared/a/../m")) == model_digest(Path("/shared/m"))
    True
    """
    return sha256_hex(os.path.normpath(output_dir).encode())[:32]


def job_name(now: datetime, chance: str) -> str:
    """Return a name for a new job: a cluster takes each once."""
    return f"sisa-{now:%Y%m%d-%H%M%S}-{chance}"


def check_name(name: str) -> str:
    """Check a job's name, which becomes part of addresses. Raises InvalidInput."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "that can't be the name of a job",
            expected="letters, digits, '.', '_' and '-', at most 100, a letter or digit first",
            next_step="`sisa cluster status` lists the jobs of a cluster",
        )
    return name


def unknown_job(job: str) -> InvalidInput:
    return InvalidInput(
        "the cluster knows no such job",
        problems=[Problem(job, "unknown; a head node that was restarted has forgotten its jobs")],
        next_step="`sisa cluster status` lists the jobs of a cluster",
    )


def taken_name(job: str) -> InvalidInput:
    return InvalidInput(
        "the cluster has had a job of this name",
        problems=[Problem(job, "each name is taken once, also after the job's end")],
        next_step="choose another name, or leave --job away",
    )
