"""A base from scratch is made once, whole or not at all, after its guard has seen the records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import RunConfig
from sisa.config.runfile import load_run_file
from sisa.core.domain import Part, Record
from sisa.core.errors import Busy, ConfigConflict, IntegrityError, InvalidInput, SisaError
from sisa.core.events import Event, Notice, Report
from sisa.flows.wiring import scratch_base
from sisa.store.blobs import files
from sisa.store.blobs.files import writer_lock

CORPUS = ["The ferry to the island leaves at nine in the morning.", "Owls sleep by day in hollow trees."]
OWN = Record("r1", "p1", "text", (Part("text", "Ada Lane was born in Turin in the year of the flood."),))
SHARED = Record("r2", "p2", "text", (Part("text", CORPUS[0]),))


class Trained:
    """A trainer of bases that records its jobs and writes one file, or fails half way."""

    def __init__(self) -> None:
        self.jobs: list[scratch_base.BaseJob] = []
        self.texts: list[str] = []
        self.error: BaseException | None = None

    def __call__(self, job: scratch_base.BaseJob, _cluster: Mapping[str, Any], _report: Report) -> None:
        self.jobs.append(job)
        (job.target / "weights").write_text("w")
        if self.error is not None:
            raise self.error

    def write_rows(self, _job: scratch_base.BaseJob, texts: Sequence[str], _report: Report) -> None:
        self.texts = list(texts)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    found = Trained()
    monkeypatch.setattr(scratch_base, "find_base_trainer", lambda _: found)
    monkeypatch.setattr(scratch_base, "_write_rows", found.write_rows)
    return found


def configured(folder: Path, corpus: list[str] = CORPUS, **more: Any) -> RunConfig:
    (folder / "people.jsonl").write_text('{"id": "r1", "text": "x"}\n')
    rows = [json.dumps({"text": each}) for each in corpus]
    (folder / "corpus.jsonl").write_text("".join(f"{row}\n" for row in rows))
    block = json.dumps({"corpus": [{"path": "corpus.jsonl"}], **more})
    (folder / "run.yaml").write_text(
        f"base_model: {{scratch: {block}}}\n"
        "datasets: [{path: people.jsonl}]\noutput_dir: model\nsequence_len: 16\n"
    )
    return load_run_file(folder / "run.yaml")


def prepare(config: RunConfig, *records: Record) -> list[Event]:
    events: list[Event] = []
    scratch_base.prepare_base(config, records, "serial", events.append)
    return events


def test_it_is_trained_once_and_then_used(tmp_path: Path, trained: Trained) -> None:
    config = configured(tmp_path)
    assert any(isinstance(each, Notice) for each in prepare(config, OWN))
    assert config.base == str(tmp_path / "model-base")
    assert (tmp_path / "model-base" / "weights").is_file()
    assert trained.texts == CORPUS
    assert prepare(config, OWN) == []
    assert len(trained.jobs) == 1
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *("corpus.jsonl", "model-base", "people.jsonl", "run.yaml")
    ]


def test_two_at_once_are_refused_and_what_a_killed_one_left_goes(
    tmp_path: Path, trained: Trained
) -> None:
    config = configured(tmp_path)
    (tmp_path / ".model-base.unfinished").mkdir()
    (tmp_path / ".model-base.unfinished" / "corpus.jsonl").touch()
    with writer_lock(tmp_path / ".model-base.lock"), pytest.raises(Busy):
        prepare(config)
    assert not trained.jobs
    prepare(config)
    assert not list(tmp_path.glob(".model-base*"))


def test_a_lock_file_that_was_removed_meanwhile_locks_nothing(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_lock = files.take_lock

    def take_late(*lock: Any) -> None:
        (tmp_path / ".model-base.lock").unlink()  # as its former holder does at its end
        take_lock(*lock)

    monkeypatch.setattr(files, "take_lock", take_late)
    with pytest.raises(Busy):
        prepare(configured(tmp_path))
    assert not trained.jobs


def test_a_base_that_was_made_meanwhile_is_not_trained_again(
    tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, take_lock = configured(tmp_path), files.take_lock

    def take_late(*lock: Any) -> None:
        (tmp_path / "model-base").mkdir()  # by another process, after it was looked for
        take_lock(*lock)

    monkeypatch.setattr(files, "take_lock", take_late)
    with pytest.raises(Busy):
        prepare(config)
    assert not trained.jobs


def test_its_place_can_be_named_and_shared(tmp_path: Path, trained: Trained) -> None:
    config = configured(tmp_path, directory="bases/one")
    prepare(config)
    prepare(config.model_copy(update={"output_dir": tmp_path / "another"}))
    assert len(trained.jobs) == 1
    assert (tmp_path / "bases" / "one" / scratch_base.RECIPE_FILE).is_file()


@pytest.mark.parametrize("change", [{"layers": 7}, {"corpus": ["Something else is told here today."]}])
def test_another_recipe_is_a_conflict(tmp_path: Path, trained: Trained, change: dict[str, Any]) -> None:
    prepare(configured(tmp_path))
    with pytest.raises(ConfigConflict, match="another corpus or with other settings"):
        prepare(configured(tmp_path, **change))
    assert len(trained.jobs) == 1


def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, trained: Trained) -> None:
    (tmp_path / "model-base").mkdir()
    (tmp_path / "model-base" / "mine").touch()
    with pytest.raises(ConfigConflict, match="holds something else"):
        prepare(configured(tmp_path))
    assert [each.name for each in (tmp_path / "model-base").iterdir()] == ["mine"]
    assert not trained.jobs


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_what_was_cut_short_leaves_nothing(tmp_path: Path, trained: Trained, error: Any) -> None:
    before = configured(tmp_path) and sorted(tmp_path.iterdir())
    trained.error = error
    with pytest.raises(type(error)):
        prepare(configured(tmp_path))
    assert sorted(tmp_path.iterdir()) == before


def test_the_guard_comes_before_the_training_and_ever_after(tmp_path: Path, trained: Trained) -> None:
    config = configured(tmp_path)
    with pytest.raises(InvalidInput, match="share their text"):
        prepare(config, OWN, SHARED)
    assert not trained.jobs
    prepare(config, OWN)
    with pytest.raises(InvalidInput, match="1 of 2 records"):
        prepare(config, OWN, SHARED)
    scratch_base.guard(config, [OWN])
    with pytest.raises(InvalidInput, match="1 of 1 records"):
        scratch_base.guard(config, [SHARED])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            (scratch_base.RUNS_FILE, "other"),
            (scratch_base.RECIPE_FILE, "{}"),
            (scratch_base.RECIPE_FILE, "no JSON"),
        ),
        (scratch_base.RECIPE_FILE, '{"recipe": 1, "runs": 2}'),
    ],
)
def test_what_was_damaged_is_reported(tmp_path: Path, trained: Trained, name: str, text: str) -> None:
    config = configured(tmp_path)
    prepare(config)
    (tmp_path / "model-base" / name).write_text(text)
    with pytest.raises(IntegrityError):
        scratch_base.guard(config, [OWN])
    with pytest.raises(IntegrityError):
        prepare(config)
    assert len(trained.jobs) == 1


@pytest.mark.parametrize(
    ("corpus", "message"),
    [("", "holds no text"), ('{"text": 3}\n{"id": "a"}\n', "line 2"), ("no JSON\n", "broken JSON")],
)
def test_a_corpus_that_can_not_be_read_is_refused(
    tmp_path: Path, trained: Trained, corpus: str, message: str
) -> None:
    config = configured(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(corpus)
    with pytest.raises(InvalidInput) as caught:
        prepare(config)
    assert any(message in f"{each.where} {each.what}" for each in caught.value.problems)
    assert not trained.jobs


def test_who_trains_it() -> None:
    assert scratch_base.find_base_trainer("serial") is scratch_base.train_here
    with pytest.raises(InvalidInput, match="no executor of this name trains a base"):
        scratch_base.find_base_trainer("none")
    job = scratch_base.BaseJob({"workers": 2}, Path("texts"), Path("target"))
    with pytest.raises(SisaError, match="with one worker"):
        scratch_base.train_here(job, {}, print)
