"""The error tree: every failure is typed and says what, where, expected, got and the next step.

    SisaError
    |- RejectedRequest      the caller can correct it; nothing was changed   exit 2
    |  |- InvalidInput      a run file, a record file or an argument         exit 2
    |  |- ConfigConflict    the run file contradicts an existing model       exit 2
    |  `- UnknownRecord     an id or a subject that the ledger never held    exit 3
    |- IntegrityError       stored bytes are not the recorded ones: stop     exit 4
    `- TransientError       try again later, or repair the machine
       |- Busy              another writer holds the model                   exit 5
       |- Outdated          what was loaded is no longer served              exit 6
       `- EnvironmentFault  disk, network, package, cluster                  exit 6

Messages carry paths, line numbers, positions and digests; never record text, and never a record id.
Bad input lists *all* of its problems in `problems`. An exception outside this tree is a bug and ends
with exit 1.

>>> error = InvalidInput("2 bad records", where="people.jsonl", next_step="correct the file",
...                      problems=[Problem("line 3", "no id"), Problem("line 9", "empty text")])
>>> error.exit_code, len(error.to_json()["problems"])
(2, 2)
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

_FACTS = ("where", "expected", "got", "next_step")


@dataclass(frozen=True, slots=True)
class Problem:
    """One defect: its location (a line, a key, a position) and what is wrong."""

    where: str
    what: str


@dataclass(eq=False, repr=False)
class SisaError(Exception):
    """Base class of every error that this project raises on purpose."""

    exit_code: ClassVar[int] = 1

    what: str
    _: KW_ONLY
    where: str = ""
    expected: str = ""
    got: str = ""
    next_step: str = ""
    problems: Sequence[Problem] = ()

    def __post_init__(self) -> None:
        super().__init__(self.what)
        self.problems = tuple(self.problems)

    def __str__(self) -> str:
        lines = [self.what]
        for name in ("where", "expected", "got"):
            if value := getattr(self, name):
                lines.append(f"  {name}: {value}")
        lines += [f"  - {problem.where}: {problem.what}" for problem in self.problems]
        if self.next_step:
            lines.append(f"  next step: {self.next_step}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all fields, so that a worker's error reaches the driver unchanged."""
        return error_from_json, (type(self), self.to_json())

    def as_problems(self, where: str) -> tuple[Problem, ...]:
        """Return the listed problems, or else the error itself as one, at its place or at `where`."""
        facts = ", ".join(
            f"{name} {value}" for name in ("expected", "got") if (value := getattr(self, name))
        )
        what = f"{self.what}: {facts}" if facts else self.what
        return tuple(self.problems) or (Problem(self.where or where, what),)

    def to_json(self) -> dict[str, Any]:
        """Return the `error` object that `--json` prints."""
        facts = {name: getattr(self, name) for name in _FACTS}
        problems = [asdict(problem) for problem in self.problems]
        return {"type": type(self).__name__, "message": self.what, **facts, "problems": problems}


def error_from_json(kind: type[SisaError], fields: dict[str, Any]) -> SisaError:
    """Return the error that `to_json` wrote."""
    facts = {name: fields[name] for name in _FACTS}
    return kind(fields["message"], problems=[Problem(**each) for each in fields["problems"]], **facts)


class RejectedRequest(SisaError):
    """The request can't be carried out as it is; nothing was changed."""

    exit_code = 2


class InvalidInput(RejectedRequest):
    """A run file, a record file or an argument is wrong."""


@dataclass
class Problems:
    """Problems in order: all are counted, and the first ones are listed."""

    most: int
    count: int = 0
    listed: list[Problem] = field(default_factory=list)

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.listed) < self.most:
            self.listed.append(Problem(where, what))

    def refuse(self, what: str, next_step: str = "correct the files and run the command again") -> None:
        """Raise InvalidInput if there are any problems."""
        if not self.count:
            return
        if left := self.count - len(self.listed):
            self.listed.append(Problem("limits.max_problems", f"{left} more problems are not listed"))
        raise InvalidInput(
            f"{self.count} problem{'s' * (self.count != 1)} {what}",
            next_step=next_step,
            problems=self.listed,
        )


class ConfigConflict(RejectedRequest):
    """The run file and the existing model disagree."""


class UnknownRecord(RejectedRequest):
    """An id or a subject that this model's ledger has never held."""

    exit_code = 3


class IntegrityError(SisaError):
    """Stored bytes differ from the recorded ones; nothing that depends on them is used."""

    exit_code = 4


class TransientError(SisaError):
    """The request is valid, but the surroundings failed."""

    exit_code = 6


class Busy(TransientError):
    """Another writer holds the model."""

    exit_code = 5


class Outdated(TransientError):
    """What was loaded is no longer what the model serves, and may hold deleted records."""


class EnvironmentFault(TransientError):
    """Disk, network, a missing package or the cluster failed."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Raise EnvironmentFault if the block imports a library that an extra of this project installs.

    >>> with extra("s3"):
    ...     import json
    """
    try:
        yield
    except ImportError as error:
        library = (error.name or "a library").partition(".")[0]
        raise EnvironmentFault(
            f"{library} is not installed",
            expected=f"the extra `{name}` of this project",
            got=f"no module {error.name}",
            next_step=f"pip install 'deletion-ready-model[{name}]', on every node that uses it",
        ) from None


def internal_fault(error: Exception) -> SisaError:
    """Return an error that names the line of a bug; the bug's own message may contain record text."""
    if os.environ.get("SISA_DEBUG"):
        traceback.print_exception(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return SisaError(
        f"internal fault: {type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}",
        next_step="report it; SISA_DEBUG=1 prints the whole traceback, which may hold record text",
    )


@contextmanager
def all_tried() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Run several steps, then raise the first error, with the other errors among its problems.

    >>> with all_tried() as tried:
    ...     with tried():
    ...         print("this step, and whatever follows")
    this step, and whatever follows
    """
    errors: list[SisaError] = []

    @contextmanager
    def tried() -> Iterator[None]:
        try:
            yield
        except SisaError as error:
            errors.append(error)

    yield tried
    if errors:
        first, *others = errors
        more = (each for other in others for each in other.as_problems(""))
        first.problems = (*first.problems, *more)
        raise first
