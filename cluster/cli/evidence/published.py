"""Read and check the published files that evidence commands share: public keys, and the log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import PATH
from cluster.cli.input_files import read_bytes

if TYPE_CHECKING:
    from sisa.verifier.envelope import PublicKeys


@contextmanager
def evidence_in(
    file: Path, next_step: str = "get the file again from whoever gave it"
) -> Iterator[None]:
    """Add a file and a next step to a refusal of the verifier that names none."""
    from sisa.verifier.envelope import Refused

    try:
        yield
    except Refused as error:
        error.where = error.where or str(file)
        error.next_step = error.next_step or next_step
        raise


def read_public_keys(file: Path) -> PublicKeys:
    """Read a model's file of public keys. Raise InvalidInput, or Refused."""
    from sisa.verifier.envelope import parse_keys

    with evidence_in(file, "get keys.json, which is published beside the model's log"):
        return parse_keys(read_bytes(file))


@contextmanager
def log_at(where: str) -> Iterator[None]:
    """Add the place of a published log, and a next step, to a refusal that lacks them."""
    from sisa.verifier.envelope import Refused

    try:
        yield
    except Refused as error:
        if not error.where.startswith(where):
            error.where = f"{where}, {error.where}" if error.where else where
        error.next_step = error.next_step or "keep the files: they may be evidence against the log"
        raise


def logged_statements(
    where: str, keys: PublicKeys, proof: str | None = None
) -> tuple[int, list[tuple[str, dict[str, Any]]]]:
    """Check a whole published log; return the number of its entries, and its statements with sha256.

    With the proof of an entry, the log must continue the proof's checkpoint. Raise Refused.
    """
    from sisa.evidence.log.published import check_log, log_reader
    from sisa.verifier.certificate import verify_chain
    from sisa.verifier.note import parse_proof

    read = log_reader(where)
    seen = [] if proof is None else [parse_proof(proof.encode())[2]]
    with log_at(where):
        entries = check_log(read, keys.log, seen=seen)[1]
        return len(entries), list(verify_chain(entries, read, keys))


def keyid_line(keys: PublicKeys) -> str:
    """Return the last keyid of a file of public keys, which shows whose they are."""
    return f"keyid {keys.present.keyid}: compare it with the owner's, from another source than the file"


public_keys_option = click.option(
    "--key", "key_file", required=True, type=PATH, help="The model's public keys."
)
