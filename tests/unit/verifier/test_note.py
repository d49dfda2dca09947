"""Test notes, checkpoints, cosignatures and proofs against what others have published.

Sources: golang.org/x/mod `sumdb/note/note_test.go` (PeterNeumann, EnochRoot) and
`sumdb/tlog/tlog_test.go` (paths of tiles); C2SP `signed-note.md` (example.com/foo);
transparency-dev/formats `note/note_cosigv1_test.go` (keys) and `proof/tlog_proof_test.go` (malformed
proofs). `arche2025h1.note` is a checkpoint that this log of certificates published in 2026, with the
cosignatures of four public witnesses.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sisa.evidence.log.log import checkpoint_text, proof_text
from sisa.evidence.open_evidence import inclusion_path
from sisa.verifier import merkle, note
from sisa.verifier.envelope import Refused, base64_bytes
from sisa.verifier.note import COSIGNATURE_TYPE, ED25519_TYPE, Checkpoint, NoteKey

PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
TEXT = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n"
)
PETERS = (
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6Ry"
    "yBwJnAM=\n"
)
ENOCHS = (
    "— EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1Rv"
    "Mc+QQ=\n"
)
FOO = "example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k"
FOOS = (
    "— example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1"
    "Yu72IneyaQM=\n"
)
LOG = "arche2025h1.staging.ct.transparency.dev+ba2f06c0+AU0vHmlGCS/PdN8b2OaGmKprLI8HKM+dJ472xgFYh15f"
WITNESSES = [
    "remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2",
    "witness.stagemole.eu+67f7aea0+BEqSG3yu9YrmcM3BHvQYTxwFj3uSWakQepafafpUqklv",
    "witness1.smartit.nu/witness1+a48c820f+BPSFWg9G6KPiO7QPryYO5Xq4oYJJ+kAvLKLSimDhoxMO",
    "transparency.dev/DEV:witness-little-garden+d8042a87+BCtusOxINQNUTN5Oj8HObRkh2yHf/MwYaGX4CPdiVEPM",
]
CHECKPOINT = (Path(__file__).parent / "arche2025h1.note").read_text(encoding="utf-8")


@pytest.mark.parametrize("vkey", [PETER, ENOCH, FOO, LOG, *WITNESSES])
def test_keys_of_others_can_be_read(vkey: str) -> None:
    assert str(note.parse_vkey(vkey)) == vkey


def test_mangled_keys_are_refused() -> None:
    parts = [PETER[start:end] for start in range(len(PETER)) for end in range(start, len(PETER) + 1)]
    changed = [PETER[:at] + chr(ord(each) + 1) + PETER[at + 1 :] for at, each in enumerate(PETER)]
    others = [
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",  # its id, too long
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # its id, an unknown type
        *("bananas.sigstore.dev+12344556", "rekor.sigstore.dev+12345678+THIS_IS_NOT_BASE64!"),
        *("rekor.sigstore.dev+12345678+AwEB", "", "+", "++", PETER.upper(), f" {PETER}", f"{PETER}\n"),
    ]
    for each in {*parts, *changed, *others} - {PETER}:
        with pytest.raises(Refused):
            note.parse_vkey(each)


def test_a_note_that_go_signed_is_opened() -> None:
    both = f"{TEXT}\n{PETERS}{ENOCHS}".encode()
    for vkeys in ([PETER], [ENOCH], [PETER, ENOCH]):
        assert note.open_note(both, vkeys) == TEXT.encode()
    assert note.open_note(f"This is an example message.\n\n{FOOS}".encode(), [FOO])
    cut = PETERS[:60] + "ABCD" + PETERS[60:]
    for text in (TEXT, f"{TEXT}\n", f"{TEXT}\n{PETERS[:-1]}", f"\x01{TEXT}\n{PETERS}", f"{TEXT}\n{cut}"):
        with pytest.raises(Refused):
            note.open_note(text.encode(), [PETER])
    for text in (
        f"{TEXT}\n— Bad Name {PETERS.split()[2]}\n",
        f"{TEXT}\n{PETERS}Unexpected line.\n",
        f"{TEXT}\n{ENOCHS}",
        f"{TEXT}\n{PETERS}{PETERS}",
        f"{TEXT.replace('answer', 'Answer')}\n{PETERS}",
        f"{TEXT}\n" + PETERS.replace("PeterNeumann", "CarmenSandiego"),
        f"{TEXT}\n" + PETERS.replace("x08g", "xxxx"),
        f"{TEXT}\n" + PETERS * 2000,
    ):
        with pytest.raises(Refused):
            note.open_note(text.encode(), [PETER])
    with pytest.raises(Refused):
        note.open_note(b"\xff" + f"{TEXT}\n{PETERS}".encode(), [PETER])


def test_go_signs_the_same_bytes() -> None:
    """The private key of the test of x/mod: signatures of Ed25519 are deterministic."""
    private = Ed25519PrivateKey.from_private_bytes(
        base64_bytes("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz", "a key")[1:]
    )
    key = NoteKey("PeterNeumann", ED25519_TYPE, private.public_key().public_bytes_raw())
    assert str(key) == PETER
    made = note.b64(key.id + private.sign(TEXT.encode()))
    assert f"— PeterNeumann {made}\n" == PETERS


def test_a_published_checkpoint_and_its_cosignatures_verify() -> None:
    found = note.open_checkpoint(CHECKPOINT.encode(), LOG, cosigners=WITNESSES)
    assert (found.origin, found.size) == ("arche2025h1.staging.ct.transparency.dev", 1432088532)
    assert note.split_note(CHECKPOINT.encode())[0] == checkpoint_text(found)
    for old, new in (("1432088532", "42"), ("pIyCDwAAAABqEiEg", "pIyCDwAAAABqEiEh")):
        with pytest.raises(Refused):
            note.open_checkpoint(CHECKPOINT.replace(old, new).encode(), LOG, cosigners=WITNESSES)
    stranger = str(NoteKey("remora.n621.de", COSIGNATURE_TYPE, note.parse_vkey(FOO).public))
    with pytest.raises(Refused, match="not signed as expected"):
        note.open_checkpoint(CHECKPOINT.encode(), LOG, cosigners=[stranger])


SEED = Ed25519PrivateKey.from_private_bytes(b"l" * 32)
KEY = NoteKey("deletion-ready-model/0f", ED25519_TYPE, SEED.public_key().public_bytes_raw())


def signed(text: bytes, key: NoteKey = KEY) -> bytes:
    return text + f"\n— {key.name} {note.b64(key.id + SEED.sign(text))}\n".encode()


ROOT = note.b64(merkle.leaf_hash(b"entry"))


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", "o\n", f"{KEY.name}\n1\n", f"{KEY.name}\n\n{ROOT}\n", f"\n1\n{ROOT}\n"),
        *(f"{KEY.name}\n{size}\n{ROOT}\n" for size in ("", "-1", "01", "+1", "1 ", "x", "٣", 1 << 63)),
        f"{KEY.name}\n0\n{ROOT}\n",  # no entries have another root
        *(f"{KEY.name}\n1\n{root}\n" for root in ("", "ab", ROOT[:-1], f"{ROOT}=", ROOT[:-2] + "R=")),
        f"{KEY.name}\n1\n{note.b64(b'short')}\n",
        f"another/log\n1\n{ROOT}\n",
    ],
)
def test_malformed_checkpoints_are_refused_though_they_are_signed(text: str) -> None:
    with pytest.raises(Refused):
        note.open_checkpoint(signed(text.encode()), str(KEY))


def test_checkpoints_may_have_extensions_and_foreign_signatures() -> None:
    text = f"{KEY.name}\n1\n{ROOT}\nextension\n".encode()
    assert note.open_checkpoint(signed(text) + PETERS.encode(), str(KEY)).size == 1
    with pytest.raises(Refused, match="of another type"):
        note.open_checkpoint(signed(text) + PETERS.encode(), str(KEY), cosigners=[PETER])


def proof_of(num: int, index: int, extra: str = "") -> tuple[bytes, bytes]:
    entries = [str(each).encode() for each in range(num)]
    hashes = [merkle.leaf_hash(each) for each in entries]
    checkpoint = signed(checkpoint_text(Checkpoint(KEY.name, num, merkle.root(hashes))))
    text = proof_text(index, inclusion_path(hashes, index), checkpoint)
    return text.replace(b"index", f"{extra}index".encode(), 1), entries[index]


@pytest.mark.parametrize(("num", "index"), [(1, 0), (2, 1), (7, 6), (300, 256)])
def test_a_proof_verifies_offline(num: int, index: int) -> None:
    text, entry = proof_of(num, index)
    assert note.verify_proof(text, entry, str(KEY))[0] == index
    assert note.verify_proof(proof_of(num, index, "extra QQ==\n")[0], entry, str(KEY))[0] == index
    for other in (b"", entry + b"x", merkle.leaf_hash(entry)):
        with pytest.raises(Refused):
            note.verify_proof(text, other, str(KEY))


HASH = note.b64(sha256(b"hash1").digest())


def test_a_proof_has_the_published_form() -> None:
    text = f"c2sp.org/tlog-proof@v1\nindex 5\n{HASH}\n\ntest checkpoint\n".encode()
    assert proof_text(5, [sha256(b"hash1").digest()], b"test checkpoint\n") == text
    assert note.parse_proof(text) == (5, [sha256(b"hash1").digest()], b"test checkpoint\n")
    assert proof_text(0, [], b"c\n") == b"c2sp.org/tlog-proof@v1\nindex 0\n\nc\n"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "\n\n",
            "wrong-header\nindex 0\n\ncheckpoint\n",
            "c2sp.org/tlog-proof@v1\n\n\ncheckpoint\n",
        ),
        "c2sp.org/tlog-proof@v1\nextra !!notbase64!!\nindex 0\n\ncheckpoint\n",
        *(
            f"c2sp.org/tlog-proof@v1\nindex {each}\n\ncheckpoint\n"
            for each in ("", "notanumber", "-5", "00", 1 << 63)
        ),
        "c2sp.org/tlog-proof@v1\nindex 0\n!!notbase64!!\n\ncheckpoint\n",
        f"c2sp.org/tlog-proof@v1\nindex 0\n{note.b64(bytes(64))}\n\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + f"{HASH}\n" * 64 + "\ncheckpoint\n",
        "c2sp.org/tlog-proof@v1\nindex 0\n" + "a" * (1 << 19) + "\n",
    ],
)
def test_malformed_proofs_are_refused(text: str) -> None:
    with pytest.raises(Refused):
        note.verify_proof(text.encode(), b"entry", str(KEY))


@pytest.mark.parametrize(
    ("level", "index", "width", "path"),
    [
        (0, 1, 256, "tile/0/001"),
        (0, 1, 5, "tile/0/001.p/5"),
        (5, 123456078, 256, "tile/5/x123/x456/078"),
        (5, 123456078, 2, "tile/5/x123/x456/078.p/2"),
        ("entries", 3057500, 256, "tile/entries/x003/x057/500"),
    ],
)
def test_paths_are_those_of_go(level: int | str, index: int, width: int, path: str) -> None:
    assert note.tile_path(level, index, width) == path


def test_a_cosigner_signs_under_another_id_than_a_log() -> None:
    witness = NoteKey(KEY.name, COSIGNATURE_TYPE, KEY.public)
    assert witness.id != KEY.id
    text = checkpoint_text(Checkpoint(KEY.name, 1, merkle.leaf_hash(b"entry")))
    with pytest.raises(Refused):  # a log's signature under the witness's id is no cosignature
        note.open_checkpoint(
            signed(text) + signed(text, witness).split(b"\n\n")[1], str(KEY), cosigners=[str(witness)]
        )
