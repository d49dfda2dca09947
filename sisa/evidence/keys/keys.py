"""Keep the keys of a model's evidence, sign with them, and rotate the one that signs statements.

    KEYS/MODEL/               outside the model's directory, mode 0700; files have mode 0600
      public.json             the file of public keys, published as `keys.json` beside the log
      KEYID.key               the key that signs statements (Ed25519, PKCS#8 in PEM), or
      KEYID.signer            the URI of what holds it: an agent, a token, a service (`signers.py`)
      log.key, vrf.key        32 bytes each: the Ed25519 seed of the log, and the secret of the VRF;
                              the key that signs exports is drawn from the seed
      handover.json           a hand-over that is not in the log yet

KEYID is the sha256 of the public key (SubjectPublicKeyInfo, DER). A rotation writes the hand-over, the
new key, and the new file of public keys, which decides; then it logs the hand-over, and destroys the old
key. After a crash `Keys.settle` completes or undoes it.

The old key signs the hand-over to the new one. The signature of a lost or leaked key would prove
nothing, so then the new key signs: everybody who trusts the old key must get the new one from its owner.
What the old key signed before the given entry of the log stays valid: nobody can put an entry there now,
as far as the log is watched.

The functions act at three levels:

    start_evidence, rotate, keys_of, log_of    on an open model
    init_keys, open_keys                       where the run file says
    create_keys, read_keys, rotate_keys        on a directory

>>> import tempfile
>>> from sisa.verifier.envelope import verify_envelope
>>> with tempfile.TemporaryDirectory() as folder:
...     keys = create_keys(Path(folder) / "keys", "0f" * 16)
...     signed = keys.sign({"subject": [], "predicateType": "urn:example:v1", "predicate": {"n": 1}})
...     verify_envelope(signed, keys.public)["predicate"]
{'n': 1}
"""

from __future__ import annotations

import hashlib
import os
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import rfc8785
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_public_key,
)

from sisa.config.config import RunConfig
from sisa.core.digest import KEY_BYTES, sha256_hex
from sisa.core.errors import ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.core.ports import BlobStore
from sisa.evidence.database import EvidenceTables
from sisa.evidence.keys.model_signature import export_key, public_pem
from sisa.evidence.log.log import Log, origin, statement_in
from sisa.evidence.statements import statement
from sisa.flows.wiring.wiring import EVIDENCE, evidence_keys
from sisa.store.areas import LOG, open_areas
from sisa.store.blobs import files
from sisa.verifier import note
from sisa.verifier.certificate import KEY_HANDOVER
from sisa.verifier.envelope import (
    ECDSA_P256,
    ED25519,
    KEYS_PAYLOAD_TYPE,
    KEYS_TYPE,
    PAYLOAD_TYPE,
    STATEMENT_TYPE,
    CertificateKey,
    PublicKeys,
    Refused,
    pae,
    parse_keys,
)
from sisa.verifier.note import NoteKey

if TYPE_CHECKING:
    from sisa.model import Model

PUBLIC, HANDOVER, LOG_KEY, VRF_KEY = "public.json", "handover.json", "log.key", "vrf.key"
KEY, SIGNER = ".key", ".signer"  # suffixes of the file of a key that signs statements
PUBLISHED = "keys.json"  # the file of public keys, beside the log
EXPORTS_KEY = "exports.pem"  # beside it: the public key of exports, for `model_signing verify key`
MAX_KEY_FILE_BYTES = 1 << 20
Reason = Literal["rotated", "lost", "leaked"]
SignBytes = Callable[[bytes], bytes]  # returns the signature of a message


@dataclass(frozen=True)
class Keys:
    """The keys of a model's evidence. Nothing secret is in their `repr`."""

    directory: Path
    public: PublicKeys
    public_file: bytes = field(repr=False)
    log_seed: bytes = field(repr=False)
    vrf_secret: bytes = field(repr=False)
    signer: str = ""  # the URI of what signs instead of a key file

    @property
    def model(self) -> str:
        return self.public.model

    @property
    def present(self) -> CertificateKey:
        """Return the public key that signs now."""
        return self.public.certificates[-1]

    def sign(self, unsigned: Mapping[str, Any]) -> bytes:
        """Return the envelope of a statement. Raise EnvironmentFault if the signer fails."""
        path = self.directory / f"{self.present.keyid}{KEY}"
        try:
            private = b"" if self.signer else path.read_bytes()
        except OSError as error:
            raise EnvironmentFault(
                f"the key that signs can't be read: {error.strerror}",
                where=str(path),
                next_step="restore it from a backup, or replace it by `sisa keys rotate --lost`",
            ) from None
        sign = _sign_function(self.present, private, self.signer)
        return _signed_statement(unsigned, self.present, sign)

    def settle(self, log: Log) -> None:
        """Log the hand-over of an interrupted rotation, then destroy the key that it replaced.

        Raise IntegrityError if another entry is in its place.
        """
        path, present = self.directory / HANDOVER, self.present.keyid
        if not path.exists():
            return
        envelope = _read_file(path)
        try:
            predicate = statement_in(envelope)["predicate"]
            reason, body = predicate.get("reason"), predicate.get("keys")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _damaged(path, "no hand-over of keys") from None
        if body == public_body(self.public):  # else the rotation ended before it took effect
            index = self.present.since - (reason == "rotated")
            if log.size == index:
                log.append(envelope, KEY_HANDOVER)
            entry = next(log.entries(index)) if index < log.size else None
            if entry is None or entry.sha256 != sha256_hex(envelope):
                raise IntegrityError(
                    "the log does not continue where the keys were rotated",
                    where=str(path),
                    expected=f"the hand-over as entry {index}",
                    got=f"another entry, of {log.size}",
                    next_step="restore the log's newer files from where it is published",
                )
        for each in sorted(self.directory.glob(f"*{KEY}")) + sorted(self.directory.glob(f"*{SIGNER}")):
            if each.name not in (LOG_KEY, VRF_KEY) and each.stem != present:
                with files.disk_errors(each):
                    files.overwrite(each)
                files.erase(each)
        files.erase_all(self.directory, [HANDOVER])


def log_for_writing(keys: Keys, blobs: BlobStore) -> Log:
    """Return a model's log to append to, once the keys are settled and published beside it.

    The caller holds the writer lock. Raise IntegrityError.
    """
    log = Log(blobs, keys)
    keys.settle(log)
    exports = public_pem(export_key(keys.log_seed).public_key())
    for name, data in ((PUBLISHED, keys.public_file), (EXPORTS_KEY, exports)):
        if not blobs.num_bytes(name) or blobs.get(name, "file of public keys") != data:
            blobs.put(name, data)
    return log


def log_blobs(model: Model) -> BlobStore:
    """Return the location of a model's log."""
    return open_areas(model.directory, model.config.storage, model.id)[LOG]


def keys_of(model: Model) -> Keys:
    """Return the keys of a model. Raise InvalidInput if it has none."""
    if (keys := open_keys(model.config, model.id)) is None:
        raise InvalidInput(
            "the model has no keys of evidence, so its deletions are not certified",
            where=str(evidence_keys(model.config, model.id)),
            next_step=f"make them: sisa keys init -m {model.directory}",
        )
    return keys


def log_of(model: Model) -> Log:
    """Return the log of a model. Raise InvalidInput if the model has no keys."""
    return Log(log_blobs(model), keys_of(model))


def start_evidence(model: Model, signer: str = "", public_key: CertificateKey | None = None) -> Keys:
    """Make the keys of a model, and publish the public ones. Raise ConfigConflict if it has some."""
    with model.locked():
        blobs = log_blobs(model)
        if not evidence_keys(model.config, model.id).exists():
            if blobs.held():
                raise ConfigConflict(
                    "the model has a log of evidence, which other keys signed; nothing was changed",
                    where=blobs.location(),
                    next_step="restore its keys from a backup, or move the log away: evidence begins "
                    "anew, and what was certified before is checked with the old keys and the old log",
                )
            EvidenceTables(model.directory / EVIDENCE).drop_logged()
        keys = init_keys(model.config, model.id, signer, public_key)
        log_for_writing(keys, blobs)
    return keys


def rotate(
    model: Model,
    reason: Reason = "rotated",
    until: int | None = None,
    signer: str = "",
    public_key: CertificateKey | None = None,
) -> Keys:
    """Replace the key that signs a model's statements. Raise Busy while another process writes."""
    with model.locked():
        keys, blobs = keys_of(model), log_blobs(model)
        signer = signer or model.config.signing.signer or ""
        new = rotate_keys(keys, log_for_writing(keys, blobs), reason, until, signer, public_key)
        log_for_writing(new, blobs)
    return new


def init_keys(
    config: RunConfig, model: str, signer: str = "", public_key: CertificateKey | None = None
) -> Keys:
    """Make the keys of a model, where its run file says. Raise ConfigConflict if it has some."""
    signer = signer or config.signing.signer or ""
    return create_keys(evidence_keys(config, model), model, signer, public_key)


def open_keys(config: RunConfig, model: str) -> Keys | None:
    """Return the keys of a model; None if it has none. Raise IntegrityError for damaged ones."""
    found = read_keys(evidence_keys(config, model), model)
    return replace(found, signer=config.signing.signer) if found and config.signing.signer else found


def create_keys(
    directory: Path, model: str, signer: str = "", public_key: CertificateKey | None = None
) -> Keys:
    """Make keys in a new directory; with a signer, its public key instead of a key that signs.

    Raise ConfigConflict for an existing directory, EnvironmentFault if the signer fails.
    """
    if directory.exists():
        raise ConfigConflict(
            "the model has keys of evidence; nothing was changed",
            where=str(directory),
            next_step="`sisa keys rotate` replaces the one that signs",
        )
    present, name, data = _new_key(signer, public_key)
    log_seed, vrf_secret = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    public = PublicKeys(model, (present,), *_derived(model, log_seed, vrf_secret))
    made = {name: data, LOG_KEY: log_seed, VRF_KEY: vrf_secret}
    made[PUBLIC] = _signed_public_file(public, _sign_function(present, data, signer))
    files.write_directory(directory, made)
    return _read(directory, model)


def read_keys(directory: Path, model: str) -> Keys | None:
    """Return the keys in a directory; None if there is none. Raise IntegrityError."""
    return _read(directory, model) if directory.is_dir() else None


def _read(directory: Path, model: str) -> Keys:
    names = PUBLIC, LOG_KEY, VRF_KEY
    public_file, log_seed, vrf_secret = (_read_file(directory / name) for name in names)
    try:
        public = parse_keys(public_file)
        if public != PublicKeys(model, public.certificates, *_derived(model, log_seed, vrf_secret)):
            raise Refused("the keys do not belong together, or to this model")
    except ValueError as error:  # Refused is one
        raise _damaged(directory, str(error)) from None
    key, signer = (directory / f"{public.certificates[-1].keyid}{each}" for each in (KEY, SIGNER))
    uri = _read_file(signer).decode("utf-8", "replace") if signer.exists() and not key.exists() else ""
    return Keys(directory, public, public_file, log_seed, vrf_secret, uri)


def rotate_keys(
    keys: Keys,
    log: Log,
    reason: Reason = "rotated",
    until: int | None = None,
    signer: str = "",
    public_key: CertificateKey | None = None,
) -> Keys:
    """Replace the key that signs, and log the hand-over; the caller holds the writer lock.

    Entries before `until` stay valid under a key that is lost or leaked: by default, all of the log.
    """
    keys.settle(log)
    since = log.size + (reason == "rotated")  # its hand-over is the last entry that the old key signs
    end = since if until is None else until
    if not keys.present.since <= end <= since:
        raise InvalidInput(
            "the old key can't end there",
            expected=f"an entry from {keys.present.since} to {since}",
            got=str(end),
        )
    new, name, data = _new_key(signer, public_key, since)
    if new.keyid in {key.keyid for key in keys.public.certificates}:
        raise InvalidInput("the new key is an old one", got=f"keyid {new.keyid}")
    old = (*keys.public.certificates[:-1], replace(keys.present, until=end))
    public, sign = replace(keys.public, certificates=(*old, new)), _sign_function(new, data, signer)
    subject = [{"name": "signing-key", "digest": {"sha256": new.keyid}}]
    named = statement(subject, KEY_HANDOVER, {"reason": reason, "keys": public_body(public)})
    handover = keys.sign(named) if reason == "rotated" else _signed_statement(named, new, sign)
    public_file = _signed_public_file(public, sign)
    files.write_atomic(keys.directory / HANDOVER, handover)
    files.write_atomic(keys.directory / name, data)
    files.write_atomic(keys.directory / PUBLIC, public_file)
    made = _read(keys.directory, keys.model)
    made.settle(log)
    return made


def read_private_key(key_file: Path) -> Ed25519PrivateKey:
    """Return the private key of another party. Raise InvalidInput unless it is Ed25519 in PEM."""
    try:
        private = load_pem_private_key(key_file.read_bytes(), None)
    except OSError as error:
        got = error.strerror or type(error).__name__
    except (ValueError, TypeError, UnsupportedAlgorithm):
        got = "no private key in PEM, or one with a password"
    else:
        if isinstance(private, Ed25519PrivateKey):
            return private
        got = "a key of another kind"
    raise InvalidInput(
        "the signing key can't be used",
        where=str(key_file),
        expected="an Ed25519 private key in PEM",
        got=got,
        next_step=f"make one: openssl genpkey -algorithm ed25519 -out {key_file}",
    )


def sign_as(unsigned: Mapping[str, Any], private: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """Return a statement's envelope under the key of another party, and its public key in PEM."""
    public = private.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return _signed_statement(unsigned, _certificate_key(public, ED25519), private.sign), pem


def read_public_key(path: Path) -> CertificateKey:
    """Return a public key from a file in PEM or in OpenSSH's form. Raise InvalidInput."""
    try:
        data = path.read_bytes()[:MAX_KEY_FILE_BYTES]
    except OSError as error:
        raise InvalidInput(
            "the public key can't be read", where=str(path), got=str(error.strerror)
        ) from None
    for load in (load_pem_public_key, load_ssh_public_key):
        with suppress(ValueError, UnsupportedAlgorithm):
            key: Any = load(data)
            ed25519, curve = isinstance(key, Ed25519PublicKey), getattr(key, "curve", None)
            if ed25519 or getattr(curve, "name", "") == "secp256r1":
                return _certificate_key(key, ED25519 if ed25519 else ECDSA_P256)
    raise InvalidInput(
        "this public key can't sign certificates",
        where=str(path),
        expected="Ed25519 or ECDSA on P-256, in PEM or as OpenSSH writes it",
    )


def _certificate_key(public: Any, scheme: str, since: int = 0) -> CertificateKey:
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return CertificateKey(hashlib.sha256(der).hexdigest(), scheme, der, since)


def _new_key(
    signer: str, public_key: CertificateKey | None, since: int = 0
) -> tuple[CertificateKey, str, bytes]:
    """Return a key that signs from entry `since` on, and the name and the bytes of its file."""
    if not signer and public_key is None:
        private = Ed25519PrivateKey.generate()
        key = _certificate_key(private.public_key(), ED25519, since)
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return key, f"{key.keyid}{KEY}", pem
    if not signer or public_key is None:
        raise InvalidInput(
            "a signer and its public key belong together",
            expected="both or neither",
            next_step="give --signer (or `signing.signer` of the run file) and --public-key",
        )
    return replace(public_key, since=since), f"{public_key.keyid}{SIGNER}", signer.encode()


def _sign_function(key: CertificateKey, private: bytes, signer: str) -> SignBytes:
    """Return the function that signs: with a private key in PEM, or by the URI `signer`."""
    if signer:
        from sisa.evidence.keys.signers import signature_by

        return partial(signature_by, signer, key)
    try:
        found = load_pem_private_key(private, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise _damaged(Path(f"{key.keyid}{KEY}"), "no private key in PEM")
    return found.sign


def _signed_statement(unsigned: Mapping[str, Any], key: CertificateKey, sign: SignBytes) -> bytes:
    payload = rfc8785.dumps({"_type": STATEMENT_TYPE, **unsigned})
    return _envelope(PAYLOAD_TYPE, payload, key, sign)


def _signed_public_file(public: PublicKeys, sign: SignBytes) -> bytes:
    payload = rfc8785.dumps(public_body(public))
    return _envelope(KEYS_PAYLOAD_TYPE, payload, public.certificates[-1], sign)


def _envelope(payload_type: str, payload: bytes, key: CertificateKey, sign: SignBytes) -> bytes:
    """Return a DSSE envelope, whose signature was checked."""
    message = pae(payload_type, payload)
    if not key.verifies(signature := sign(message), message):
        raise EnvironmentFault(
            "the signer signed with another key than the model's",
            expected=f"keyid {key.keyid}",
            next_step="name the signer of that key by `signing.signer` in the run file, or replace the "
            "key by `sisa keys rotate`",
        )
    signatures = [{"keyid": key.keyid, "sig": b64encode(signature).decode()}]
    envelope = {"payload": b64encode(payload).decode(), "payloadType": payload_type}
    return rfc8785.dumps({**envelope, "signatures": signatures})


def public_body(public: PublicKeys) -> dict[str, Any]:
    """Return the content of a file of public keys."""
    listed = [asdict(key) | {"public": b64encode(key.public).decode()} for key in public.certificates]
    return {
        "type": KEYS_TYPE,
        "model": public.model,
        "certificates": listed,
        "log": public.log,
        "vrf": public.vrf.hex(),
        "exports": b64encode(public.exports).decode(),
    }


def _derived(model: str, log_seed: bytes, vrf_secret: bytes) -> tuple[str, bytes, bytes]:
    """Return the public keys of log (a vkey), VRF and exports. Raise ValueError for other sizes."""
    log, vrf = (
        Ed25519PrivateKey.from_private_bytes(each).public_key().public_bytes_raw()
        for each in (log_seed, vrf_secret)  # RFC 9381, 5.5: the key of ECVRF is made as Ed25519's
    )
    exports = export_key(log_seed).public_key()
    der = exports.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return str(NoteKey(origin(model), note.ED25519, log)), vrf, der


def _read_file(path: Path) -> bytes:
    with files.disk_errors(path):
        try:
            with path.open("rb") as file:
                return file.read(MAX_KEY_FILE_BYTES)
        except FileNotFoundError:
            raise _damaged(path, "no file") from None


def _damaged(path: Path, got: str) -> IntegrityError:
    return IntegrityError(
        "the keys of the model's evidence are damaged",
        where=str(path),
        got=got,
        next_step="restore them from a backup; `sisa keys rotate --lost` replaces a lost key that signs",
    )
