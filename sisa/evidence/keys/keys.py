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

The old key signs the hand-over, unless it is lost or leaked: then its signature would prove nothing, and
the new key signs.

>>> import tempfile
>>> from sisa.verifier.envelope import verify_envelope
>>> with tempfile.TemporaryDirectory() as folder:
...     keys = create_keys(Path(folder) / "keys", "0f" * 16)
...     signed = keys.sign({"subject": [], "predicateType": "urn:example:v1", "predicate": {"n": 1}})
...     verify_envelope(signed, keys.public)["predicate"]
{'n': 1}
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import rfc8785
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from sisa.core.digest import KEY_BYTES, sha256_hex
from sisa.core.errors import ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.evidence.keys.model_signature import export_key
from sisa.evidence.keys.signing import (
    MAX_KEY_FILE_BYTES,
    SignBytes,
    signed_envelope,
    signed_statement,
    statement_key,
)
from sisa.evidence.log.log import Log, origin, statement_in
from sisa.evidence.log.published import HANDOVER_FORM, KEY_HANDOVER
from sisa.evidence.statements import statement
from sisa.store.blobs import files
from sisa.verifier import note
from sisa.verifier.envelope import (
    ED25519,
    KEYS_PAYLOAD_TYPE,
    KEYS_TYPE,
    SHA256_HEX,
    PublicKeys,
    Refused,
    StatementKey,
    check_form,
    parse_keys,
)
from sisa.verifier.note import NoteKey

PUBLIC, HANDOVER, LOG_KEY, VRF_KEY = "public.json", "handover.json", "log.key", "vrf.key"
KEY_SUFFIX, SIGNER_SUFFIX = ".key", ".signer"  # suffixes of the file of a key that signs statements
Reason = Literal["rotated", "lost", "leaked"]


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
    def present(self) -> StatementKey:
        """Return the public key that signs now."""
        return self.public.present

    def sign(self, unsigned: Mapping[str, Any]) -> bytes:
        """Return the envelope of a statement. Raise EnvironmentFault if the signer fails."""
        sign = _sign_by(self.signer, self.present) if self.signer else self._read_private().sign
        return signed_statement(unsigned, self.present, sign)

    def _read_private(self) -> Ed25519PrivateKey:
        """Return the key that signs, from its file. Raise EnvironmentFault or IntegrityError."""
        path = self.directory / f"{self.present.keyid}{KEY_SUFFIX}"
        try:
            private = load_pem_private_key(path.read_bytes(), None)
        except OSError as error:
            raise EnvironmentFault(
                f"the key that signs can't be read: {error.strerror}",
                where=str(path),
                next_step="restore it from a backup, or replace it by `sisa keys rotate --lost`",
            ) from None
        except (ValueError, TypeError, UnsupportedAlgorithm):
            private = None
        if not isinstance(private, Ed25519PrivateKey):
            raise _damaged(path, "no private key in PEM")
        return private

    def settle(self, log: Log) -> None:
        """Log the hand-over of an interrupted rotation, then destroy the key that it replaced.

        Raise IntegrityError if another entry is in its place.
        """
        path, present = self.directory / HANDOVER, self.present.keyid
        if not path.exists():
            return
        envelope = _read_file(path)
        try:
            handover = check_form(statement_in(envelope)["predicate"], "the hand-over", HANDOVER_FORM)
        except Refused:
            raise _damaged(path, "no hand-over of keys") from None
        if handover["keys"] == public_body(self.public):  # else the rotation ended before it took effect
            index = self.present.since - (handover["reason"] == "rotated")
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
        for each in sorted(self.directory.iterdir()):  # other files are the user's
            of_a_key = each.suffix in (KEY_SUFFIX, SIGNER_SUFFIX) and SHA256_HEX.fullmatch(each.stem)
            if of_a_key and each.stem != present:
                with files.disk_errors(each):
                    files.overwrite(each)
                files.erase(each)
        files.erase_all(self.directory, [HANDOVER])


@dataclass(frozen=True)
class NewKey:
    """A key that is to sign statements, how it signs, and the file that holds it or names its signer."""

    public: StatementKey
    sign: SignBytes = field(repr=False)
    file: str
    data: bytes = field(repr=False)


def new_key(signer: str = "", public_key: StatementKey | None = None) -> NewKey:
    """Return a new key in a file, or the key with which a signer (a URI) signs. Raise InvalidInput."""
    if not signer and public_key is None:
        private = Ed25519PrivateKey.generate()
        public = statement_key(private.public_key(), ED25519)
        pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return NewKey(public, private.sign, f"{public.keyid}{KEY_SUFFIX}", pem)
    if not signer or public_key is None:
        raise InvalidInput(
            "a signer and its public key belong together",
            expected="both or neither",
            next_step="give --signer (or `signing.signer` of the run file) and --public-key",
        )
    sign = _sign_by(signer, public_key)
    return NewKey(public_key, sign, f"{public_key.keyid}{SIGNER_SUFFIX}", signer.encode())


def _sign_by(signer: str, key: StatementKey) -> SignBytes:
    from sisa.evidence.keys.signers import signature_by

    return partial(signature_by, signer, key)


def create_keys(directory: Path, model: str, new: NewKey | None = None) -> Keys:
    """Make keys in a new directory; `new` (by default a key in a file) signs statements.

    Raise ConfigConflict for an existing directory, EnvironmentFault if the signer fails.
    """
    if directory.exists():
        raise ConfigConflict(
            "the model has keys of evidence; nothing was changed",
            where=str(directory),
            next_step="`sisa keys rotate` replaces the one that signs",
        )
    new = new or new_key()
    log_seed, vrf_secret = os.urandom(KEY_BYTES), os.urandom(KEY_BYTES)
    public = PublicKeys(model, (new.public,), *_derived(model, log_seed, vrf_secret))
    made = {new.file: new.data, LOG_KEY: log_seed, VRF_KEY: vrf_secret}
    made[PUBLIC] = _signed_public_file(public, new.sign)
    files.write_directory(directory, made)
    return read_keys(directory, model)


def read_keys(directory: Path, model: str) -> Keys:
    """Return the keys in a directory. Raise IntegrityError."""
    names = PUBLIC, LOG_KEY, VRF_KEY
    public_file, log_seed, vrf_secret = (_read_file(directory / name) for name in names)
    try:
        public = parse_keys(public_file)
        if public != PublicKeys(model, public.statement_keys, *_derived(model, log_seed, vrf_secret)):
            raise Refused("the keys do not belong together, or to this model")
    except ValueError as error:  # Refused is one
        raise _damaged(directory, str(error)) from None
    key, signer = (directory / f"{public.present.keyid}{each}" for each in (KEY_SUFFIX, SIGNER_SUFFIX))
    uri = _read_file(signer).decode("utf-8", "replace") if signer.exists() and not key.exists() else ""
    return Keys(directory, public, public_file, log_seed, vrf_secret, uri)


def rotate_keys(
    keys: Keys,
    log: Log,
    reason: Reason = "rotated",
    until: int | None = None,
    new: NewKey | None = None,
) -> Keys:
    """Replace the key that signs by `new` (by default one in a file), and log the hand-over.

    Entries before `until` stay valid under a key that is lost or leaked: by default, all of the log. The
    caller holds the writer lock.
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
    new = new or new_key()
    present = replace(new.public, since=since)
    if present.keyid in {key.keyid for key in keys.public.statement_keys}:
        raise InvalidInput("the new key is an old one", got=f"keyid {present.keyid}")
    old = (*keys.public.statement_keys[:-1], replace(keys.present, until=end))
    public = replace(keys.public, statement_keys=(*old, present))
    subject = [{"name": "signing-key", "digest": {"sha256": present.keyid}}]
    named = statement(subject, KEY_HANDOVER, {"reason": reason, "keys": public_body(public)})
    handover = keys.sign(named) if reason == "rotated" else signed_statement(named, present, new.sign)
    public_file = _signed_public_file(public, new.sign)
    files.write_atomic(keys.directory / HANDOVER, handover)
    files.write_atomic(keys.directory / new.file, new.data)
    files.write_atomic(keys.directory / PUBLIC, public_file)
    made = read_keys(keys.directory, keys.model)
    made.settle(log)
    return made


def _signed_public_file(public: PublicKeys, sign: SignBytes) -> bytes:
    payload = rfc8785.dumps(public_body(public))
    return signed_envelope(KEYS_PAYLOAD_TYPE, payload, public.present, sign)


def public_body(public: PublicKeys) -> dict[str, Any]:
    """Return the content of a file of public keys."""
    listed = [asdict(key) | {"public": b64encode(key.public).decode()} for key in public.statement_keys]
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
    return str(NoteKey(origin(model), note.ED25519_TYPE, log)), vrf, der


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
