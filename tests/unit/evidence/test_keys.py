"""Keys of evidence: made, used, rotated, lost, leaked; signed by files, agents and other signers."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_public_key,
)
from google.protobuf.json_format import Parse
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as Message
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from sisa.core.errors import (
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    SisaError,
)
from sisa.evidence.keys.keys import (
    HANDOVER,
    LOG_KEY,
    PUBLIC,
    VRF_KEY,
    Keys,
    create_keys,
    new_key,
    public_body,
    read_keys,
    rotate_keys,
)
from sisa.evidence.keys.model_keys import PUBLIC_KEYS, log_for_writing
from sisa.evidence.keys.signing import read_public_key
from sisa.evidence.log.log import Log
from sisa.evidence.log.published import KEY_HANDOVER, check_log, follow, log_reader
from sisa.store.areas import LOG
from sisa.store.blobs import files
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier.certificate import EXACT, STATE, verify_chain
from sisa.verifier.envelope import PublicKeys, Refused, parse_keys, verify_envelope
from tests.crash import crashing, fuses
from tests.models.certified import certified, check_statement

MODEL = "0f" * 16
STATEMENT = {
    "subject": [{"name": "shard-00000", "digest": {"sha256": "ab" * 32}}],
    "predicateType": "urn:example:v1",
    "predicate": {"model": MODEL, "share": 0.25},
}
Private = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return create_keys(tmp_path / "keys", MODEL)


def log_of(tmp_path: Path, keys: Keys) -> Log:
    return Log(LocalBlobs(tmp_path / "log"), keys)


def followed(tmp_path: Path, known: PublicKeys) -> PublicKeys:
    """Return the keys to which known ones were handed over in the published log."""
    read = log_reader(str(tmp_path / "log"))
    return follow(known, check_log(read, known.log)[1], read)


def secrets(directory: Path) -> list[bytes]:
    """Return everything secret in a directory of keys, in the forms in which it might be printed."""
    found = [path.read_bytes() for path in sorted(directory.glob("*.key"))]
    lines = [line for data in found if data.startswith(b"-----") for line in data.split(b"\n")[1:2]]
    raw = [data for data in found if not data.startswith(b"-----")]
    return [*lines, *raw, *(each.hex().encode() for each in raw), *(repr(each).encode() for each in raw)]


def check_settled(keys: Keys) -> None:
    """Expect the present key's file alone beside those of the log and the VRF."""
    names = {path.name for path in keys.directory.iterdir()}
    own = {name for name in names if Path(name).suffix in (".key", ".signer")} - {LOG_KEY, VRF_KEY}
    assert {Path(name).stem for name in own} == {keys.present.keyid}
    assert HANDOVER not in names


def test_keys_are_their_owners_alone(keys: Keys) -> None:
    paths = [keys.directory, *keys.directory.iterdir()]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
    assert set(modes) == {"keys", PUBLIC, LOG_KEY, VRF_KEY, f"{keys.present.keyid}.key"}
    assert modes.pop("keys") == 0o700
    assert set(modes.values()) == {0o600}


def test_keys_are_not_overwritten(keys: Keys) -> None:
    before = {path.name: path.read_bytes() for path in keys.directory.iterdir()}
    with pytest.raises(ConfigConflict):
        create_keys(keys.directory, MODEL)
    assert {path.name: path.read_bytes() for path in keys.directory.iterdir()} == before
    assert read_keys(keys.directory, MODEL) == keys


def test_nothing_secret_is_printed(keys: Keys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    private = keys.directory / f"{keys.present.keyid}.key"
    known = secrets(keys.directory)
    text = repr(keys) + str(keys) + repr(keys.public)
    private.write_bytes(private.read_bytes()[:-30])
    with pytest.raises(IntegrityError) as caught:
        keys.sign(STATEMENT)
    text += str(caught.value) + repr(caught.value.to_json()) + caplog.text
    assert [each for each in known if each in text.encode()] == []


def ssl_key(keys: Keys) -> SSlibKey:
    public: Any = load_der_public_key(keys.present.public)
    return SSlibKey.from_crypto(public, keys.present.keyid)


def test_securesystemslib_verifies_what_is_signed(keys: Keys) -> None:
    signed = Envelope.from_dict(json.loads(keys.sign(STATEMENT)))
    assert list(signed.verify([ssl_key(keys)], 1)) == [keys.present.keyid]
    signed.payload += b" "
    with pytest.raises(VerificationError):
        signed.verify([ssl_key(keys)], 1)


def test_in_toto_reads_what_is_signed(keys: Keys) -> None:
    payload = base64.b64decode(json.loads(keys.sign(STATEMENT))["payload"])
    found = Statement.copy_from_pb(Parse(payload, Message()))
    found.validate()
    assert found.pb.predicate_type == "urn:example:v1"
    assert found.pb.subject[0].digest["sha256"] == "ab" * 32


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((PUBLIC, each) for each in (b"{}", b"", None)),
        *((LOG_KEY, each) for each in (b"short", bytes(32), None)),
        *((VRF_KEY, each) for each in (bytes(32), None)),
    ],
)
def test_damaged_keys_are_found(keys: Keys, name: str, data: bytes | None) -> None:
    path = keys.directory / name
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        read_keys(keys.directory, MODEL)
    assert caught.value.next_step


@pytest.mark.parametrize("data", [b"", b"{}", b'{"payload":"e30="}', b'{"payload":"bnVsbA=="}', b"\xff"])
def test_a_damaged_hand_over_is_found(tmp_path: Path, keys: Keys, data: bytes) -> None:
    (keys.directory / HANDOVER).write_bytes(data)
    with pytest.raises(IntegrityError):
        keys.settle(log_of(tmp_path, keys))
    assert keys.sign(STATEMENT)


def test_keys_of_another_model_are_found(keys: Keys) -> None:
    with pytest.raises(IntegrityError):
        read_keys(keys.directory, "f0" * 16)


def test_a_missing_key_is_an_environment_fault(keys: Keys) -> None:
    (keys.directory / f"{keys.present.keyid}.key").unlink()
    with pytest.raises(EnvironmentFault) as caught:
        keys.sign(STATEMENT)
    assert "rotate --lost" in caught.value.next_step


def test_the_old_key_hands_over_to_the_new_one(tmp_path: Path, keys: Keys) -> None:
    log = log_of(tmp_path, keys)
    first = keys.sign(STATEMENT)
    assert log.append(first, "urn:example:v1") == 0
    new = rotate_keys(keys, log)
    check_settled(new)
    assert read_keys(keys.directory, MODEL) == new
    old_key, new_key = new.public.statement_keys
    assert (old_key.keyid, old_key.until, new_key.since) == (keys.present.keyid, 2, 2)
    (entry,) = log.entries(1)
    assert entry.predicate_type == KEY_HANDOVER
    handover = verify_envelope(log.statement(entry.sha256), keys.public)  # whoever has the old file
    check_statement(handover)
    assert handover["predicate"]["keys"]["certificates"][-1]["keyid"] == new.present.keyid
    assert verify_envelope(log.statement(entry.sha256), new.public, 1) == handover
    assert verify_envelope(first, new.public, 0)
    for data, index in ((first, 2), (first, None), (new.sign(STATEMENT), 1)):
        with pytest.raises(Refused):
            verify_envelope(data, new.public, index)
    assert log.append(new.sign(STATEMENT), "urn:example:v1") == 2


@pytest.mark.parametrize(("reason", "until", "ends"), [("lost", None, 2), ("leaked", 1, 1)])
def test_a_lost_or_leaked_keys_certificates_stay_valid_up_to_an_entry(
    tmp_path: Path, keys: Keys, reason: Any, until: int | None, ends: int
) -> None:
    log = log_of(tmp_path, keys)
    signed = [keys.sign({**STATEMENT, "predicate": {"n": n}}) for n in range(3)]
    for each in signed[:2]:
        log.append(each, "urn:example:v1")
    if reason == "lost":
        (keys.directory / f"{keys.present.keyid}.key").unlink()
    new = rotate_keys(keys, log, reason, until)
    check_settled(new)
    assert [(key.since, key.until) for key in new.public.statement_keys] == [(0, ends), (2, None)]
    for n, each in enumerate(signed):
        if n < ends:
            assert verify_envelope(each, new.public, n)["predicate"] == {"n": n}
        else:
            with pytest.raises(Refused):
                verify_envelope(each, new.public, n)
    (entry,) = log.entries(2)
    handover = log.statement(entry.sha256)
    stated = verify_envelope(handover, new.public, 2)
    check_statement(stated)
    assert stated["predicate"]["reason"] == reason
    with pytest.raises(Refused, match="lost or leaked"):  # the old key shows nothing of the new one
        followed(tmp_path, keys.public)
    assert followed(tmp_path, new.public) == new.public


def test_keys_are_followed_over_many_rotations(tmp_path: Path, keys: Keys) -> None:
    log = log_of(tmp_path, keys)
    files_of_keys = [keys.public]
    for n in range(4):
        log.append(keys.sign({**STATEMENT, "predicate": {"n": n}}), "urn:example:v1")
        keys = rotate_keys(keys, log)
        files_of_keys.append(keys.public)
    assert [followed(tmp_path, each) for each in files_of_keys] == [keys.public] * 5
    with pytest.raises(Refused):
        follow(keys.public, [b"{}"], str.encode)


def test_a_rotation_erases_no_file_that_somebody_else_put_there(tmp_path: Path, keys: Keys) -> None:
    others = [keys.directory / name for name in ("cosigner.key", "office.signer", "0f.key")]
    for each in others:
        each.write_bytes(b"theirs")
    rotate_keys(keys, log_of(tmp_path, keys))
    assert [each.read_bytes() for each in others] == [b"theirs"] * 3


def test_certificates_are_checked_across_rotations(tmp_path: Path) -> None:
    """This includes a statement that was signed but not logged before a rotation: it is signed again."""
    model = certified(tmp_path)
    first, blobs = model.keys.public, model.fake.context.stores.blobs[LOG]
    model.forget(1)
    keys = rotate_keys(model.keys, log_for_writing(model.keys, blobs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "append", lambda *_: (_ for _ in ()).throw(EnvironmentFault("no disk")))
        model.forget(2)
    second = (keys := rotate_keys(keys, log_for_writing(keys, blobs))).public
    model.forget(3)
    keys = rotate_keys(keys, log_for_writing(keys, blobs), "leaked")
    model.forget(4)
    read = log_reader(str(tmp_path / "log"))
    entries = check_log(read, first.log)[1]
    kinds = [each["predicateType"] for _, each in verify_chain(entries, read, keys.public)]
    assert kinds == [STATE, EXACT, *[KEY_HANDOVER] * 2, EXACT, EXACT, KEY_HANDOVER, EXACT]
    assert parse_keys(read(PUBLIC_KEYS)) == keys.public
    assert follow(first, entries[:6], read) == second
    with pytest.raises(Refused):
        list(verify_chain(entries, read, second))


def forged_handover(keys: Keys, thief: Keys, since: int) -> bytes:
    """Return a hand-over to a thief's key, signed by the stolen one."""
    old = replace(keys.present, until=since)
    new = replace(keys.public, statement_keys=(old, replace(thief.present, since=since)))
    return keys.sign(
        {
            "subject": [{"name": "signing-key", "digest": {"sha256": thief.present.keyid}}],
            "predicateType": KEY_HANDOVER,
            "predicate": {"reason": "rotated", "keys": public_body(new)},
        }
    )


def test_a_stolen_key_signs_nothing_after_its_end(tmp_path: Path, keys: Keys) -> None:
    """Nor does it hand over to a thief's key, but where the thief has the log's key, too."""
    thief = create_keys(tmp_path / "thief", MODEL)
    log = log_of(tmp_path, keys)
    log.append(keys.sign(STATEMENT), "urn:example:v1")
    private = (keys.directory / f"{keys.present.keyid}.key").read_bytes()
    new = rotate_keys(keys, log, "leaked", 1)
    (keys.directory / f"{keys.present.keyid}.key").write_bytes(private)  # as the thief still has it
    certificate = keys.sign({**STATEMENT, "predicate": {"n": 1}})
    for index in (None, 1, 2, 3):
        with pytest.raises(Refused):
            verify_envelope(certificate, new.public, index)
    for since in (0, 1, 2, 3):  # in a second log, which the thief signs
        place = tmp_path / f"{since}"
        (place / "keys").mkdir(parents=True)
        other = log_of(place, replace(keys, directory=place / "keys"))
        other.append(keys.sign(STATEMENT), "urn:example:v1")
        other.append(forged_handover(keys, thief, since), KEY_HANDOVER)
        if since == 2:
            assert followed(place, keys.public).present.keyid == thief.present.keyid
            continue  # a cosigner or a kept checkpoint distinguishes this log from the true one
        with pytest.raises(Refused):
            followed(place, keys.public)


@pytest.mark.parametrize("until", [-1, 1, 9])
def test_a_key_ends_within_the_log(tmp_path: Path, keys: Keys, until: int) -> None:
    with pytest.raises(InvalidInput):
        rotate_keys(keys, log_of(tmp_path, keys), "leaked", until)
    assert read_keys(keys.directory, MODEL) == keys


DISK = [(files, name) for name in ("write_atomic", "erase", "erase_all", "overwrite")]


@pytest.mark.parametrize("reason", ["rotated", "leaked"])
def test_a_killed_rotation_is_completed_or_undone(
    tmp_path_factory: pytest.TempPathFactory, reason: Any
) -> None:
    outcomes = []
    for fuse in fuses(more_than=4):
        place = tmp_path_factory.mktemp("keys")
        keys = create_keys(place / "keys", MODEL)
        log = log_of(place, keys)
        log.append(keys.sign(STATEMENT), "urn:example:v1")
        with fuse.on(*DISK):
            rotate_keys(keys, log, reason)
        found = read_keys(place / "keys", MODEL)
        found.settle(log := log_of(place, found))
        check_settled(found)
        changed = found.present.keyid != keys.present.keyid
        outcomes.append(changed)
        assert log.size == 1 + changed
        index = log.append(found.sign({**STATEMENT, "predicate": {}}), "urn:example:v1")
        for entry in log.entries(0):
            verify_envelope(log.statement(entry.sha256), found.public, entry.index)
        assert rotate_keys(found, log).present.since == index + 2
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def test_a_hand_over_is_logged_where_it_belongs_or_not_at_all(tmp_path: Path, keys: Keys) -> None:
    log = log_of(tmp_path, keys)
    with crashing((Log, "append")):
        rotate_keys(keys, log)
    log.append(keys.sign(STATEMENT), "urn:example:v1")  # by a process that did not settle it
    found = read_keys(keys.directory, MODEL)
    with pytest.raises(IntegrityError):
        found.settle(log)
    assert log.size == 1


def private_file(private: Private, path: Path, form: PrivateFormat) -> Path:
    path.write_bytes(private.private_bytes(Encoding.PEM, form, NoEncryption()))
    path.chmod(0o600)
    return path


def public_pem(private: Private, path: Path) -> Path:
    form = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    path.write_bytes(private.public_key().public_bytes(*form))
    return path


def made_privates() -> list[Private]:
    return [
        Ed25519PrivateKey.from_private_bytes(bytes(32)),
        ec.derive_private_key(7**80, ec.SECP256R1()),
    ]


@pytest.mark.parametrize("private", made_privates(), ids=["ed25519", "p256"])
def test_securesystemslibs_signers_sign(tmp_path: Path, private: Private) -> None:
    uri = f"file2:{private_file(private, tmp_path / 'k.pem', PrivateFormat.PKCS8)}"
    public = read_public_key(public_pem(private, tmp_path / "public.pem"))
    keys = create_keys(tmp_path / "keys", MODEL, new_key(uri, public))
    check_settled(keys)
    assert read_keys(tmp_path / "keys", MODEL) == keys
    assert verify_envelope(keys.sign(STATEMENT), keys.public)
    Envelope.from_dict(json.loads(keys.sign(STATEMENT))).verify([ssl_key(keys)], 1)
    new = rotate_keys(keys, log_of(tmp_path, keys))  # from a signer to a key file
    assert new.signer == ""
    check_settled(new)


@pytest.mark.parametrize(
    ("uri", "got"),
    [
        ("ssh-agent:", "SSH_AUTH_SOCK"),
        ("ssh-agent:MY_AGENT", "MY_AGENT"),
        ("hsm:2?label=x", ""),
        ("awskms:key", ""),
        ("nobody:knows", "ValueError"),
        ("file2:/nowhere/k.pem", ""),
    ],
)
def test_an_absent_signer_is_an_environment_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, got: str
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    public = read_public_key(public_pem(made_privates()[1], tmp_path / "public.pem"))
    with pytest.raises(EnvironmentFault) as caught:
        create_keys(tmp_path / "keys", MODEL, new_key(uri, public))
    assert caught.value.where == uri.partition(":")[0] + ":"
    assert got in caught.value.got
    assert caught.value.next_step
    assert not (tmp_path / "keys").exists()


def test_a_signer_with_another_key_is_found(tmp_path: Path) -> None:
    ed25519, p256 = made_privates()
    uri = f"file2:{private_file(ed25519, tmp_path / 'k.pem', PrivateFormat.PKCS8)}"
    for other in (Ed25519PrivateKey.generate(), p256):
        public = read_public_key(public_pem(other, tmp_path / "public.pem"))
        with pytest.raises(EnvironmentFault):
            create_keys(tmp_path / "keys", MODEL, new_key(uri, public))


def test_a_signer_and_its_public_key_belong_together(tmp_path: Path) -> None:
    public = read_public_key(public_pem(made_privates()[0], tmp_path / "public.pem"))
    for signer, key in (("ssh-agent:", None), ("", public)):
        with pytest.raises(InvalidInput):
            new_key(signer, key)


@pytest.mark.parametrize(
    "data", [b"", b"-----BEGIN PUBLIC KEY-----\nAAAA\n", b"ssh-ed25519 AAAA", bytes(99)]
)
def test_files_that_are_no_public_keys_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "key").write_bytes(data)
    for path in (tmp_path / "key", tmp_path / "none"):
        with pytest.raises(InvalidInput):
            read_public_key(path)
    public_pem(ec.derive_private_key(7, ec.SECP384R1()), tmp_path / "key")
    with pytest.raises(InvalidInput):
        read_public_key(tmp_path / "key")


@contextmanager
def ssh_agent(folder: Path, *privates: Private) -> Iterator[Path]:
    """Run OpenSSH's agent with some keys."""
    place = folder / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(place)], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        agent.stdout.readline()  # once it listens
        for number, private in enumerate(privates):
            path = private_file(private, folder / f"ssh-{number}", PrivateFormat.OpenSSH)
            environment = {**os.environ, "SSH_AUTH_SOCK": str(place)}
            subprocess.run(
                ["ssh-add", "-q", str(path)], env=environment, check=True, capture_output=True
            )
            path.unlink()
        yield place
    finally:
        agent.terminate()
        agent.communicate()


@pytest.mark.skipif(not shutil.which("ssh-agent"), reason="OpenSSH is not installed")
@pytest.mark.parametrize("private", made_privates(), ids=["ed25519", "p256"])
def test_an_agent_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private: Private) -> None:
    line = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    (tmp_path / "id.pub").write_bytes(line + b" somebody@somewhere\n")
    public = read_public_key(tmp_path / "id.pub")
    with ssh_agent(tmp_path, private) as place:
        monkeypatch.setenv("MY_AGENT", str(place))
        keys = create_keys(tmp_path / "keys", MODEL, new_key("ssh-agent:MY_AGENT", public))
        for _ in range(4):  # numbers of other lengths in the signature
            assert verify_envelope(keys.sign(STATEMENT), keys.public)
        other = read_public_key(public_pem(Ed25519PrivateKey.generate(), tmp_path / "other.pem"))
        with pytest.raises(EnvironmentFault, match="does not sign with this key"):
            create_keys(tmp_path / "others", MODEL, new_key("ssh-agent:MY_AGENT", other))
    with pytest.raises(EnvironmentFault):
        keys.sign(STATEMENT)


SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")


@pytest.mark.skipif(not SOFTHSM.exists(), reason="SoftHSM is not installed")
def test_a_token_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pkcs11", reason="securesystemslib[hsm] is not installed")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("PYKCS11LIB", str(SOFTHSM))
    private = made_privates()[1]
    pem = private_file(private, tmp_path / "k.pem", PrivateFormat.PKCS8)
    for line in (
        "--init-token --free --label evidence --pin 271828 --so-pin 314159",
        f"--import {pem} --token evidence --label evidence --id 02 --pin 271828",
    ):
        subprocess.run(["softhsm2-util", *line.split()], check=True, capture_output=True)
    public = read_public_key(public_pem(private, tmp_path / "public.pem"))
    monkeypatch.setenv("SISA_SIGNER_PIN", "271828")
    keys = create_keys(tmp_path / "keys", MODEL, new_key("hsm:2?label=evidence", public))
    assert verify_envelope(keys.sign(STATEMENT), keys.public)
    monkeypatch.setenv("SISA_SIGNER_PIN", "999999")
    with pytest.raises(EnvironmentFault) as caught:
        keys.sign(STATEMENT)
    assert "999999" not in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        *("", "0000", "00000000", "0000000105", "ffffffff0e", "000000010e"),
        "00000009 0e 00000004 00000000",
        "0000000d 0e 00000008 00000001 61 00000000",
    ],
)
def test_an_agent_that_answers_nonsense_is_an_environment_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: str
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "agent"))
        server.listen()

        def answer() -> None:
            with server.accept()[0] as client:
                client.recv(1 << 16)
                client.sendall(bytes.fromhex(reply))

        thread = threading.Thread(target=answer)
        thread.start()
        public = read_public_key(public_pem(made_privates()[0], tmp_path / "public.pem"))
        with pytest.raises(EnvironmentFault):
            create_keys(tmp_path / "keys", MODEL, new_key("ssh-agent:", public))
        thread.join()


def test_errors_of_signers_hold_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signer's error may quote what it was given; only its type is shown."""
    from securesystemslib.signer import SIGNER_FOR_URI_SCHEME

    class Talkative:
        @classmethod
        def from_priv_key_uri(cls, _uri: str, _key: Any, secrets_handler: Callable[[str], str]) -> Any:
            raise RuntimeError(f"wrong PIN {secrets_handler('pin')}")

    monkeypatch.setitem(SIGNER_FOR_URI_SCHEME, "talkative", Talkative)
    public = read_public_key(public_pem(made_privates()[0], tmp_path / "public.pem"))
    monkeypatch.setenv("SISA_SIGNER_PIN", "271828")
    errors = []
    for pin in ("271828", ""):
        monkeypatch.setenv("SISA_SIGNER_PIN", pin)
        with pytest.raises(SisaError) as caught:
            create_keys(tmp_path / "keys", MODEL, new_key("talkative:", public))
        errors.append(f"{caught.value} {caught.value.__cause__}")
    assert "271828" not in "".join(errors)
    assert "SISA_SIGNER_PIN" in errors[1]
