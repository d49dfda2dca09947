"""Test the contract of RecordStore over the fake and Parquet files on a disk and on an S3 server.

Records return unchanged. A slice's file depends on its records only, so that a file after a deletion
equals one that never had the record. A changed file is refused before it is parsed.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import sha256_hex
from sisa.core.domain import Part, Record, SliceFile
from sisa.core.errors import IntegrityError
from sisa.core.ports import RecordStore, StoredRecord
from sisa.store.blobs.keyring import is_sealed
from sisa.store.records import FileRecords
from tests.contract.storage.forms import FORMS, SECRET_TEXT, opened, records, stored_as
from tests.fakes.keyring import PLAIN
from tests.fakes.ports import FakeRecords, fake_record

slices = st.lists(records, max_size=6, unique_by=lambda record: record.id)


def stored(found: list[Record]) -> list[StoredRecord]:
    return [StoredRecord(f"{place:064x}", record) for place, record in enumerate(found)]


def several(*numbers: int) -> list[StoredRecord]:
    return stored([fake_record(number, "ada") for number in numbers])


@pytest.fixture(params=["fake", *FORMS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RecordStore:
    return FakeRecords() if request.param == "fake" else stored_as(FileRecords, request, tmp_path)


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> FileRecords:
    return stored_as(FileRecords, request, tmp_path)


def bytes_of(store: FileRecords, name: str) -> bytes:
    return store.blobs.get(name, "file")


def test_what_is_written_is_read(store: RecordStore) -> None:
    assert store.held() == frozenset()
    file = store.write(2, 1, "root", several(1, 2, 3))
    assert store.read(file) == tuple(several(1, 2, 3))
    store.check(file)
    assert (file.shard, file.slice, file.root, file.num_records) == (2, 1, "root", 3)
    assert store.held() == {file.name}


@given(slices, st.booleans())
def test_any_records_survive_parquet(
    tmp_path_factory: pytest.TempPathFactory, found: list[Record], sealed: bool
) -> None:
    store = opened(FileRecords, tmp_path_factory.mktemp("store"), "sealed" if sealed else "files")
    file = store.write(0, 0, "root", stored(found))
    assert store.read(file) == tuple(stored(found))
    data = bytes_of(store, file.name)
    assert is_sealed(data) == sealed
    assert file.num_bytes == len(store.keyring.unseal("records", file.name, "", data))


def test_a_file_depends_on_its_records_alone(store: RecordStore, tmp_path: Path) -> None:
    """Writing again, elsewhere, or after other slices gives the same bytes."""
    store.write(0, 0, "before", several(1, 2, 3, 4))
    after = store.write(0, 0, "after", several(1, 3))
    fresh = FakeRecords() if isinstance(store, FakeRecords) else FileRecords(tmp_path / "fresh", PLAIN)
    assert fresh.write(0, 0, "after", several(1, 3)) == after


def test_a_write_changes_no_other_file(store: RecordStore) -> None:
    first = store.write(0, 0, "one", several(1, 2))
    second = store.write(0, 0, "two", several(1))
    assert store.held() == {first.name, second.name}
    assert store.read(first) == tuple(several(1, 2))


def test_erased_is_gone_and_absence_is_no_error(store: RecordStore) -> None:
    first = store.write(0, 0, "one", several(1, 2))
    second = store.write(0, 0, "two", several(1))
    store.erase([first.name, "never-held.parquet"])
    assert store.held() == {second.name}
    for look in (store.read, store.check):
        with pytest.raises(IntegrityError):
            look(first)


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_truncated_file_is_refused_by_its_path(folder: FileRecords, cut: int) -> None:
    """A sealed one whose magic is intact fails at its seal, any other one at its digest."""
    file = folder.write(0, 0, "root", several(1, 2))
    folder.blobs.put(file.name, bytes_of(folder, file.name)[:cut])
    for look in (folder.read, folder.check):
        with pytest.raises(IntegrityError, match="not the one that was recorded") as caught:
            look(file)
        assert caught.value.where == folder.blobs.location(file.name)


def test_a_file_of_another_form_is_refused(folder: FileRecords) -> None:
    """This holds even for a file whose digest the ledger names."""
    for data in (b"", b"PAR1 not really PAR1"):
        file = SliceFile(0, 0, "root", 1, sha256_hex(data), len(data))
        folder.blobs.put(file.name, data)
        with pytest.raises(IntegrityError, match="can't be parsed"):
            folder.read(file)


def test_a_sealed_slice_is_described_as_the_plain_one(tmp_path: Path) -> None:
    plain, sealed = (
        opened(FileRecords, tmp_path / "one", "files"),
        opened(FileRecords, tmp_path / "two", "sealed"),
    )
    file = plain.write(0, 0, "root", several(1, 2))
    assert sealed.write(0, 0, "root", several(1, 2)) == file
    sealed.erase([file.name])
    assert sealed.keyring.held("records") == frozenset()


def test_a_sealed_slice_without_its_key_is_refused(tmp_path: Path) -> None:
    store = opened(FileRecords, tmp_path, "sealed")
    file = store.write(0, 0, "root", several(1))
    copy = bytes_of(store, file.name)
    store.erase([file.name])
    store.blobs.put(file.name, copy)
    for look in (store.read, store.check):
        with pytest.raises(IntegrityError, match="key is missing from the keyring"):
            look(file)


@pytest.mark.parametrize("form", ["files", "sealed"])
def test_only_the_owner_may_read_text(form: str, tmp_path: Path) -> None:
    store = opened(FileRecords, tmp_path, form)
    file = store.write(0, 0, "root", several(1))
    assert stat.S_IMODE(Path(store.blobs.location(file.name)).stat().st_mode) == 0o600


def test_a_files_name_reveals_nothing_of_its_records(folder: FileRecords) -> None:
    record = Record("sam@example.org", "Sam Doe", "text", (Part("text", SECRET_TEXT),))
    file = folder.write(0, 0, "0" * 64, [StoredRecord("a" * 64, record)])
    assert file.name == f"shard-00000-slice-00000-{'0' * 64}.parquet"
    assert SECRET_TEXT not in repr(file)
