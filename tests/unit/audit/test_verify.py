"""What must not deceive `verify`: weights, positions, digests and vectors that only look consistent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli.maintenance import verified
from sisa.audit.clean_process import Apart, train_stage
from sisa.audit.verify import Verification, verify
from sisa.core.digest import Keyed
from sisa.core.domain import Chain, Record, RecordRow, SliceJob
from sisa.core.errors import EnvironmentFault
from sisa.core.ports import CheckpointStore, Embedder, Executor, Vectors
from sisa.flows.chains import SerialExecutor
from sisa.flows.context.context import Context
from sisa.flows.ingest import train
from sisa.planning.layout import Assigner
from tests.fakes.ports import (
    SECRET,
    FakeCheckpoints,
    FakeModel,
    FakeTrainer,
    changed,
    fake_embed,
    fake_model,
)
from tests.fakes.ports import fake_record as record

RECORDS = [record(number) for number in range(24)]


class Forging(FakeTrainer):
    """Train weights that are consistent and stored well, but not those of the job."""

    def train(self, *given: Any, **options: Any) -> dict[str, bytes]:
        return {**super().train(*given, **options), "state": b"forged"}


class Resuming(FakeTrainer):
    """Depend on where training started, as a trainer does that carries state from stage to stage."""

    def __init__(self) -> None:
        self._last: str | None = None

    def train(self, job: SliceJob, parent: Any, *given: Any, **options: Any) -> dict[str, bytes]:
        files = super().train(job, parent, *given, **options)
        files["state"] = str(parent is not None and self._last == job.parent).encode()
        self._last = job.key
        return files


def trained_by(context: Context, make: Callable[[], FakeTrainer]) -> Context:
    def executor_for(store: CheckpointStore) -> Executor:
        return SerialExecutor(make(), context.stores.records, store)

    return changed(context, executor_for=executor_for)


def model_of(context_of: Callable[[Context], Context] = lambda context: context) -> FakeModel:
    """Return a model that was trained with a fault."""
    model = fake_model()
    train(context_of(model.context), RECORDS)
    return model


def apart(context: Context) -> Apart:
    store = FakeCheckpoints()

    def train_all(chains: Sequence[Chain]) -> None:
        for job in (job for chain in chains for job in chain.jobs):
            train_stage(context, job.shard, job.key, store)

    return Apart(store, train_all)


def replayed(context: Context, **options: Any) -> Verification:
    return verify(context, [0, 1, 2], FakeCheckpoints(), apart(context), **options)


def findings(found: Verification) -> str:
    assert found.ok is not bool(found.findings)
    return "; ".join(f"{each.where}: {each.what}" for each in found.findings)


def test_a_sound_model_is_proved() -> None:
    found = replayed(model_of().context, require_replay=True)
    assert (found.ok, found.replayed) == (True, 3)
    assert len(RECORDS) / 2 < found.vectors_embedded <= len(RECORDS)
    assert [each.equal for each in found.shards] == [True] * 3
    assert sorted(str(each.equal_apart) for each in found.shards) == ["None", "None", "True"]


def test_a_replay_that_differs_is_a_finding() -> None:
    model = model_of(lambda context: trained_by(context, Forging))
    assert verify(model.context, [], None).ok, "no held file is damaged"
    found = replayed(model.context)
    assert [each.equal for each in found.shards] == [False] * 3
    assert findings(found).count("the replay's bytes differ") == 3
    assert verified(found).exit_code == 4


def test_a_trainer_that_keeps_state_is_found_by_separate_processes() -> None:
    """Equal in one go, as ever; different stage by stage."""
    model = fake_model()
    context = trained_by(model.context, Resuming)
    train(context, RECORDS)
    found = verify(context, [0], FakeCheckpoints(), apart(context))
    assert found.shards[0].equal
    assert found.shards[0].equal_apart is False
    assert "each stage in its own process, its bytes differ" in findings(found)
    assert "DIFFERENT" in verified(found).text


class Wrong(Assigner):
    """Change one column of every row."""

    def __init__(self, right: Assigner, column: str) -> None:
        super().__init__(Keyed(SECRET), right.layout)
        self.__dict__["column"] = column

    def row(self, record: Record, num_tokens: int) -> RecordRow:
        row = super().row(record, num_tokens)
        column: str = self.__dict__["column"]
        value = getattr(row, column)
        other: dict[str, Any] = {
            "shard": (row.shard + 1) % self.layout.num_shards,
            "slice": (row.slice + 1) % self.layout.num_slices,
            "vector_id": row.vector_id + 1,
        }
        return replace(row, **{column: other.get(column, str(value)[::-1])})


@pytest.mark.parametrize("column", ["shard", "slice", "text_digest", "vector_id"])
def test_rows_are_those_that_the_key_gives(column: str) -> None:
    model = model_of(lambda context: changed(context, assigner=Wrong(context.settings.assigner, column)))
    assert f"row has another {column}" in findings(verify(model.context, [], None))


def test_vectors_are_those_of_their_texts() -> None:
    def other(texts: Sequence[str]) -> Vectors:
        return fake_embed([f"{text}!" for text in texts])

    model = model_of(lambda context: changed(context, embedder=lambda: SimpleNamespace(embed=other)))
    assert "not that of its record's text or question" in findings(verify(model.context, [], None))


def test_without_the_embedder_no_vector_is_checked() -> None:
    def absent() -> Embedder:
        raise EnvironmentFault("the model could not be fetched")

    found = verify(changed(model_of().context, embedder=absent), [], None)
    assert (found.ok, found.vectors_embedded) == (True, 0)


def test_nothing_replayed_is_said_and_can_be_refused() -> None:
    elsewhere = changed(model_of().context, fingerprint="another")
    found = replayed(elsewhere)
    result = verified(found)
    assert (found.ok, found.replayed, result.exit_code) == (True, 0, 0)
    assert "nothing was replayed" in result.text
    required = replayed(elsewhere, require_replay=True)
    assert [each.where for each in required.findings] == ["shard 0", "shard 1", "shard 2", "replay"]
    assert verified(required).exit_code == 4


def test_a_required_replay_of_some_shards_asks_for_those() -> None:
    context = model_of().context
    assert verify(context, [1], FakeCheckpoints(), require_replay=True).ok
    assert "no shard was replayed" in findings(verify(context, [], None, require_replay=True))
