"""Define jobs on a remote cluster, and the port to a cluster that runs them.

A job's metadata names the model that it trains, as a digest of the model's path, and nothing else: no
record, no id, no secret. A job that ended has an exit code, unless the cluster ended it.

>>> Job("sisa-a", "FAILED", exit_code=5).ended
True
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from sisa.core.digest import sha256_hex
from sisa.core.errors import InvalidInput, Problem

State = Literal["PENDING", "RUNNING", "STOPPED", "SUCCEEDED", "FAILED"]
MODEL = "sisa_model"  # the metadata key that names the model of a job
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Submission:
    """Describe a job to run: the folder that is its working directory, its command and its metadata."""

    id: str
    folder: Path
    words: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """Describe a job as the cluster knows it."""

    id: str
    state: State
    exit_code: int | None = None
    fault: str = ""  # what ended a job without an exit code
    started_s: float | None = None  # since 1970
    ended_s: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def model(self) -> str | None:
        return self.metadata.get(MODEL)


class Jobs(Protocol):
    """A cluster that runs jobs.

    All methods raise InvalidInput for an id that the cluster does not know (`submit`: for one that it
    knows already), and EnvironmentFault if the cluster can't be reached.
    """

    def submit(self, submission: Submission) -> None: ...

    def get(self, job: str) -> Job: ...

    def all(self) -> list[Job]:
        """Return all jobs, newest first."""
        ...

    def log(self, job: str) -> str: ...

    def follow(self, job: str) -> Iterator[str]:
        """Yield the log from its beginning, piece by piece as it grows, until the job has ended."""
        ...

    def stop(self, job: str) -> bool:
        """Ask a job to end; return whether it was still running."""
        ...


def model_digest(output_dir: Path) -> str:
    """Return a digest that identifies the model at a path without revealing the path."""
    return sha256_hex(os.path.normpath(output_dir).encode())[:32]


def check_name(name: str) -> str:
    """Return a job's name if it is valid in a URL; raise InvalidInput if it is not."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            "the job's name is invalid",
            expected="letters, digits, '.', '_' and '-', at most 100, a letter or digit first",
            next_step="`sisa cluster status` lists the jobs of a cluster",
        )
    return name


def unknown_job(job: str) -> InvalidInput:
    """Return the error for a job that the cluster does not know."""
    return InvalidInput(
        "the cluster knows no such job",
        problems=[Problem(job, "unknown; a head node that was restarted has forgotten its jobs")],
        next_step="`sisa cluster status` lists the jobs of a cluster",
    )


def taken_name(job: str) -> InvalidInput:
    """Return the error for a name that the cluster has used before."""
    return InvalidInput(
        "the cluster has had a job of this name",
        problems=[Problem(job, "a name can't be used again, even after the job's end")],
        next_step="choose another name, or leave out --job",
    )
