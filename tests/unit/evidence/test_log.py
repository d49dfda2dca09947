"""Test the transparency log: crashes, growth, what it refuses to sign, cosigners, readers elsewhere."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, Response
from fastapi.staticfiles import StaticFiles
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.digest import sha256_hex
from sisa.core.errors import Busy, EnvironmentFault, IntegrityError, InvalidInput
from sisa.evidence.log import published
from sisa.evidence.log.cosigning import cosign, new_cosigner_key, parse_cosigner_key
from sisa.evidence.log.log import Entry, checkpoint_text, parse_entry
from sisa.evidence.log.published import check_log, log_reader
from sisa.evidence.log.tiles import NO_ENTRIES, Tiles, check_tiles, encode_bundle, signature_line
from sisa.store.blobs import files
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier import merkle, note
from sisa.verifier.envelope import Refused
from sisa.verifier.note import WIDTH, Checkpoint, open_checkpoint, read_log, tile_path
from tests.crash import Fuse
from tests.models.mutants import mutants
from tests.models.programs.local_server import served
from tests.models.written_log import TYPE, Keys, Place, entry, fill, some_cosigner_key, statement


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_appended_is_published(place: Place) -> None:
    assert (place.log.size, place.log.published_note(), list(place.log.entries())) == (0, b"", [])
    assert [place.log.append(statement(number), TYPE) for number in range(5)] == [0, 1, 2, 3, 4]
    found, entries = place.outsider()
    assert (found.origin, found.size) == (f"deletion-ready-model/{'0f' * 16}", 5)
    assert entries == [entry(number) for number in range(5)]
    assert json.loads(entries[4]) == {"predicateType": TYPE, "sha256": sha256_hex(statement(4))}
    expected = [Entry(number, TYPE, sha256_hex(statement(number))) for number in (3, 4)]
    assert list(place.log.entries(3)) == expected
    assert place.log.statement(expected[1].sha256) == statement(4)
    assert place.log.append(statement(4), TYPE) == 4  # a repetition
    assert place.log.append(statement(3), TYPE) == 5  # not of the last one
    for index in range(6):
        text = place.log.proof(index)
        assert note.verify_proof(text, place.outsider()[1][index], place.vkey) == (
            index,
            place.log.checkpoint,
        )
    with pytest.raises(InvalidInput, match="no such entry"):
        place.log.proof(6)
    names = sorted(
        path.relative_to(place.at).as_posix() for path in place.at.rglob("*") if path.is_file()
    )
    assert [each for each in names if not each.startswith("statements/")] == [
        "checkpoint",
        *(f"tile/0/000.p/{width}" for width in range(1, 7)),
        *(f"tile/entries/000.p/{width}" for width in range(1, 7)),
    ]


@pytest.mark.parametrize("size", [254, 511])
def test_a_full_tile_stays_and_its_partial_ones_go(place: Place, size: int) -> None:
    fill(place, size)
    kept: dict[Path, bytes] = {}
    for number in range(size, size + 4):
        place.append(number)
        for path in place.at.rglob("*"):
            if path.is_file() and ".p" not in path.parent.name and "tile" in path.parts:
                assert kept.setdefault(path, path.read_bytes()) == path.read_bytes()
        found, entries = place.outsider()
        assert entries == [entry(each) for each in range(number + 1)]
        for index in (0, number // 2, number):
            note.verify_proof(place.log.proof(index), entries[index], place.vkey)
    assert (place.at / "tile/1/000.p/1").exists()
    assert not list(place.at.glob(f"tile/[0e]*/{size // 256:03}.p"))  # of hashes and of entries
    assert len(kept) == 2 * (found.size // 256)


EFFECTS = [(files, "write_atomic"), (files, "erase_all")]  # of blobs, and beside the keys
FUSES = st.builds(Fuse, st.integers(1, 8), st.booleans())


@given(start=st.sampled_from([0, 1, 254, 255, 256]), crashes=st.lists(FUSES, max_size=4))
@settings(max_examples=25)
def test_a_crash_anywhere_is_made_good_by_the_next_append(
    tmp_path_factory: pytest.TempPathFactory, start: int, crashes: list[Fuse]
) -> None:
    """Whatever an outsider reads fits at every time, and continues everything that was read before."""
    place = Place(tmp_path_factory.mktemp("log"))
    fill(place, start) if start else None
    seen = [place.outsider()[0]] if start else []

    def look() -> list[bytes]:
        if not (place.at / "checkpoint").exists():
            return []
        found, entries = place.outsider()
        for each in seen:
            assert merkle.root([merkle.leaf_hash(one) for one in entries[: each.size]]) == each.root
        seen.append(found)
        return entries

    logged = [entry(number) for number in range(start)]
    for number, fuse in enumerate([*crashes, Fuse(1000)], start=start):
        with fuse.on(*EFFECTS):
            place.append(number)
        if fuse.blown and number % 2:  # the caller tries again; else it does not know about the entry
            place.append(number)
        elif fuse.blown:
            place.log.recover()
        logged += [entry(number)] if look()[-1:] == [entry(number)] else []
        assert look() == logged
    assert logged[-1] == entry(start + len(crashes))
    assert len(logged) >= start + 1 + len([each for each in range(len(crashes)) if (start + each) % 2])


def test_an_append_reads_and_writes_a_few_blobs_at_a_million_entries(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles of the right edge, and nothing else: a few for each of the log256(N) levels."""
    counts = {}
    for size in (64, 1_000_000, 256**2 - 1, 256**3 - 1):
        shutil.rmtree(place.root, ignore_errors=True)
        edge(place, size)
        read, written = [], []
        get, put = LocalBlobs.get, LocalBlobs.put

        def getting(self: LocalBlobs, name: str, *rest: Any) -> bytes:
            read.append(name)  # noqa: B023
            return get(self, name, *rest)  # noqa: B023

        def putting(self: LocalBlobs, name: str, data: bytes) -> None:
            written.append(name)  # noqa: B023
            put(self, name, data)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(LocalBlobs, "get", getting)
            patched.setattr(LocalBlobs, "put", putting)
            assert place.log.append(statement(size), TYPE) == size
        counts[size] = len(read), len(written)
        text = place.log.proof(size)
        assert note.verify_proof(text, entry(size), place.vkey)[1].size == size + 1
    assert counts == {
        64: (4, 4),
        1_000_000: (8, 4),
        256**2 - 1: (6, 6),
        256**3 - 1: (8, 7),
    }


def edge(place: Place, size: int) -> None:
    """Sign a log of which only the right edge is there; what the full tiles hash to is made up."""
    rnd, blobs = random.Random(size), LocalBlobs(place.at)
    first = size - size % WIDTH
    entries = [entry(number) for number in range(first, size)]
    blobs.put(tile_path("entries", size // WIDTH, len(entries)), encode_bundle(entries))
    level, nodes = 0, [merkle.leaf_hash(each) for each in entries]
    while nodes:
        blobs.put(tile_path(level, (size >> 8 * level) // WIDTH, len(nodes)), b"".join(nodes))
        level += 1
        nodes = [rnd.randbytes(32) for _ in range((size >> 8 * level) % WIDTH)]
    place.log._sign(Checkpoint(place.log.key.name, size, Tiles(place.read, size).hash(0, size)))


# --- what is not signed --------------------------------------------------------------------------


def test_a_log_from_a_backup_signs_nothing_until_it_has_caught_up(place: Place) -> None:
    place.append(*range(3))
    shutil.copytree(place.at, place.root / "backup")
    place.append(*range(3, 5))
    place.at.rename(place.root / "newer")
    (place.root / "backup").rename(place.at)
    before = place.read("checkpoint")
    with pytest.raises(IntegrityError, match="was set back") as caught:
        place.append(9)
    assert (caught.value.got[:9], caught.value.exit_code) == ("3 entries", 4)
    assert "restore the log's newer files" in caught.value.next_step
    assert place.read("checkpoint") == before
    shutil.rmtree(place.at)
    with pytest.raises(IntegrityError, match="was set back"):  # nor does an empty one
        place.append(9)
    (place.root / "newer").rename(place.at)
    assert place.log.append(statement(9), TYPE) == 5


def test_a_forked_log_signs_nothing(place: Place, tmp_path: Path) -> None:
    place.append(0)
    other = Place(tmp_path / "other")
    shutil.copytree(place.at, other.at)
    place.append(1)
    other.append(2, 3)  # by somebody with a copy of the keys, but not of what was signed
    shutil.rmtree(place.at)
    shutil.copytree(other.at, place.at)
    with pytest.raises(IntegrityError, match="is not the one whose checkpoint was signed last"):
        place.append(4)


def test_keys_from_a_backup_take_over_what_follows(place: Place) -> None:
    for number in range(3):
        place.append(number)
        if number == 0:
            shutil.copytree(place.keys.directory, place.root / "keys-backup")
    shutil.rmtree(place.keys.directory)
    (place.root / "keys-backup").rename(place.keys.directory)
    assert place.log.append(statement(3), TYPE) == 3
    shutil.rmtree(place.keys.directory)  # a new machine
    assert place.log.append(statement(4), TYPE) == 4
    assert len(place.outsider()[1]) == 5


@pytest.mark.parametrize("name", ["tile/0/000.p/3", "tile/entries/000.p/3", "checkpoint"])
def test_a_damaged_log_signs_and_proves_nothing(place: Place, name: str) -> None:
    place.append(*range(3))
    path = place.at / name
    data = path.read_bytes()
    for damaged in (data[:-1], bytes([data[0] ^ 1]) + data[1:], data[:40] + b"x" + data[41:]):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError):
            place.append(3)
        if "entries" not in name:  # which no proof reads
            with pytest.raises(IntegrityError):
                place.log.proof(1)
    assert not (place.at / "tile/0/000.p/4").exists()
    path.write_bytes(data)
    assert place.log.append(statement(3), TYPE) == 3


def test_damage_is_named_where_entries_and_statements_are_read(place: Place) -> None:
    place.append(0)
    (path,) = place.at.glob("statements/*")
    path.write_bytes(b"other")
    with pytest.raises(IntegrityError, match="not the one that was recorded"):
        place.log.statement(path.stem)
    with pytest.raises(IntegrityError, match="is missing"):
        place.log.statement("0" * 64)
    for odd in (b"no json", b"[]", b"{}", b'{"predicateType":"t","sha256":"x"}', b"\xff"):
        with pytest.raises(IntegrityError, match="an entry "):
            parse_entry(0, odd)
    with pytest.raises(InvalidInput, match="too long"):
        place.log.append(statement(1), "x" * 0x10000)


# --- what an outsider detects --------------------------------------------------------------------


FORGED = {  # of a log of 0, 1, 2, 3
    "dropped": [0, 2, 3, 4, 5],
    "reordered": [1, 0, 2, 3, 4],
    "rewritten": [0, 1, 2, 9, 4],
    "shortened": [0, 1, 2],
    "forked": [0, 1, 2, 9],
}


@pytest.mark.parametrize("numbers", FORGED.values(), ids=FORGED)
def test_whoever_kept_a_checkpoint_detects_it(place: Place, numbers: list[int]) -> None:
    place.append(*range(4))
    kept = place.read("checkpoint")
    forged = Place(place.root / "forged")
    forged.append(*numbers)
    now, entries = check_log(forged.read, place.vkey)  # sound for who kept none
    assert now.size == len(entries) == len(numbers)
    with pytest.raises(Refused, match="does not continue") as caught:
        check_log(forged.read, place.vkey, seen=[kept])
    assert "4 entries" in caught.value.expected
    place.append(4)
    check_log(place.read, place.vkey, seen=[kept])
    shutil.rmtree(place.at)
    shutil.copytree(forged.at, place.at)
    with pytest.raises(Refused, match="does not continue"):
        place.log.check()  # the operator's own check


def test_a_reader_of_an_older_checkpoint_is_served_by_full_tiles(place: Place) -> None:
    fill(place, 255)
    older = place.read("checkpoint")
    place.append(255, 256)
    assert not (place.at / "tile/0/000.p").exists()
    assert note.read_log(place.read, open_checkpoint(older, place.vkey)) == [
        entry(n) for n in range(255)
    ]
    assert Tiles(place.read, 255).hash(0, 255) == open_checkpoint(older, place.vkey).root
    assert place.log.check(seen=[older]).size == 257


def test_an_empty_log_is_sound(place: Place) -> None:
    assert place.log.check() == NO_ENTRIES
    assert place.log.cosigners() == []


# --- mutations -----------------------------------------------------------------------------------


def another_log(place: Place) -> Place:
    other = Place(place.root / "another")
    other.keys = Keys(other.root / "keys", "1f" * 16, b"m" * 32)
    other.append(*range(3))
    return other


def cosigned_log(place: Place) -> str:
    """Append three entries, have a cosigner sign the checkpoint, and return the cosigner's vkey."""
    place.append(*range(3))
    private, vkey = some_cosigner_key("witness.example/w1")
    _, _, line = cosign(place.read, place.vkey, private, place.root / "state", 1_700_000_000)
    place.log.add_cosignatures(line, [vkey])
    return vkey


def test_every_mutation_of_a_checkpoint_is_refused(place: Place) -> None:
    witness = cosigned_log(place)
    data, other = place.read("checkpoint"), another_log(place).read("checkpoint")
    assert open_checkpoint(data, place.vkey, cosigners=[witness]).size == 3
    head, _, lines = data.partition(b"\n\n")
    other_head, _, other_lines = other.partition(b"\n\n")
    replays = [other, head + b"\n\n" + other_lines, other_head + b"\n\n" + lines]
    num_refused = 0
    for each in mutants(data, 1020, seed=1, replays=replays):
        try:
            open_checkpoint(each, place.vkey, cosigners=[witness])
        except Refused:
            num_refused += 1
        else:  # says the same: signatures in another order, or a stranger's beside them
            assert each.startswith(head + b"\n\n")
            assert set(lines.split(b"\n")) <= set(each.split(b"\n"))
    assert num_refused >= 1000
    with pytest.raises(Refused):  # one signature twice
        open_checkpoint(data + lines.splitlines(keepends=True)[0], place.vkey)


def test_every_mutation_of_a_proof_is_refused(place: Place) -> None:
    fill(place, 300)
    data, other = place.log.proof(259), another_log(place)
    replays = [place.log.proof(index) for index in (0, 258, 260, 299)]
    place.append(300)
    replays += [other.log.proof(index) for index in range(3)]
    head, _, checkpoint = data.partition(b"\n\n")
    replays += [head + b"\n\n" + place.read("checkpoint"), head + b"\n\n" + other.read("checkpoint")]
    assert note.verify_proof(data, entry(259), place.vkey)[0] == 259
    for each in mutants(data, 1000, seed=2, replays=[*replays, checkpoint]):
        with pytest.raises(Refused):
            note.verify_proof(each, entry(259), place.vkey)


def test_every_mutation_of_tiles_and_bundles_is_refused(place: Place) -> None:
    fill(place, 300)
    checkpoint, _ = place.outsider()
    names = ["entries/000", "entries/001.p/44", "0/000", "0/001.p/44", "1/000.p/1"]
    held = {name: place.read(f"tile/{name}") for name in names}
    for number, name in enumerate(names):
        replays = [other for each, other in held.items() if each != name]
        for mutant in mutants(held[name], 200, seed=number, replays=replays):
            changed = {f"tile/{each}": data for each, data in held.items()} | {f"tile/{name}": mutant}
            with pytest.raises(Refused):
                check_tiles(changed.__getitem__, read_log(changed.__getitem__, checkpoint))


# --- cosigners -----------------------------------------------------------------------------------


def test_a_cosigner_signs_what_continues_what_it_saw(place: Place) -> None:
    private, vkey = new_cosigner_key("witness.example/w1")
    state = place.root / "witness" / "state"
    sizes = []
    for number in range(6):
        place.append(number)
        if number % 2 == 0:
            seen, now, line = cosign(place.read, place.vkey, private, state, 1_700_000_000 + number)
            sizes.append((seen.size, now.size))
            assert place.log.add_cosignatures(line, [vkey]).size == now.size
            assert open_checkpoint(place.read("checkpoint"), place.vkey, cosigners=[vkey]) == now
    assert sizes == [(0, 1), (1, 3), (3, 5)]
    again = cosign(place.read, place.vkey, private, state)  # the next one; its own time
    place.log.add_cosignatures(checkpoint_text(again[1]) + b"\n" + again[2], [vkey])  # a note
    proof = place.log.proof(0)
    assert note.open_checkpoint(note.parse_proof(proof)[2], place.vkey, cosigners=[vkey]).size == 6
    place.append(6)
    with pytest.raises(Refused, match="not signed as expected"):  # of the new one, not yet
        open_checkpoint(place.read("checkpoint"), place.vkey, cosigners=[vkey])
    assert oct(state.stat().st_mode)[-3:] == "600"


def test_a_request_is_enough_for_a_cosigner(place: Place) -> None:
    private, vkey = some_cosigner_key("w")
    state, file = place.root / "state", place.root / "request"
    with pytest.raises(InvalidInput, match="no cosigner has seen that"):
        place.log.request(0)  # of a log without a checkpoint
    before = 0
    for size in (1, 2, 5, 255, 256, 300):
        shutil.rmtree(place.at, ignore_errors=True)
        fill(place, size)
        asked = place.log.request(before)
        head, _, checkpoint = asked.partition(b"\n\n")
        assert (head.split(b"\n")[0], checkpoint) == (b"old %d" % before, place.read("checkpoint"))
        for damaged in (asked[:-9], asked.replace(b"old %d" % before, b"old x"), asked[len(head) :]):
            file.write_bytes(damaged)
            with pytest.raises((Refused, InvalidInput)):
                cosign(log_reader(str(file)), place.vkey, private, state)
        file.write_bytes(asked)
        seen, now, line = cosign(log_reader(str(file)), place.vkey, private, state)
        assert (seen.size, now.size) == (before, size)
        open_checkpoint(checkpoint + line, place.vkey, cosigners=[vkey])
        before = size
    for mutant in mutants(place.log.request(5), 100, seed=5):
        file.write_bytes(mutant)
        with pytest.raises((Refused, InvalidInput)):
            cosign(log_reader(str(file)), place.vkey, private, state)


def test_a_cosigner_signs_extension_lines_as_well(place: Place) -> None:
    place.append(0)
    text = checkpoint_text(place.log.checkpoint) + b"an extension\n"
    made = place.log.key.id + Ed25519PrivateKey.from_private_bytes(place.keys.log_seed).sign(text)
    LocalBlobs(place.at).put("checkpoint", text + b"\n" + signature_line(place.log.key.name, made))
    private, vkey = some_cosigner_key("w")
    line = cosign(place.read, place.vkey, private, place.root / "state")[2]
    open_checkpoint(place.read("checkpoint") + line, place.vkey, cosigners=[vkey])


def test_a_cosigner_refuses_a_log_that_was_rewritten(place: Place, tmp_path: Path) -> None:
    private, _ = new_cosigner_key("w")
    state = tmp_path / "state"
    place.append(*range(4))
    cosign(place.read, place.vkey, private, state)
    kept = state.read_bytes()
    for name, numbers in FORGED.items():
        forged = Place(tmp_path / name)
        forged.append(*numbers)
        with pytest.raises(Refused, match="does not continue the checkpoint") as caught:
            cosign(forged.read, place.vkey, private, state)
        assert caught.value.expected.startswith("4 entries")
    other = another_log(place)
    with pytest.raises(Refused, match="not signed as expected"):
        cosign(other.read, place.vkey, private, state)
    with pytest.raises(Refused, match="not signed as expected"):
        cosign(other.read, other.vkey, private, state)  # a state of this log, not of that one
    assert state.read_bytes() == kept


def test_a_cosigner_believes_no_tile(place: Place) -> None:
    """A log whose inner tiles contradict its outer ones can't hide what it rewrote."""
    private, _ = new_cosigner_key("w")
    state = place.root / "state"
    fill(place, 300)
    cosign(place.read, place.vkey, private, state)
    forged = Place(place.root / "forged")
    fill(forged, 600)
    blobs, entries = LocalBlobs(forged.at), [entry(number) for number in range(600)]
    entries[290] = entry(999)
    hashes = [merkle.leaf_hash(each) for each in entries]
    tops = merkle.root(hashes[:256]) + merkle.root(hashes[256:512])  # of the forged leaves
    blobs.put("tile/1/000.p/2", tops)
    forged.log._sign(Checkpoint(forged.log.key.name, 600, merkle.root(hashes)))
    with pytest.raises(Refused):
        cosign(forged.read, place.vkey, private, state)


def test_a_cosignature_of_something_else_is_not_added(place: Place) -> None:
    vkey = cosigned_log(place)
    cosigned = place.read("checkpoint")
    private, stranger = new_cosigner_key("stranger")
    line = cosign(place.read, place.vkey, private, place.root / "another-state")[2]
    place.append(3)
    before = place.read("checkpoint")
    for given_, keys in (
        (cosigned, [vkey]),  # of the former checkpoint
        (line, [stranger]),  # the same, as a line
        (line, [vkey]),  # of another cosigner
        (b"", [vkey]),
        (b"\xff", [vkey]),
        (b"no line\n", [vkey]),
        (line, [str(place.log.key)[:-1] + "A"]),
        (line, ["no key"]),
    ):
        with pytest.raises(Refused):
            place.log.add_cosignatures(given_, keys)
        assert place.read("checkpoint") == before


@pytest.mark.parametrize(
    "text",
    ["", "x", "PRIVATE+KEY+w+00000000+" + "A" * 44, "PRIVATE+KEY+w+00000000+AQ" + "A" * 42, "\x00"],
)
def test_a_broken_key_of_a_cosigner_is_refused(place: Place, text: str) -> None:
    with pytest.raises(InvalidInput, match="the cosigner's key can't be read"):
        cosign(place.read, place.vkey, text, place.root / "state")


def test_a_cosigner_key_is_that_of_go() -> None:
    """The signer's key of the test of golang.org/x/mod, `sumdb/note/note_test.go`."""
    skey = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
    key, _ = parse_cosigner_key(skey)
    assert str(note.NoteKey(key.name, note.ED25519_TYPE, key.public)) == (
        "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    )
    private, vkey = new_cosigner_key("w")
    assert str(parse_cosigner_key(private)[0]) == vkey
    for odd in ("", "a b", "a+b", "a\nb"):
        with pytest.raises(Refused):
            new_cosigner_key(odd)


def test_two_runs_of_a_cosigner_do_not_cross(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.append(0)
    private, _ = new_cosigner_key("w")
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0)
    with files.opened_directory(place.root) as handle:
        files.take_lock(handle, place.root, "tests")
        with pytest.raises(Busy):
            cosign(place.read, place.vkey, private, place.root / "state")


# --- readers elsewhere ---------------------------------------------------------------------------


def file_server(directory: Path) -> FastAPI:
    """Serve a directory, with two odd paths."""
    app = FastAPI()
    app.get("/broken/checkpoint", status_code=503)(lambda: None)
    cut = Response("x", headers={"Content-Length": "1000"})
    app.get("/cut/checkpoint")(lambda: cut)
    app.mount("/", StaticFiles(directory=directory))
    return app


def test_a_log_is_read_from_any_file_server(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(place, 300)
    with served(file_server(place.at)) as url:
        for where in (url, f"{url}/"):
            read = log_reader(where)
            found = open_checkpoint(read("checkpoint"), place.vkey)
            assert read_log(read, found) == [entry(number) for number in range(300)]
        for where, error in ((f"{url}/absent", IntegrityError), (f"{url}/broken", EnvironmentFault)):
            with pytest.raises(error):
                log_reader(where)("checkpoint")
        with pytest.raises(EnvironmentFault):
            log_reader(f"{url}/cut")("checkpoint")
        monkeypatch.setattr(published, "MAX_FILE_BYTES", 10)
        for where in (url, str(place.at)):
            with pytest.raises(IntegrityError, match="is too large"):
                log_reader(where)("checkpoint")
    with pytest.raises(EnvironmentFault, match="can't be reached"):
        log_reader(url)("checkpoint")
    with pytest.raises(InvalidInput, match="no such directory"):
        log_reader(str(place.root / "absent"))("checkpoint")
    with pytest.raises(IntegrityError, match="is missing"):
        log_reader(str(place.root))("checkpoint")
    for where in ("ftp://host/log", "file:///etc"):
        with pytest.raises(InvalidInput):
            log_reader(where)
