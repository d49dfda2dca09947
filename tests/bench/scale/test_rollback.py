"""A deletion gets clean heads from its own shard: the rollback benchmark on 200 records.

For one of the deletions, other shards' slice files, index files and checkpoints are moved away: opening
one would fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.scale.rollback import (
    Deletion,
    Scale,
    Store,
    delete,
    make_records,
    measure,
    record_name,
    strayed,
)

SCALE = Scale(200, num_shards=4, num_slices=3, dimension=16)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "model", SCALE)
    store.build()
    return store


def touched_files(deletion: Deletion) -> set[tuple[str, int | None]]:
    return {(call.port, call.shard) for call in deletion.calls if call.port != "ledger"}


def test_a_plan_reads_only_the_shard_concerned(store: Store) -> None:
    for number in range(0, 200, 40):
        deletion = delete(store, record_name(number), "smoke")
        assert strayed(deletion) == []
        assert {shard for _, shard in touched_files(deletion)} <= {deletion.row.shard}
        rows = [call for call in deletion.calls if call.method == "rows"]
        assert rows
        assert {call.shard for call in rows} == {deletion.row.shard}


def test_the_number_of_ledger_calls_does_not_grow_with_the_shards(tmp_path: Path) -> None:
    calls = []
    for num_shards in (2, 16):
        store = Store(tmp_path / str(num_shards), Scale(200, num_shards, num_slices=3, dimension=16))
        store.build()
        deletion = delete(store, record_name(0), "smoke")
        calls.append(sum(call.port == "ledger" for call in deletion.calls))
    assert abs(calls[0] - calls[1]) <= SCALE.num_slices  # one for each slice that must train again


def test_clean_heads_need_no_file_of_another_shard(store: Store, tmp_path: Path) -> None:
    row = store.assigner.row(next(make_records(1)), 0)
    mine = f"shard-{row.shard:05d}-"
    ledger = store.ledger()
    others = [store.folder / "checkpoints" / c.key for c in ledger.checkpoints() if c.shard != row.shard]
    ledger.close()
    for folder in (store.folder / "records", store.index.root):
        others += [path for path in folder.iterdir() if not path.name.startswith(mine)]
    assert others
    for path in others:
        path.rename(tmp_path / path.name)
    assert delete(store, record_name(0), "smoke").clean_s > 0


def test_the_summary_shows_where_the_time_went(tmp_path: Path) -> None:
    found = measure(tmp_path, SCALE, num_deletions=3)
    parts = found["mean_seconds_by_work"]
    assert {"ledger read", "ledger commit"} <= parts.keys()
    assert found["calls_that_read_other_shards"] == 0
    assert found["mean_record_rows_read"] < SCALE.num_records * 2
    assert 0 < found["clean_heads_seconds"]["p50"] <= found["clean_heads_seconds"]["p95"]
