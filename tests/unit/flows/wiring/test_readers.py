"""Readers beside a writer answer from one state or try again, and never report a race as damage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sisa import model as questions
from sisa.config.runfile import parse_run_file
from sisa.core.errors import Busy, IntegrityError
from sisa.flows.wiring.ledger_place import LOCK
from sisa.model import Model
from sisa.store.areas import RECORDS
from sisa.store.blobs import files
from sisa.store.ledger import rows
from sisa.store.ledger.ledger import SqlLedger
from tests.examples import num_examples
from tests.fakes.ports import fake_record
from tests.models.confessing import RUN_FILE, train_in

NUM_RECORDS, NUM_SUBJECTS = 48, 4
KEPT = [fake_record(number, f"subject-{number % NUM_SUBJECTS}") for number in range(12)]
MORE = [fake_record(number, f"subject-{number % NUM_SUBJECTS}") for number in range(12, NUM_RECORDS)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "model"
    train_in(directory, parse_run_file(RUN_FILE, "run.yaml"), [*KEPT, *MORE])
    return directory


@pytest.fixture
def directory(model: Path) -> Path:
    return model


def status_is_of_one_state(model: Model) -> None:
    status = model.status()
    assert status.records == sum(shard.records for shard in status.shards)
    assert status.records + status.deleted_records == NUM_RECORDS
    assert sum(each.request.num_records for each in status.requests) == status.deleted_records


def where_is_of_one_state(model: Model) -> None:
    for place in model.where([each.id for each in KEPT]):
        assert (place.state == "trained") == any(touch.is_head for touch in place.checkpoints)


def plan_is_of_one_state(model: Model) -> None:
    plan = model.plan_forget([each.id for each in KEPT])
    assert len(plan.removed) == len(KEPT)


def verify_is_well(model: Model) -> None:
    assert model.verify().findings == ()


QUESTIONS: dict[str, Callable[[Model], object]] = {
    "status": status_is_of_one_state,
    "where": where_is_of_one_state,
    "find text": lambda model: model.find(text=KEPT[3].text),
    "find subject": lambda model: model.find(subject="subject-1"),
    "find like": lambda model: model.find(like=KEPT[5].id),
    "ids of subject": lambda model: model.ids_of_subject("subject-2"),
    "plan forget": plan_is_of_one_state,
    "requests": lambda model: model.requests(),
    "verify": verify_is_well,
}


class Between:
    """Let something happen at a read of the ledger, or of a file of the model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, -1
        self.happens: Callable[[], object] = lambda: None
        for target, name in ((rows, "read"), (files, "read_whole")):
            monkeypatch.setattr(target, name, self._counting(getattr(target, name)))

    def _counting(self, read: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.happens()
            return read(*given, **options)

        return counted

    def asking(self, question: Callable[[], object], at: int, happens: Callable[[], object]) -> int:
        """Ask, let something happen before the read of that number; the number of reads."""
        self.count, self.at, self.happens = 0, at, happens
        question()
        self.at = -1
        return self.count


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_deletion_in_the_middle_of_a_question_is_no_damage(
    directory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(questions, "WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(SqlLedger, "scrub", lambda *_, **__: None)  # it would wait for the reader
    model, writer = (Model(directory, executor="serial") for _ in range(2))
    between = Between(monkeypatch)
    total = between.asking(lambda: QUESTIONS[name](model), -1, lambda: None)
    gone = iter(MORE)

    def happens() -> None:
        between.at = -1
        writer.forget([next(gone).id])

    for at in range(1, total + 1, max(1, total // num_examples(5, share=2))):
        between.asking(lambda: QUESTIONS[name](model), at, happens)
    assert next(gone) != MORE[0]


def test_damage_that_stays_is_reported(directory: Path) -> None:
    model = Model(directory, executor="serial")
    for path in (directory / RECORDS).iterdir():
        path.write_bytes(b"?")
    with pytest.raises(IntegrityError, match="not the one"):
        model.find(subject="subject-1")
    assert not model.verify().ok


@pytest.fixture
def half_written(directory: Path) -> Iterator[Model]:
    """Yield a model with a file that its running writer has not committed yet."""
    with files.writer_lock(directory / LOCK):
        (directory / RECORDS / "shard-00000-slice-00000-new.parquet").write_bytes(b"new")
        yield Model(directory, executor="serial")


def test_what_a_writer_has_not_committed_yet_is_not_judged(
    half_written: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sisa.model.WAITS_S", (0.0, 0.01))
    with pytest.raises(Busy, match="can't be checked now"):
        half_written.verify()


def test_verify_waits_for_a_writer_that_ends(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(directory, executor="serial")
    left = directory / RECORDS / "shard-00000-slice-00000-new.parquet"
    left.write_bytes(b"new")
    monkeypatch.setattr("sisa.model.WAITS_S", (0.0, 0.05, 5.0))
    with files.writer_lock(directory / LOCK):
        ends = threading.Timer(0.02, left.unlink)
        ends.start()
        assert model.verify().ok
    ends.join()


def test_an_unknown_file_that_nobody_writes_is_a_finding(directory: Path) -> None:
    (directory / RECORDS / "shard-00000-slice-00000-new.parquet").write_bytes(b"new")
    (found,) = Model(directory, executor="serial").verify().findings
    assert "does not know" in found.what


@pytest.mark.slow
def test_no_reader_sees_damage_beside_a_stream_of_deletions(directory: Path) -> None:
    model, writer = (Model(directory, executor="serial") for _ in range(2))
    deleting = threading.Thread(target=lambda: [writer.forget([each.id]) for each in MORE[:12]])
    deleting.start()
    asked = 0
    while deleting.is_alive():
        for question in QUESTIONS.values():
            question(model)
            asked += 1
    deleting.join()
    assert asked >= len(QUESTIONS)
    assert model.verify().ok
