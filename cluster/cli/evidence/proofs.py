"""Prove whether the model holds a record, and check it: `sisa prove`, `sisa verify-proof`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import PATH, command, model_option, opened, output_option, record_argument
from cluster.cli.evidence.published import (
    evidence_in,
    keyid_line,
    logged_statements,
    public_keys_option,
    read_public_keys,
)
from cluster.cli.input_files import read_bytes
from cluster.render.result import Result

if TYPE_CHECKING:
    from sisa.verifier.envelope import PublicKeys
    from sisa.verifier.membership import MembershipProof


@command("prove", "p001-q1 -m model -o proof.json")
@record_argument
@model_option
@output_option
def write_proof(record: str, directory: Path, target: Path) -> Result:
    """Prove to a person whether the model holds their record. Write a file."""
    from sisa.evidence.keys.model_keys import keys_of
    from sisa.evidence.open_evidence import membership_file
    from sisa.store.blobs.files import write_atomic
    from sisa.verifier.membership import verify_membership

    with opened(directory) as model:
        data, keys = membership_file(model, record), keys_of(model)
    proof = _proof(verify_membership(data, keys.public))
    write_atomic(target, data)
    return Result({"file": str(target), **proof.json}, [*proof.lines, f"written: {target}"])


@command("verify-proof", "proof.json --key keys.json --log log")
@click.argument("file", type=PATH)
@public_keys_option
@click.option(
    "--log",
    "published_log",
    metavar="DIR|URL",
    help="The published log: check that nothing newer is stated.",
)
def verify_proof_file(file: Path, key_file: Path, published_log: str | None) -> Result:
    """Check offline whether a model holds a record. Exit with 4 if the proof is refused."""
    from sisa.verifier.membership import verify_membership

    public = read_public_keys(key_file)
    data = read_bytes(file)
    with evidence_in(file):
        found = verify_membership(data, public)
    if published_log is not None:
        _check_newest(found, data, public, published_log)
    proof = _proof(found)
    newest = "nothing newer is stated in the log"
    if published_log is None:
        newest = "whether something newer is stated, the published log says: --log"
    body = {"ok": True, "keyid": public.present.keyid, "newest": None if published_log is None else True}
    return Result(body | proof.json, [*proof.lines, f"  {newest}", f"  {keyid_line(public)}"])


def _proof(found: MembershipProof) -> Result:
    state, present = found.state, found.present or {}
    stated = state.statement["predicate"]
    as_of = str(stated.get("issued_at", "an unknown time"))
    where = f"in shard {present['shard']} since {present['since']}" if present else "not in the model"
    body = {
        "id": found.record_id,
        "present": bool(present),
        "shard": present.get("shard"),
        "since": present.get("since"),
        "as_of": as_of,
        "model": stated["model"],
        "root": stated["membership"]["after"],
        "entry": state.index,
        "log_size": state.checkpoint.size,
    }
    lines = [
        f"{found.record_id}: {where}, as served at {as_of}",
        f"  model {stated['model']}, entry {state.index} of a log of {state.checkpoint.size}",
    ]
    return Result(body, lines)


def _check_newest(found: MembershipProof, proof: bytes, keys: PublicKeys, where: str) -> None:
    """Check a whole log. Raise Refused if its newest statement is about other records than the proof."""
    from sisa.verifier.certificate import CHAINED
    from sisa.verifier.envelope import Refused

    _, statements = logged_statements(where, keys, json.loads(json.loads(proof)["state"])["proof"])
    chain = [each for _, each in statements if each["predicateType"] in CHAINED]
    newest, root = chain[-1]["predicate"], found.state.statement["predicate"]["membership"]["after"]
    if newest["membership"]["after"] != root:
        raise Refused(
            "the proof is about an older state than the newest one in the log",
            where=where,
            expected=f"the records of entry {newest['sequence']}",
            got=f"those of entry {found.state.index}",
            next_step="ask the model's owner for a new proof",
        )
