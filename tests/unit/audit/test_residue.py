"""`sisa gc` and `sisa sweep`: garbage is listed and removed, residue of every kind is found, and nothing
is claimed of a clean model that is not so."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sisa.audit.garbage import Garbage, list_garbage, remove_garbage
from sisa.audit.own_files import Searched, search_model
from sisa.audit.residue import Scan, scan_residue
from sisa.audit.search_strings import MIN_BYTES, READ_BYTES, SearchStrings
from sisa.config.sources import DatasetSource
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.core.events import EpochTrained
from sisa.core.ports import Change
from sisa.flows import reconcile
from sisa.flows.context.areas import unlisted
from sisa.flows.ingest import add
from sisa.flows.wiring.ledger_place import LEDGER, LOCK
from sisa.flows.wiring.upper_houses import SERVICE_STATE
from sisa.model import Model
from sisa.store.areas import CHECKPOINTS, INDEX, METRICS, RECORDS, REPLAYS
from sisa.store.blobs.files import writer_lock
from sisa.store.metrics import MIN_RECORDS, FileMetrics, metrics_line
from sisa.store.witness import FileWitness
from tests.crash import Crash, crash
from tests.fakes.ports import changed, with_config
from tests.models.confessing import (
    DELETED,
    NUM_RECORDS,
    build,
    built_pair,
    content,
    context_of,
    record,
    stored,
    use_fake_resources,
)
from tests.unit.commands import Ask, Sisa

pytestmark = pytest.mark.usefixtures("own_places")
GONE = record(DELETED)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return built_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def before(pair: tuple[Path, Path]) -> Path:
    """Return the model that still holds the record; tests must not change it."""
    return pair[0]


@pytest.fixture
def model(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """Return a copy of the model after the deletion."""
    return Path(shutil.copytree(pair[1], tmp_path / "model"))


def scan(model: Path, **options: Any) -> Scan:
    with context_of(model) as context:
        return scan_residue(context, model, **options)


def kinds(found: Scan) -> list[str]:
    return sorted({each.kind for each in found.residue})


def checkpoints(model: Path) -> set[str]:
    return {path.name for path in (model / CHECKPOINTS).iterdir()}


def tainted_key(before: Path, model: Path) -> str:
    return min(checkpoints(before) - checkpoints(model))


def put_back(before: Path, model: Path, *, known: bool) -> str:
    """Return a tainted checkpoint to the model, and to its ledger if that is to know it."""
    key = tainted_key(before, model)
    shutil.copytree(before / CHECKPOINTS / key, model / CHECKPOINTS / key)
    if known:
        with context_of(before) as old, context_of(model) as context:
            held = [each for each in old.stores.ledger.checkpoints() if each.key == key]
            context.stores.ledger.commit(Change(checkpoints=held))
    return key


def listed(model: Path) -> dict[str, Garbage]:
    with context_of(model) as context:
        return {each.path: each for each in list_garbage(context, model)}


def test_a_clean_model_is_proven_clean(model: Path) -> None:
    found = scan(model, ids=[GONE.id], texts=[GONE.text, *(part.text for part in GONE.parts)])
    assert (found.residue, found.clean) == ((), True)
    assert found.scanned["rows"] == found.scanned["vectors"] == NUM_RECORDS - 1
    assert found.scanned["checkpoints"] == len(checkpoints(model))
    assert found.scanned["strings"] == 4
    assert found.places == (str(model),)


def test_the_model_before_the_deletion_holds_the_record(before: Path) -> None:
    found = scan(before, ids=[GONE.id])
    assert kinds(found) == ["string"]
    where = {Path(each.where).parts[-2] for each in found.residue}
    assert RECORDS in where
    assert any(each.position.endswith("column id") for each in found.residue)


def test_a_row_of_a_deleted_record_is_residue(model: Path) -> None:
    with context_of(model) as context:
        context.stores.records.write(0, 0, "0" * 64, [stored(context, 1), stored(context, DELETED)])
    (found,) = scan(model).residue
    assert found.kind == "deleted_row"
    assert "req-" in found.what
    assert found.position in ("row 0", "row 1")


def test_a_row_that_was_never_held_is_residue(model: Path) -> None:
    with context_of(model) as context:
        context.stores.records.write(0, 0, "0" * 64, [stored(context, 999)])
    assert kinds(scan(model)) == ["unknown_row"]


@pytest.mark.parametrize("known", [False, True])
def test_a_vector_of_a_deleted_record_is_residue(model: Path, known: bool) -> None:
    with context_of(model) as context:
        row = context.settings.assigner.row(GONE, 1)
        (base,) = context.stores.ledger.indexes(row.shard)
        wanted: dict[int, Any] = {each.vector_id: None for each in context.stores.ledger.rows(row.shard)}
        wanted[row.vector_id] = context.compute.embedder().embed([GONE.text])
        made = context.stores.index.build(row.shard, "0" * 64, base, wanted)
        if known:
            context.stores.ledger.commit(Change(indexes=[made]))
            context.stores.index.erase([base.name])
    (found,) = scan(model).residue
    assert (found.kind, Path(found.where).name) == ("deleted_vector", made.name)


@pytest.mark.parametrize("known", [False, True])
def test_a_checkpoint_that_a_deleted_record_touched_is_residue(
    model: Path, before: Path, known: bool
) -> None:
    put_back(before, model, known=known)
    held = content(model)
    assert "tainted" in kinds(found := scan(model, ids=[GONE.id]))
    assert set(kinds(found)) <= {"tainted", "unknown_file", "string"}
    assert content(model) == held  # a scan changes nothing


def test_a_clean_checkpoint_in_scratch_is_none(model: Path, before: Path) -> None:
    key = min(checkpoints(model))
    shutil.copytree(model / CHECKPOINTS / key, model / REPLAYS / "replay" / key)
    assert scan(model).clean
    gone = tainted_key(before, model)
    shutil.copytree(before / CHECKPOINTS / gone, model / REPLAYS / "replay" / gone)
    assert kinds(scan(model)) == ["tainted", "unknown_file"]


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (f"{CHECKPOINTS}/*/manifest.json", "unreadable"),
        (f"{CHECKPOINTS}/*/{ADAPTER_FILE}", "damaged"),
        (f"{RECORDS}/*", "damaged"),
        (f"{INDEX}/*", "damaged"),
    ],
)
def test_what_is_damaged_proves_nothing(model: Path, file: str, kind: str) -> None:
    path = min(model.glob(file))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert kinds(scan(model)) == [kind]


def test_files_that_can_not_be_read_as_ours_are_not_passed_over(model: Path) -> None:
    names = {"records/.tmp-x", "records/a.bin", "index/x.faiss", ".tmp-y", "notes.txt", "scratch/a"}
    for path in (model / name for name in names):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PAR1 and no more" if path.parent.name == RECORDS else b"who knows")
    found = scan(model).residue
    unreadable = {Path(each.where).name for each in found if each.kind == "unreadable"}
    assert {".tmp-x", "a.bin"} <= unreadable
    unknown = {each.where for each in found if each.kind == "unknown_file"}
    assert unknown == {str(model / name.replace("scratch/a", "scratch")) for name in names}


def test_exported_adapters(model: Path, before: Path, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    with context_of(model) as context, context_of(before) as old:
        heads = [head for head in context.stores.ledger.heads() if head.key]
        stages = {each.key for each in context.stores.ledger.checkpoints()} - {
            head.key for head in heads
        }
        shard = context.settings.assigner.row(GONE, 1).shard
        stale = next(head.key for head in old.stores.ledger.heads() if head.shard == shard)
    assert heads[0].key
    assert stale
    sources = {
        "current": model / CHECKPOINTS / heads[0].key,
        "stage": model / CHECKPOINTS / min(stages),
        "stale": before / CHECKPOINTS / stale,
    }
    for name, source in sources.items():
        (exports / name).mkdir(parents=True)
        shutil.copy(source / ADAPTER_FILE, exports / name / ADAPTER_FILE)
    found = scan(model, also=[exports])
    assert [(each.kind, Path(each.where).parent.name) for each in found.residue] == [
        ("stale_adapter", "stale")
    ]
    assert [Path(each).parent.name for each in found.outdated_exports] == ["stage"]
    assert found.scanned["adapters"] == 3


def test_deleted_ids_in_sources_are_found_without_being_named(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"id": record(number).id, "text": "x"}) for number in (0, DELETED, 999)]
    source = tmp_path / "people.jsonl"
    odd = ["not json", '{"id": "\\ud800"}', '{"id": 7}', "[" * 100_000]
    source.write_text("\n".join([*odd, *lines]))
    table = tmp_path / "people.parquet"
    pq.write_table(pa.table({"id": [GONE.id], "text": ["x"]}), table)
    pq.write_table(pa.table({"name": ["no ids"]}), tmp_path / "other.parquet")
    found = scan(model, also=[source, table, tmp_path / "other.parquet"])
    assert [(each.kind, Path(each.where).name, each.position) for each in found.residue] == [
        ("deleted_row", "people.jsonl", "row 5"),
        ("deleted_row", "people.parquet", "row 0"),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".json"])
def test_a_whole_number_names_a_row_in_every_json_source(
    model: Path, tmp_path: Path, suffix: str
) -> None:
    with context_of(model) as context:
        (gone,) = context.stores.ledger.tombstones()
        other = replace(gone, id_digest=context.settings.assigner.id_digest("7"))
        context.stores.ledger.commit(Change(tombstones=[other]))
    source = tmp_path / f"people{suffix}"
    source.write_text('{"id": 7}')
    assert kinds(scan(model, also=[source])) == ["deleted_row"]
    vocabulary = tmp_path / "vocab.json"
    vocabulary.write_text('{"name": 6, "id": 7}')
    assert not kinds(scan(model, also=[vocabulary]))


def test_ids_are_looked_for_in_the_columns_that_the_run_file_names(model: Path, tmp_path: Path) -> None:
    """A file may number its rows in another column."""
    rows: dict[str, list[Any]] = {"id": [1], "ticket": [GONE.id]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": 1, "ticket": GONE.id}))
    also = [tmp_path / "a.parquet", tmp_path / "a.jsonl"]
    with context_of(model) as context:
        sources = (DatasetSource(path="a/b"), DatasetSource(path="c/d", id_column="ticket"))
        found = scan_residue(with_config(context, datasets=sources), model, also=also)
    assert [(each.kind, each.position) for each in found.residue] == [("deleted_row", "row 0")] * 2
    assert scan(model, also=also).clean


def test_a_saved_dataset_is_a_copy_of_a_source(model: Path, tmp_path: Path) -> None:
    """It is an Arrow stream."""
    saved = tmp_path / "data-00000-of-00001.arrow"
    table = pa.table({"id": [record(0).id, GONE.id], "text": ["x", "x"]})
    with pa.ipc.new_stream(str(saved), table.schema) as writer:
        writer.write_table(table)
    found = scan(model, also=[saved])
    assert [(each.kind, each.position) for each in found.residue] == [("deleted_row", "row 1")]


def test_rows_without_an_id_prove_nothing(model: Path) -> None:
    (model / RECORDS / "a.jsonl").write_text('{"text": "x"}')
    pq.write_table(pa.table({"id": pa.array([None], pa.string())}), model / RECORDS / "b.parquet")
    assert {(each.kind, Path(each.where).name) for each in scan(model).residue} == {
        ("unknown_file", "a.jsonl"),
        ("unknown_file", "b.parquet"),
    }


def test_a_place_that_is_not_there_is_bad_input(model: Path) -> None:
    with pytest.raises(InvalidInput):
        scan(model, also=[model / "none"])


def test_left_overs_of_ours_are_scanned(model: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp" / "sisa-scratch-1"
    partial = tmp_path / "cache" / "base" / ".partial-2"
    whole = tmp_path / "cache" / "base" / "x"
    foreign = tmp_path / "tmp" / "other"
    for path in (scratch, partial, whole, foreign):
        path.mkdir(parents=True)
        (path / "rows.jsonl").write_text(json.dumps({"id": GONE.id}))
    shutil.copytree(model / CHECKPOINTS, scratch / "of-another-model")
    (scratch / "of-another-model" / min(checkpoints(model)) / ADAPTER_FILE).write_bytes(b"changed")
    found = scan(model)
    assert {Path(each.where).parent for each in found.residue} == {scratch, partial}


def hide_in_parquet(model: Path) -> None:
    columns = {"id": ["a"], "texts": [[f"see {GONE.id} there", "b"]]}
    pq.write_table(pa.table(columns), model / RECORDS / "a.parquet", compression="zstd")


def hide_in_ledger(model: Path) -> None:
    with context_of(model) as context:
        context.stores.ledger.commit(Change(meta={"note": f"it's of {GONE.id}"}))


HIDING: dict[str, Callable[[Path], object]] = {
    "name": lambda model: (model / RECORDS / f".tmp-{GONE.id}").touch(),
    "raw bytes": lambda model: (model / "core").write_bytes(b"\0" * 99 + GONE.id.encode() + b"\0"),
    "UTF-16": lambda model: (model / "core").write_bytes(GONE.id.encode("utf-16-le")),
    "Parquet": hide_in_parquet,
    "ledger": hide_in_ledger,
}


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
def test_a_named_string_is_found_wherever_it_hides(model: Path, hide: Callable[[Path], object]) -> None:
    hide(model)
    found = scan(model, ids=["never-here", GONE.id])
    strings = [each for each in found.residue if each.kind == "string"]
    assert len(strings) == 1
    assert strings[0].what.startswith("string 2")
    assert strings[0].position
    text = json.dumps([(each.where, each.position, each.what) for each in found.residue])
    assert GONE.id not in text


def test_the_write_ahead_log_is_scanned(model: Path) -> None:
    """A reader keeps the log: a removed row stays in it until the checkpoint succeeds."""
    reader = sqlite3.connect(model / LEDGER)
    try:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM meta").fetchall()
        for value in (GONE.id, "gone"):
            with context_of(model) as context:
                context.stores.ledger.commit(Change(meta={"note": value}))
        with context_of(model) as context:
            found = scan_residue(context, model, ids=[GONE.id])
    finally:
        reader.close()
    assert [Path(each.where).name for each in found.residue] == ["ledger.sqlite-wal"]


def test_an_id_that_is_a_part_of_a_held_one_is_no_residue(model: Path) -> None:
    part = record(DELETED + 1).id[:-1]
    assert len(part) >= MIN_BYTES
    found = scan(model, ids=[part]).residue  # the fake's weights name their records, unlike real ones
    assert {Path(each.where).parts[-3] for each in found} == {CHECKPOINTS}


def test_short_strings_are_compared_with_values_alone(model: Path) -> None:
    (model / RECORDS / "raw").write_bytes(b"ab")
    found = scan(model, ids=["ab"])
    assert found.scanned["strings_too_short_for_raw_bytes"] == 1
    assert kinds(found) == ["unknown_file"]
    pq.write_table(pa.table({"id": ["ab"]}), model / RECORDS / "b.parquet")
    assert "string" in kinds(scan(model, ids=["ab"]))


@pytest.mark.parametrize("shift", [-9, -4, -1, 0, 1])
def test_a_string_across_two_blocks_is_found(tmp_path: Path, shift: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"." * (READ_BYTES + shift) + b"ada lovelace" + b"." * 10)
    (place,) = SearchStrings(["ada lovelace"]).in_file(path)
    assert place.position == f"byte {READ_BYTES + shift}"


def test_many_strings_in_one_pass() -> None:
    texts = [f"person {number:04d} was here" for number in range(500)]
    block = b"..".join(text.encode() for text in texts)
    assert [number for _, number in SearchStrings(texts).in_block(block)] == list(range(500))


def test_a_head_that_serves_while_added_records_wait_is_clean(model: Path) -> None:
    """Its chain was made before they came; they are in its slices and not in its lineage."""
    with context_of(model) as context, pytest.raises(Crash):
        add(changed(context, executor_for=crash), [record(number) for number in range(100, 112)])
    with context_of(model) as context:
        assert not all(head.converged for head in context.stores.ledger.heads())
    assert scan(model).clean


def test_index_bytes_that_are_not_those_of_their_name_are_not_parsed(model: Path) -> None:
    path = min((model / INDEX).iterdir())
    shutil.copy(path, model / INDEX / f"shard-00000-{'0' * 64}.faiss")
    found = scan(model)
    assert kinds(found) == ["unknown_file", "unreadable"]
    assert any("not parsed" in each.what for each in found.residue)


# --- gc ------------------------------------------------------------------------------------------


def test_the_files_of_a_service_are_no_garbage_and_no_residue(
    model: Path, service_files: tuple[str, ...]
) -> None:
    assert listed(model) == {}
    assert scan(model, ids=[GONE.id], texts=[GONE.text]).clean
    with context_of(model) as context:
        assert remove_garbage(context, model) == ()
    assert [name for name in service_files if not (model / name).exists()] == []
    (model / f"{SERVICE_STATE}.old").touch()  # only looks like one of them
    assert list(listed(model)) == [f"{SERVICE_STATE}.old"]


def test_garbage_of_every_kind_is_listed_with_its_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = min(checkpoints(model))
    planted = {
        "notes.txt": False,
        ".tmp-top": True,
        "records/.tmp-a": True,
        "records/old.parquet": True,
        "index/old.faiss": True,
        "checkpoints/old/manifest.json": True,
        f"checkpoints/{key}/surplus": True,
        "scratch/replay/x": True,
    }
    for name in planted:
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(b"12345")
    found = listed(model)
    expected = {name.replace("old/manifest.json", "old").replace("/replay/x", "") for name in planted}
    assert set(found) == expected
    assert {each.num_bytes for each in found.values()} == {5}
    assert [path for path, each in found.items() if not each.removable] == ["notes.txt"]
    for here, named in ((model.parent, model.name), (model, ".")):
        monkeypatch.chdir(here)
        assert listed(Path(named)) == found, "a relative path names the same"
    held = content(model)
    with context_of(model) as context:
        remove_garbage(context, model)
    assert list(listed(model)) == ["notes.txt"]
    assert set(held) - set(content(model)) == set(planted) & set(held)


def test_a_retired_checkpoint_leaves_the_ledger_first(model: Path, before: Path) -> None:
    key = put_back(before, model, known=True)
    assert "retired" in listed(model)[f"checkpoints/{key}"].reason
    with context_of(model) as context:
        remove_garbage(context, model)
        assert key not in {each.key for each in context.stores.ledger.checkpoints()}
    assert key not in checkpoints(model)


def test_a_link_is_removed_and_its_target_kept(model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    (model / RECORDS / "link").symlink_to(outside)
    with context_of(model) as context:
        remove_garbage(context, model)
    assert (outside / "file").exists()
    assert listed(model) == {}


def with_residue(model: Path) -> None:
    """Add a row of the deleted record, in a slice file that the ledger does not list."""
    with context_of(model) as context:
        context.stores.records.write(0, 0, "0" * 64, [stored(context, DELETED)])


def test_a_model_is_read_through_a_link_to_it(model: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(model)
    clean = scan(tmp_path / "current", also=[tmp_path / "current"])
    assert (clean.residue, clean.scanned["rows"]) == ((), NUM_RECORDS - 1)
    with_residue(model)
    assert kinds(scan(tmp_path / "current")) == kinds(scan(model)) == ["deleted_row"]


@pytest.mark.parametrize("room", [RECORDS, CHECKPOINTS, INDEX])
def test_a_room_is_read_behind_a_link(model: Path, tmp_path: Path, room: str) -> None:
    direct = scan(model, ids=[record(0).id])
    moved = tmp_path / "other disk" / room
    moved.parent.mkdir()
    (model / room).rename(moved)
    (model / room).symlink_to(moved)
    found = scan(model, ids=[record(0).id])
    assert found.scanned == direct.scanned
    assert len(found.residue) == len(direct.residue) >= 1
    (moved / "notes").write_text("who knows")
    assert "unknown_file" in kinds(scan(model))


def test_another_place_is_read_through_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "people.jsonl").write_text(json.dumps({"id": GONE.id}))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (found,) = scan(model, also=[tmp_path / "link"]).residue
    assert (found.kind, found.where) == ("deleted_row", str(tmp_path / "real" / "people.jsonl"))


@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "elsewhere/file"])
def test_a_link_out_of_what_is_read_is_residue(model: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "notes").write_text("x")
    (tmp_path / "more" / "link").symlink_to(tmp_path / target)
    (found,) = scan(model, also=[tmp_path / "more"]).residue
    assert (found.kind, Path(found.where).name) == ("link", "link")
    followed = scan(model, also=[tmp_path / "more", tmp_path / "elsewhere"])
    assert followed.clean == (target != "nowhere")


def test_nothing_is_clean_where_nothing_was_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    assert kinds(scan(model, also=[tmp_path / "empty"])) == ["nothing_read"]
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed" / "file").write_text("x")
    listed_names = os.listdir

    def refuse(path: Any) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed_names(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert kinds(scan(model, also=[tmp_path / "closed"])) == ["nothing_read", "unreadable"]


# --- an erasure that can't be carried out in part -------------------------------------------------


def test_a_witness_that_fails_does_not_keep_the_text(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deletion is committed before the witness records it, so its bytes go even if that fails."""
    use_fake_resources(monkeypatch)
    model = Model(Path(shutil.copytree(before, tmp_path / "held")), executor="serial")
    with model.writing():
        pass  # the witness exists

    def refuse(*_: Any) -> None:
        raise EnvironmentFault("the witness can't be written")

    with monkeypatch.context() as broken:
        broken.setattr(FileWitness, "append", refuse)
        with pytest.raises(EnvironmentFault, match="witness"):
            model.forget([GONE.id])
    with context_of(model.directory) as context:
        assert context.stores.ledger.num_tombstones() == 1
        assert not any(unlisted(context).values())


# --- the command line ----------------------------------------------------------------------------


def test_gc_on_the_command_line(ask: Ask, model: Path) -> None:
    (model / RECORDS / "old.parquet").write_bytes(b"123")
    found = ask("gc", "-m", model, "--dry-run")
    assert (found["dry_run"], found["removed"]) == (True, 0)
    assert [(each["path"], each["num_bytes"]) for each in found["items"]] == [("records/old.parquet", 3)]
    assert (model / RECORDS / "old.parquet").exists()
    with writer_lock(model / LOCK):
        ask("gc", "-m", model, code=5)
    found = ask("gc", "-m", model)
    assert (found["removed"], found["removed_bytes"]) == (1, 3)
    assert not (model / RECORDS / "old.parquet").exists()


def test_sweep_on_the_command_line(ask: Ask, sisa: Sisa, model: Path, tmp_path: Path) -> None:
    found = ask("sweep", "-m", model, GONE.id)
    assert (found["clean"], found["residue"]) == (True, [])
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(part.text for part in GONE.parts) + "\n\n")
    ids = tmp_path / "ids.txt"
    ids.write_text(GONE.id + "\n")
    exports = tmp_path / "exports"
    exports.mkdir()
    (exports / "log.txt").write_text(f"{GONE.id}: {GONE.parts[0].text}")
    options = ("--ids-file", ids, "--text-file", texts, "--also", exports)
    found = ask("sweep", "-m", model, *options, code=4)
    assert (found["clean"], len(found["residue"])) == (False, 2)
    printed = repr(sisa("sweep", "-m", model, *options, "--json"))
    assert GONE.id not in printed
    assert GONE.parts[0].text not in printed


def test_sweep_refuses_what_it_can_not_use(ask: Ask, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    ask("sweep", "-m", model, "--text-file", empty, code=2)
    ask("sweep", "-m", model, "--text-file", tmp_path / "none", code=2)
    ask("sweep", "-m", model, "--also", tmp_path / "none", code=2)
    with writer_lock(model / LOCK):
        ask("sweep", "-m", model, code=5)


# --- metrics -------------------------------------------------------------------------------------


def metrics_of(model: Path, stage: str, text: str = "") -> Path:
    """Write a run's file with a loss of a stage."""
    event = EpochTrained(0, 0, stage, 1, 1, MIN_RECORDS, 10, 0.5, 1.5)
    made = metrics_line(event, "2026-11-25T21:37:49.123+00:00", "20261125T213749Z-3f9a1c2b")
    assert made is not None
    FileMetrics(model / METRICS).append(made)
    path = next((model / METRICS).iterdir())
    path.write_text(path.read_text() + text)
    return path


def test_metrics_of_held_stages_are_kept_and_prove_themselves(model: Path) -> None:
    path = metrics_of(model, min(checkpoints(model)))
    assert kinds(scan(model)) == []
    assert listed(model) == {}
    with context_of(model) as context:
        remove_garbage(context, model)
        reconcile.erase_unreferenced(context)
    assert '"loss":1.5' in path.read_text()


def test_a_loss_of_an_erased_stage_is_residue_until_the_next_sweep(model: Path, before: Path) -> None:
    path = metrics_of(model, tainted_key(before, model))
    assert kinds(scan(model)) == ["stale_loss"]
    with context_of(model) as context:
        reconcile.erase_unreferenced(context)
    assert kinds(scan(model)) == []
    assert '"loss":null' in path.read_text()


def test_what_else_lies_among_metrics_is_found(model: Path) -> None:
    path = metrics_of(model, min(checkpoints(model)), text='{"id": "p001"}\n')
    assert kinds(scan(model)) == ["unreadable"]
    path.write_text("")
    (path.parent / "other.jsonl").write_text("text")
    assert list(listed(model)) == [f"{METRICS}/other.jsonl"]
    with context_of(model) as context:
        remove_garbage(context, model)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_database_with_a_garbled_schema_is_looked_through_as_bytes(tmp_path: Path) -> None:
    path = tmp_path / "copy.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE people (name TEXT)")
        connection.execute("INSERT INTO people VALUES ('Zaphod Quorvane')")
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE people", b"CREATE TABLE pe \xff\xffe"))
    (found,) = SearchStrings(["Zaphod Quorvane"], []).in_file(path)
    assert found.number == 0


def searched(directory: Path, *, max_bytes: int = 2**22) -> Searched:
    """Search a model for the deleted record, for a held one, and for an id of a single byte."""
    held = record(1)
    ids, texts = [GONE.id, held.id, "1"], [GONE.text, *(part.text for part in held.parts)]
    with context_of(directory) as context:
        return search_model(context, directory, ids, texts, max_bytes)


def test_a_models_own_files_are_searched_for_what_was_deleted(model: Path) -> None:
    """Others may have the words of a record, so rows are compared by id; fake adapters name theirs."""
    before = searched(model)
    assert (set(before.found), before.num_left_out) == ({record(1).id}, 0)
    adapters = [each for each in model.rglob(ADAPTER_FILE) if record(1).id.encode() in each.read_bytes()]
    assert before.found[record(1).id] >= 1 + len(adapters) > 1
    (model / "left.txt").write_text(f"{GONE.text}, and an id: 1")  # short ones occur by chance
    (model / f"of-{GONE.id}").touch()
    found = searched(model)
    assert (found.found[GONE.text], found.found[GONE.id], found.found["1"]) == (1, 1, 0)
    assert found.num_files == before.num_files + 2
    assert GONE.id not in repr(found)


def test_a_search_leaves_out_and_counts_what_is_too_large(model: Path) -> None:
    whole, none = searched(model), searched(model, max_bytes=0)
    assert none.num_bytes == 0
    assert none.num_files + none.num_left_out == whole.num_files
    largest = max(path.stat().st_size for path in model.rglob("*") if path.is_file())
    some = searched(model, max_bytes=whole.num_bytes - 1)
    assert (some.num_left_out, some.num_bytes) == (1, whole.num_bytes - largest)


def test_sealed_files_are_searched_as_plaintext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    build(tmp_path / "sealed", encrypt=True)
    assert record(1).id.encode() not in b"".join(content(tmp_path / "sealed").values())
    assert searched(tmp_path / "sealed").found[record(1).id] > 1
