"""Test the contract of Keyring over a directory of keys.

A sealed file opens with its key only, as that part of that file only. After the key is destroyed,
nothing opens it, whatever happens later under the same name.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core.digest import KEY_BYTES
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.ports import Keyring
from sisa.store.blobs import files
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.keyring import MAGIC, FileKeyring, is_sealed
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.store.blobs.sealed_area import reseal_blobs

OpenKeyring = Callable[[], Keyring]
SECRET = b"the only copy of this text"
PLACE = ("records", "a.parquet", "")
rooms = st.sampled_from(["records", "index", "checkpoints", "scratch"])
names = st.sampled_from(["a.parquet", "b.parquet", "0" * 64])
parts = st.sampled_from(["", "manifest.json", "adapter_model.safetensors"])
places = st.tuples(rooms, names, parts)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> OpenKeyring:
    """Return a function that opens another empty keyring at each call."""
    return lambda: FileKeyring(tmp_path_factory.mktemp("state") / "keyring")


@pytest.fixture
def folder(tmp_path: Path) -> FileKeyring:
    return FileKeyring(tmp_path / "deep" / "keyring")


@given(places, st.binary(max_size=200))
def test_what_is_sealed_is_unsealed(
    fresh: OpenKeyring, place: tuple[str, str, str], data: bytes
) -> None:
    keyring = fresh()
    sealed = keyring.seal(*place, data)
    assert is_sealed(sealed)
    assert keyring.unseal(*place, sealed) == data
    assert keyring.held(place[0]) == {place[1]}
    assert len(data) < 8 or data not in sealed[len(MAGIC) :]


def test_a_lent_keyring_seals_until_its_key_is_destroyed(folder: FileKeyring) -> None:
    """A worker whose driver was killed makes no new key."""
    lent = folder.lend("records", [PLACE[1]])
    sealed = lent.seal(*PLACE, SECRET)
    assert folder.unseal(*PLACE, sealed) == lent.unseal(*PLACE, sealed) == SECRET
    folder.destroy("records", [PLACE[1]])
    for name in (PLACE[1], "b.parquet"):
        with pytest.raises(EnvironmentFault, match="its run is over"):
            lent.seal("records", name, "", SECRET)
    assert folder.held("records") == frozenset()
    assert FileKeyring(folder.root, seals=False).lend("records", ["a"]).seal(*PLACE, SECRET) == SECRET


@given(places, st.binary(max_size=60), st.data())
def test_any_flipped_bit_is_refused(
    fresh: OpenKeyring, place: tuple[str, str, str], data: bytes, draw: st.DataObject
) -> None:
    """The keyring refuses it or, if the bit is in the magic, the digest of the plaintext does."""
    keyring = fresh()
    sealed = bytearray(keyring.seal(*place, data))
    at = draw.draw(st.integers(0, 8 * len(sealed) - 1))
    sealed[at // 8] ^= 1 << at % 8
    if at // 8 >= len(MAGIC):
        with pytest.raises(IntegrityError):
            keyring.unseal(*place, bytes(sealed))
    else:
        assert keyring.unseal(*place, bytes(sealed)) == sealed != data


@given(places, st.binary(max_size=60), st.data())
def test_any_cut_is_refused(
    fresh: OpenKeyring, place: tuple[str, str, str], data: bytes, draw: st.DataObject
) -> None:
    keyring = fresh()
    sealed = keyring.seal(*place, data)
    cut = sealed[: draw.draw(st.integers(len(MAGIC), len(sealed) - 1))]
    with pytest.raises(IntegrityError):
        keyring.unseal(*place, cut)


@given(places, places)
def test_no_sealed_file_passes_for_another(
    fresh: OpenKeyring, one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    keyring = fresh()
    sealed = keyring.seal(*one, SECRET)
    keyring.seal(*other, b"there is a key for the other one, too")
    if one == other:
        assert keyring.unseal(*other, sealed) == SECRET
    else:
        with pytest.raises(IntegrityError):
            keyring.unseal(*other, sealed)


def test_equal_plaintexts_have_different_ciphertexts(fresh: OpenKeyring) -> None:
    keyring = fresh()
    assert keyring.seal(*PLACE, SECRET) != keyring.seal(*PLACE, SECRET)


def test_parts_of_a_name_share_its_key(fresh: OpenKeyring) -> None:
    keyring = fresh()
    sealed = {part: keyring.seal("checkpoints", "key", part, part.encode()) for part in ("a", "b")}
    assert keyring.held("checkpoints") == {"key"}
    assert all(keyring.unseal("checkpoints", "key", p, s) == p.encode() for p, s in sealed.items())


def test_a_destroyed_key_is_gone_for_good(fresh: OpenKeyring) -> None:
    """This holds even for the old bytes, restored after the name has got another key."""
    keyring = fresh()
    old = keyring.seal(*PLACE, SECRET)
    other = keyring.seal("records", "b.parquet", "", b"other")
    keyring.destroy("records", ["a.parquet", "never held"])
    assert keyring.held("records") == {"b.parquet"}
    with pytest.raises(IntegrityError, match="missing from the keyring"):
        keyring.unseal(*PLACE, old)
    again = keyring.seal(*PLACE, SECRET)
    with pytest.raises(IntegrityError, match="not the one that was recorded"):
        keyring.unseal(*PLACE, old)
    assert keyring.unseal(*PLACE, again) == SECRET
    assert keyring.unseal("records", "b.parquet", "", other) == b"other"
    keyring.destroy("index", ["a.parquet"])
    assert keyring.unseal(*PLACE, again) == SECRET


def test_plain_bytes_pass_as_they_are(fresh: OpenKeyring) -> None:
    keyring = fresh()
    assert keyring.unseal(*PLACE, b"PAR1") == b"PAR1"
    assert keyring.held("records") == frozenset()


def test_a_keyring_that_no_longer_seals_opens_what_is_sealed(folder: FileKeyring) -> None:
    sealed = folder.seal(*PLACE, SECRET)
    off = FileKeyring(folder.root, seals=False)
    assert off.seal(*PLACE, SECRET) == SECRET
    assert off.unseal(*PLACE, sealed) == SECRET


# --- keys on a disk ------------------------------------------------------------------------------


def test_keys_are_for_their_owner_alone(folder: FileKeyring) -> None:
    folder.seal(*PLACE, SECRET)
    key = folder.root / "records" / "a.parquet"
    assert key.stat().st_size == KEY_BYTES
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    for each in (key.parent, folder.root, folder.root.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700


def test_errors_name_the_key_and_never_show_it(folder: FileKeyring) -> None:
    sealed = folder.seal(*PLACE, SECRET)
    key = (folder.root / "records" / "a.parquet").read_bytes()
    messages = []
    for spoilt in (key[:-1], bytes(KEY_BYTES)):
        (folder.root / "records" / "a.parquet").write_bytes(spoilt)
        with pytest.raises(IntegrityError, match="damaged") as caught:
            folder.unseal(*PLACE, sealed)
        messages.append(str(caught.value))
    (folder.root / "records" / "a.parquet").unlink()
    with pytest.raises(IntegrityError, match="missing") as caught:
        folder.unseal(*PLACE, sealed)
    assert str(folder.root) in str(caught.value)
    assert not any(key.hex() in each or repr(key) in each for each in [*messages, str(caught.value)])


def test_a_refusing_disk_is_an_environment_fault(folder: FileKeyring) -> None:
    folder.root.parent.mkdir(parents=True)
    folder.root.write_text("a file where the keyring should be")
    for use in (
        lambda: folder.seal(*PLACE, SECRET),
        lambda: folder.held("records"),
        lambda: folder.destroy("records", ["a.parquet"]),
    ):
        with pytest.raises(EnvironmentFault):
            use()


def test_two_that_seal_at_once_agree_on_one_key(
    folder: FileKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker makes the key after this one has found none."""
    other = FileKeyring(folder.root)
    sealed = []

    def link(source: str, target: Path) -> None:
        monkeypatch.undo()
        sealed.append(other.seal(*PLACE, b"theirs"))
        os.link(source, target)

    monkeypatch.setattr(os, "link", link)
    sealed.append(folder.seal(*PLACE, b"ours"))
    assert [folder.unseal(*PLACE, each) for each in sealed] == [b"theirs", b"ours"]
    assert folder.held("records") == {"a.parquet"}


def test_a_second_name_of_a_key_is_overwritten_with_it(folder: FileKeyring) -> None:
    """A process that dies between linking a key and unlinking its temporary name leaves two names."""
    folder.seal(*PLACE, SECRET)
    left = folder.root / "records" / f"{TEMPORARY_PREFIX}left"
    os.link(folder.root / "records" / "a.parquet", left)
    folder.destroy("records", ["a.parquet"])
    assert left.read_bytes() == bytes(KEY_BYTES)
    folder.destroy("records", folder.held("records"))
    assert folder.held("records") == frozenset()


def test_a_second_name_of_a_key_in_use_goes_and_the_key_stays(folder: FileKeyring) -> None:
    sealed = folder.seal(*PLACE, SECRET)
    left = folder.root / "records" / f"{TEMPORARY_PREFIX}left"
    os.link(folder.root / "records" / "a.parquet", left)
    folder.destroy("records", [left.name])
    assert folder.held("records") == {"a.parquet"}
    assert folder.unseal(*PLACE, sealed) == SECRET
    os.link(folder.root / "records" / "a.parquet", left)
    other = left.with_name(f"{TEMPORARY_PREFIX}other")
    (folder.root / "records" / "a.parquet").rename(other)  # cut short while it was destroyed
    looking = left.open("rb")
    folder.destroy("records", folder.held("records"))
    with looking:
        assert looking.read() == bytes(KEY_BYTES)


def test_whatever_lies_in_the_keyring_can_be_destroyed(folder: FileKeyring, tmp_path: Path) -> None:
    folder.seal(*PLACE, SECRET)
    (tmp_path / "mine").write_text("not a key")
    (folder.root / "records" / "link").symlink_to(tmp_path / "mine")
    (folder.root / "records" / "room").mkdir()
    folder.destroy("records", folder.held("records"))
    assert folder.held("records") == frozenset()
    assert (tmp_path / "mine").read_text() == "not a key"


# --- killed at every step ------------------------------------------------------------------------

STEPS = ("rename", "link", "unlink", "fsync", "write", "mkdir", "open")
KILLED = 9


def killed_at(task: Callable[[], object], calls: Sequence[str] = STEPS) -> Iterator[int]:
    """Run a task repeatedly in its own process, each time killed one system call later.

    Yield after each kill; stop when the task ends by itself.
    """
    for step in range(1, 100):
        with warnings.catch_warnings():  # newer Pythons warn about threads, which the child does not use
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                die_at(step, calls)
                task()
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED)
        if code == 0:
            assert step > 2, "nothing was cut short"
            return
        yield step


def die_at(step: int, calls: Sequence[str]) -> None:
    """Die at one of these system calls, without any cleaning up."""
    left = step

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(KILLED)
            return real(*args, **options)

        return call

    for name in calls:
        setattr(os, name, dying(getattr(os, name)))


def test_a_key_is_whole_or_absent_when_its_maker_is_killed(tmp_path: Path) -> None:
    keyring = FileKeyring(tmp_path / "keyring")
    for step in killed_at(lambda: keyring.seal("records", "a.parquet", "", b"new")):
        sealed = keyring.seal(*PLACE, SECRET)
        keyring.destroy("records", keyring.held("records") - {"a.parquet"})
        assert keyring.unseal(*PLACE, sealed) == SECRET, step
        keyring.destroy("records", keyring.held("records"))
        assert keyring.held("records") == frozenset()


def test_a_half_destroyed_key_is_never_met_again(tmp_path: Path) -> None:
    """Its name has the key or none, a later file of the name gets another, and a sweep removes it."""
    root = tmp_path / "keyring"
    keyring = FileKeyring(root)
    old = {name: keyring.seal("records", name, "", SECRET) for name in ("a.parquet", "b.parquet")}
    for step in killed_at(lambda: keyring.destroy("records", ["a.parquet", "b.parquet"])):
        names = keyring.held("records")
        for name, sealed in old.items():
            if name in names:
                assert keyring.unseal("records", name, "", sealed) == SECRET, step
                continue
            again = keyring.seal("records", name, "", b"new")
            assert keyring.unseal("records", name, "", again) == b"new"
            with pytest.raises(IntegrityError, match="not the one that was recorded"):
                keyring.unseal("records", name, "", sealed)
        left = keyring.held("records") - old.keys()
        keyring.destroy("records", left)
        assert keyring.held("records") == old.keys()
        old = {name: keyring.seal("records", name, "", SECRET) for name in old}
    assert keyring.held("records") == frozenset()


def test_a_key_is_overwritten_before_it_is_unlinked(
    folder: FileKeyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.seal(*PLACE, SECRET)
    seen: list[Any] = []

    def erase(path: Path) -> None:
        seen.append((path.name.startswith(TEMPORARY_PREFIX), path.read_bytes()))
        path.unlink()

    monkeypatch.setattr(files, "erase", erase)
    folder.destroy("records", ["a.parquet"])
    assert seen == [(True, bytes(KEY_BYTES))]


# --- the other form ------------------------------------------------------------------------------


def files_of(root: Path) -> dict[str, bytes]:
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("room", ["records", "checkpoints"])
def test_files_change_their_form_and_not_their_content(
    folder: FileKeyring, tmp_path: Path, room: str
) -> None:
    root = tmp_path / room
    names = {"records": ["a"], "checkpoints": ["a/one", "a/two"]}[room]
    for each in names:
        (root / each).parent.mkdir(parents=True, exist_ok=True)
        (root / each).write_bytes(each.encode())
        (root / each).chmod(0o640)
    (root / "unknown").write_bytes(b"stays")
    plain = files_of(root)
    reseal_blobs(LocalBlobs(root), room, ["a"], folder)
    sealed = files_of(root)
    assert {name for name, data in sealed.items() if is_sealed(data)} == set(names)
    for each in names:
        unseal = partial(folder.unseal, room, "a", each.partition("/")[2])
        assert unseal((root / each).read_bytes()) == plain[each]
        assert stat.S_IMODE((root / each).stat().st_mode) == 0o600
    reseal_blobs(LocalBlobs(root), room, ["a"], folder)
    assert files_of(root) == sealed  # what has the form already is left alone
    reseal_blobs(LocalBlobs(root), room, ["a"], FileKeyring(folder.root, seals=False))
    assert files_of(root) == plain
    assert folder.held(room) == frozenset()


def test_a_cut_short_change_leaves_files_of_both_forms_and_no_foreign_file(
    folder: FileKeyring, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoints"
    (root / "a").mkdir(parents=True)
    for part in ("one", "two"):
        (root / "a" / part).write_bytes(part.encode())
    place = LocalBlobs(root)
    for _ in killed_at(lambda: reseal_blobs(place, "checkpoints", ["a"], folder), ("replace",)):
        assert {path.name for path in (root / "a").iterdir()} == {"one", "two"}
        for part in ("one", "two"):
            data = (root / "a" / part).read_bytes()
            assert folder.unseal("checkpoints", "a", part, data) == part.encode()
    assert all(is_sealed(path.read_bytes()) for path in (root / "a").iterdir())
    with pytest.raises(IntegrityError, match="missing"):
        reseal_blobs(LocalBlobs(root), "checkpoints", ["gone"], folder)
