"""Test the contract of Vault over the fake and sealed files.

Records return unchanged, in order. An erased set can't be read, wherever a copy of the file is. Bytes
that differ from the record are refused.
"""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import sha256_hex
from sisa.core.domain import Part, Record
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.patches import VaultSet
from sisa.core.ports import Vault
from sisa.store.blobs.keyring import FileKeyring, is_sealed
from sisa.store.vault import FileVault
from tests.contract.storage.forms import SECRET_TEXT, opened, records
from tests.fakes.patches import FakeVault, encode
from tests.fakes.ports import fake_record

NAME, OTHER = "a" * 64, "b" * 64
RECORDS = [fake_record(number, "ada") for number in (3, 1, 2)]


def put(vault: Vault, found: list[Record], name: str = NAME) -> VaultSet:
    return VaultSet(name, "forget", len(found), "asked", "2026", *vault.put(name, found))


@pytest.fixture(params=["fake", "files"])
def vault(request: pytest.FixtureRequest, tmp_path: Path) -> Vault:
    return FakeVault() if request.param == "fake" else opened(FileVault, tmp_path, "sealed")


@pytest.fixture
def folder(tmp_path: Path) -> FileVault:
    return opened(FileVault, tmp_path, "sealed")


def place(vault: FileVault) -> Path:
    return Path(vault.blobs.location())


def test_what_is_put_is_read_in_its_order(vault: Vault) -> None:
    assert vault.held() == frozenset()
    found = put(vault, RECORDS)
    assert vault.read(found) == tuple(RECORDS)
    vault.check(found)
    assert vault.held() == {NAME}
    assert found.num_bytes == len(encode(RECORDS))


@given(st.lists(records, max_size=5))
def test_any_records_survive(tmp_path_factory: pytest.TempPathFactory, found: list[Record]) -> None:
    real, fake = opened(FileVault, tmp_path_factory.mktemp("vault"), "sealed"), FakeVault()
    assert put(real, found) == put(fake, found)
    assert real.read(put(real, found)) == fake.read(put(fake, found)) == tuple(found)


def test_putting_twice_is_putting_once(vault: Vault) -> None:
    assert put(vault, RECORDS) == put(vault, RECORDS)
    assert vault.held() == {NAME}


def test_erased_is_gone_and_absence_is_no_error(vault: Vault) -> None:
    found, other = put(vault, RECORDS), put(vault, RECORDS[:1], OTHER)
    vault.erase([NAME, "never held"])
    vault.erase([NAME])
    assert vault.held() == {OTHER}
    for look in (vault.read, vault.check):
        with pytest.raises(IntegrityError):
            look(found)
    assert vault.read(other) == tuple(RECORDS[:1])


def test_another_sets_records_are_refused(vault: Vault) -> None:
    found = put(vault, RECORDS)
    put(vault, RECORDS[:1])
    for look in (vault.read, vault.check):
        with pytest.raises(IntegrityError, match="not the one that was recorded"):
            look(found)


def test_a_copy_of_an_erased_set_stays_shut(folder: FileVault) -> None:
    found = put(folder, RECORDS)
    copy = (place(folder) / NAME).read_bytes()
    folder.erase([NAME])
    assert folder.keyring.held("vault") == frozenset()
    (place(folder) / NAME).write_bytes(copy)
    put(folder, RECORDS, OTHER)
    with pytest.raises(IntegrityError, match="key is missing"):
        folder.read(found)
    assert folder.held() == {NAME, OTHER}
    put(folder, RECORDS)  # a new key under the old name opens no old copy
    (place(folder) / NAME).write_bytes(copy)
    with pytest.raises(IntegrityError):
        folder.read(found)


def test_a_key_without_its_file_is_held_and_can_be_erased(folder: FileVault) -> None:
    put(folder, RECORDS)
    (place(folder) / NAME).unlink()
    assert folder.held() == {NAME}
    folder.erase([NAME])
    assert folder.held() == frozenset()


def test_text_is_sealed_and_for_its_owner_alone(folder: FileVault) -> None:
    record = Record("sam@example.org", "Sam Doe", "text", (Part("text", SECRET_TEXT),))
    found = put(folder, [record])
    path = place(folder) / found.name
    data = path.read_bytes()
    assert is_sealed(data)
    assert not any(each.encode() in data for each in (record.id, "Sam Doe", SECRET_TEXT))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SECRET_TEXT not in repr(found)


def test_plain_bytes_are_refused_however_right(folder: FileVault) -> None:
    found = put(folder, RECORDS)
    (place(folder) / NAME).write_bytes(encode(RECORDS))
    for look in (folder.read, folder.check):
        with pytest.raises(IntegrityError, match="not encrypted"):
            look(found)


@pytest.mark.parametrize("data", [b"", b"{", b"[[1]]", b"7", b'[["id", null, "text", "parts"]]'])
def test_a_set_of_another_form_is_refused(folder: FileVault, data: bytes) -> None:
    """This holds even for a set whose digest the ledger names."""
    found = VaultSet(NAME, "forget", 1, "asked", "2026", sha256_hex(data), len(data))
    place(folder).mkdir()
    (place(folder) / NAME).write_bytes(folder.keyring.seal("vault", NAME, "", data))
    with pytest.raises(IntegrityError, match="can't be parsed"):
        folder.read(found)


def test_a_cut_short_put_leaves_no_set(folder: FileVault, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(EnvironmentFault, match="No space left"):
        put(folder, RECORDS)
    assert not (place(folder) / NAME).exists()


def test_a_vault_without_keys_is_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        FileVault(tmp_path, FileKeyring(tmp_path, seals=False))
