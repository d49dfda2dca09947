"""Cosign the checkpoints of somebody else's log, as what C2SP calls a witness (`tlog-cosignature`)."""

from __future__ import annotations

import re
import time
from base64 import b64decode
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sisa.core.errors import InvalidInput
from sisa.evidence.log.tiles import CHECKPOINT, NO_ENTRIES, Read, Tiles, signature_line
from sisa.store.blobs import files
from sisa.verifier import merkle, note
from sisa.verifier.envelope import Refused, base64_bytes
from sisa.verifier.note import COSIGNATURE_TYPE, ED25519_TYPE, Checkpoint, NoteKey

PRIVATE = "PRIVATE+KEY"
_PRIVATE = re.compile(r"PRIVATE\+KEY\+([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]{44})")
_REQUEST = re.compile(rb"old (?:0|[1-9][0-9]{0,17})(?:\n[A-Za-z0-9+/=]{44}){0,63}")


def new_cosigner_key(name: str) -> tuple[str, str]:
    """Return a new key of a cosigner, as Go's `note.GenerateKey` writes it, and its vkey."""
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    id_ = NoteKey(name, ED25519_TYPE, public).id.hex()
    data = note.b64(bytes([ED25519_TYPE]) + private.private_bytes_raw())
    vkey = str(NoteKey(name, COSIGNATURE_TYPE, public))
    note.parse_vkey(vkey)  # refuses a name that a note can't hold
    return f"{PRIVATE}+{name}+{id_}+{data}", vkey


def parse_cosigner_key(text: str) -> tuple[NoteKey, Ed25519PrivateKey]:
    """Return the public and the private key of a cosigner. Raise InvalidInput."""
    found = _PRIVATE.fullmatch(text)
    data = b64decode(found[3]) if found else b"\x00"
    if found and data[0] == ED25519_TYPE:
        private = Ed25519PrivateKey.from_private_bytes(data[1:])
        public = private.public_key().public_bytes_raw()
        if NoteKey(found[1], ED25519_TYPE, public).id.hex() == found[2]:
            return NoteKey(found[1], COSIGNATURE_TYPE, public), private
    raise InvalidInput(
        "the cosigner's key can't be read",
        expected=f"{PRIVATE}+NAME+ID+KEY, of Ed25519",
        next_step="make one with `sisa log witness-key`",
    )


def _parse_request(data: bytes) -> tuple[bytes, list[bytes] | None]:
    """Return the checkpoint of a request and its proof of consistency, or a checkpoint without one."""
    head, _, checkpoint = data.partition(b"\n\n")
    if not _REQUEST.fullmatch(head):
        return data, None
    return checkpoint, [base64_bytes(each, "a hash") for each in head.decode().split("\n")[1:]]


def cosign(
    read: Read, log_vkey: str, private: str, state: Path, now: float | None = None
) -> tuple[Checkpoint, Checkpoint, bytes]:
    """Cosign a log's checkpoint; return the one seen before, this one, and the line of the signature.

    In place of the checkpoint, `read` may return a request. `state` is the cosigner's own file, the
    checkpoint that it signed last; it is replaced before the line is returned. Raise Refused or
    IntegrityError if the log does not continue that one.
    """
    key, signer = parse_cosigner_key(private.strip())
    signed, proof = _parse_request(read(CHECKPOINT))
    checkpoint = note.open_checkpoint(signed, log_vkey)
    files.make_directory(state.absolute().parent)
    with files.opened_directory(state.absolute().parent) as handle:
        files.take_lock(handle, state, "cosigns with a state in this directory")
        seen = NO_ENTRIES
        if state.exists():
            seen = note.open_checkpoint(files.read_whole(state, "checkpoint"), log_vkey)
        try:
            if proof is None:
                Tiles(read, checkpoint.size).check_follows(seen, checkpoint)
            else:
                merkle.verify_consistency(seen.size, checkpoint.size, proof, seen.root, checkpoint.root)
        except Refused as error:
            raise Refused(
                "the log does not continue the checkpoint that this cosigner signed last",
                where=str(state),
                expected=f"{seen.size} entries with the root {seen.root.hex()}, and more",
                got=f"{checkpoint.size} entries with the root {checkpoint.root.hex()}: {error.what}",
                next_step="if it is no older copy of the log, keep both checkpoints: they are evidence",
            ) from error
        files.write_atomic(state, signed)
    at = int(time.time() if now is None else now)
    made = key.id + at.to_bytes(8) + signer.sign(note.cosigned(note.split_note(signed)[0], at))
    return seen, checkpoint, signature_line(key.name, made)
