"""Give evidence to outsiders: `sisa keys`, `sisa log`, `sisa prove`, `sisa verify-proof`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import (
    PATH,
    command,
    command_group,
    evidence_in,
    logged_statements,
    model_option,
    opened,
    output_option,
    public_keys_option,
    read_bytes,
    read_public_keys,
    read_text,
    record_argument,
)
from cluster.render.render import Result
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from sisa.evidence.keys.keys import Keys, Reason
    from sisa.model import Model
    from sisa.verifier.envelope import CertificateKey, PublicKeys
    from sisa.verifier.membership import MembershipProof

keys = command_group("keys", "Make, show and rotate the keys that sign evidence.")


signer_option = click.option(
    "--signer",
    default="",
    show_default=False,
    help="What signs instead of a key file: a URI such as ssh-agent:, hsm: or awskms:KEY.",
)
public_key_option = click.option(
    "--public-key", type=PATH, help="Public key of the signer, in PEM or OpenSSH's form."
)


@command("init", "-m model", group=keys)
@model_option
@signer_option
@public_key_option
def make_keys(directory: Path, signer: str, public_key: Path | None) -> Result:
    """Make a model's keys, outside of it. Its deletions are certified from then on."""
    from sisa.evidence.issued import state_what_is_held
    from sisa.evidence.keys.model_keys import start_evidence
    from sisa.evidence.keys.signing import read_public_key

    given = None if public_key is None else read_public_key(public_key)
    with opened(directory) as model:
        made = start_evidence(model, signer, given)
        state_what_is_held(model)
        return _shown(model, made)


@command("show", "-m model", group=keys)
@model_option
def show_keys(directory: Path) -> Result:
    """Show a model's public keys, and where their file is."""
    from sisa.evidence.keys.model_keys import keys_of

    with opened(directory) as model:
        return _shown(model, keys_of(model))


@command("rotate", "-m model", group=keys)
@model_option
@click.option("--lost", "reason", flag_value="lost", help="The old key is lost: it signs no hand-over.")
@click.option(
    "--leaked", "reason", flag_value="leaked", help="Others may have the old key: it signs no hand-over."
)
@click.option(
    "--until",
    type=click.IntRange(0),
    help="With --lost or --leaked: the first entry of the log that the old key may not have signed.",
)
@signer_option
@public_key_option
def rotate_key(
    directory: Path, reason: Reason | None, until: int | None, signer: str, public_key: Path | None
) -> Result:
    """Replace the key that signs statements, and log the hand-over."""
    from sisa.evidence.keys.model_keys import rotate
    from sisa.evidence.keys.signing import read_public_key

    if until is not None and reason is None:
        raise click.UsageError("--until needs --lost or --leaked")
    given = None if public_key is None else read_public_key(public_key)
    with opened(directory) as model:
        return _shown(model, rotate(model, reason or "rotated", until, signer, given))


@command("check", "keys.json --trusted older-keys.json --log model/log", group=keys)
@click.argument("file", type=PATH)
@click.option("--trusted", required=True, type=PATH, help="Older public keys, which you trust.")
@click.option("--log", "where", help="The log, a directory or a URL: follow the hand-overs in it.")
def check_keys(file: Path, trusted: Path, where: str | None) -> Result:
    """Check, without the model, that public keys follow from older ones. Exit with 4 if they do not."""
    from sisa.evidence.log.published import check_log, follow, log_reader
    from sisa.verifier.envelope import Refused

    known, found = (read_public_keys(each) for each in (trusted, file))
    if where is not None:
        read = log_reader(where)
        known = follow(known, check_log(read, known.log)[1], read)
    keyid = known.certificates[-1].keyid
    if found != known:
        raise Refused(
            "the public keys do not follow from the trusted ones",
            where=str(file),
            expected=f"the last key {keyid}",
            got=f"the last key {found.certificates[-1].keyid}",
            next_step="give --log; or ask the owner for the present keyid through another channel",
        )
    body = {"ok": True, "model": known.model, "keyid": keyid, "num_keys": len(known.certificates)}
    return Result(body, [f"the keys follow from the trusted ones; the last key is {keyid}"])


def _time_of(key: CertificateKey) -> str:
    if key.until is None:
        return f"entries from {key.since} on"
    return f"entries {key.since} to {key.until - 1}" if key.since < key.until else "no entries"


def _shown(model: Model, found: Keys) -> Result:
    from sisa.evidence.keys.keys import PUBLIC, public_body
    from sisa.evidence.keys.model_keys import PUBLISHED, log_blobs

    body, blobs = public_body(found.public), log_blobs(model)
    places = {
        "directory": str(found.directory),
        "public_keys": str(found.directory / PUBLIC),
        "published": blobs.location(PUBLISHED),
    }
    lines = [
        f"signs     {found.signer or 'a key file'}, in {found.directory}",
        *(
            f"key       {each.keyid}, {each.scheme}, {_time_of(each)}"
            for each in found.public.certificates
        ),
        f"log       {found.public.log}",
        f"VRF       {found.public.vrf.hex()}",
        f"published {places['published']}: certificates are checked with this file",
        "Give the last key's id to whoever checks them, but not with the file. Back the keys up.",
    ]
    named = {"signer": found.signer or None, "keyid": found.present.keyid}
    return Result({**places, **named, **body}, lines)


log = command_group("log", "Show, check and cosign the transparency log.")
key_option = click.option(
    "--key", "key_file", required=True, type=PATH, help="The model's public keys, or a log's vkey."
)
cosigner_option = click.option(
    "--witness", "cosigners", multiple=True, metavar="VKEY", help="A cosigner that must have signed."
)


def _entries(number: int) -> str:
    return f"{number:,} {'entry' if number == 1 else 'entries'}"


def log_vkey(key_file: Path) -> str:
    """Return the log's vkey from a file: a file of public keys, or one that holds the vkey alone."""
    from sisa.verifier.envelope import parse_keys
    from sisa.verifier.note import parse_vkey

    data = read_bytes(key_file)
    if data.lstrip()[:1] == b"{":
        return parse_keys(data).log
    return str(parse_vkey(data.decode(errors="replace").strip()))


@command("show", "-m model", group=log)
@model_option
@click.option("--last", "num_last", default=10, type=click.IntRange(0), help="Entries to list.")
def show_log(directory: Path, num_last: int) -> Result:
    """Show the checkpoint, its cosigners and the last entries."""
    from sisa.evidence.keys.model_keys import log_blobs, log_of

    with opened(directory) as model:
        found, where = log_of(model), log_blobs(model).location()
        now, cosigners = found.checkpoint, found.cosigners()
        entries = list(found.entries(max(0, now.size - num_last)))
    body = {
        "origin": found.key.name,
        "vkey": str(found.key),
        "location": where,
        "size": now.size,
        "root": now.root.hex(),
        "cosigned": [{"name": name, "at": _instant(at)} for name, at in cosigners],
        "entries": [{"index": e.index, "type": e.predicate_type, "sha256": e.sha256} for e in entries],
    }
    lines = [
        f"{found.key.name}: {_entries(now.size)}, in {where}",
        f"root  {now.root.hex()}",
        f"key   {found.key}",
        *(f"cosigned by {name} at {_instant(at)}" for name, at in cosigners),
        *(f"{each.index:6}  {each.sha256}  {each.predicate_type}" for each in entries),
    ]
    return Result(body, lines)


def _instant(seconds: int) -> str:
    """Return a time in ISO 8601; a cosigner may have signed one that is out of range."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s since 1970"


@command("check", "https://example.com/log --key keys.json --seen checkpoint-of-may", group=log)
@click.argument("where", required=False)
@click.option("-m", "--model", "directory", type=PATH, help="Check this model's own log instead.")
@click.option("--key", "key_file", type=PATH, help="The model's public keys, or a log's vkey.")
@cosigner_option
@click.option("--seen", type=PATH, multiple=True, help="A checkpoint of this log that you kept.")
def check_log_command(
    where: str | None,
    directory: Path | None,
    key_file: Path | None,
    cosigners: tuple[str, ...],
    seen: tuple[Path, ...],
) -> Result:
    """Check a whole log, in a directory or at a URL.

    It checks signatures, entries and tiles, and that the log continues every checkpoint that was seen.
    """
    from sisa.evidence.log.published import check_log, log_reader

    kept = [read_bytes(each) for each in seen]
    if directory is not None and where is None and key_file is None:
        from sisa.evidence.keys.model_keys import log_of

        with opened(directory) as model:
            now = log_of(model).check(cosigners, kept)
    elif where is not None and key_file is not None and directory is None:
        now, _ = check_log(log_reader(where), log_vkey(key_file), cosigners, kept)
    else:
        raise click.UsageError("give a directory or a URL with --key, or -m alone")
    body = {"ok": True, "origin": now.origin, "size": now.size, "root": now.root.hex()}
    lines = [f"{now.origin}: {_entries(now.size)}, all as its checkpoint says"]
    lines += [f"continues {each}" for each in seen]
    lines += [f"cosigned by {each.partition('+')[0]}" for each in cosigners]
    return Result(body | {"seen": len(seen), "witnesses": len(cosigners)}, lines)


@command("proof", "-m model 3 > entry-3.tlog-proof", group=log)
@model_option
@click.argument("index", type=click.IntRange(0))
def prove_entry(directory: Path, index: int) -> Result:
    """Print the proof of an entry, as a .tlog-proof file."""
    from sisa.evidence.keys.model_keys import log_of

    with opened(directory) as model:
        text = log_of(model).proof(index).decode()
    return Result({"index": index, "proof": text}, text.removesuffix("\n").split("\n"))


@command("request", "-m model --old 12 > request", group=log)
@model_option
@click.option("--old", default=0, type=click.IntRange(0), help="Entries that the cosigner has seen.")
def request_cosignature(directory: Path, old: int) -> Result:
    """Print what asks a cosigner to sign the checkpoint.

    It has the form of C2SP's tlog-witness, add-checkpoint, and is a file for `sisa log cosign`.
    """
    from sisa.evidence.keys.model_keys import log_of

    with opened(directory) as model:
        text = log_of(model).request(old).decode()
    return Result({"old": old, "request": text}, text.removesuffix("\n").split("\n"))


@command("witness-key", "witness.example.com/w1 witness.key", group=log)
@click.argument("name")
@click.argument("file", type=PATH)
def make_witness_key(name: str, file: Path) -> Result:
    """Make a cosigner's key in a new file. Print its vkey.

    NAME is a URL without its scheme.
    """
    from sisa.evidence.log.cosigning import new_cosigner_key
    from sisa.store.blobs.files import write_atomic

    if file.exists():
        raise InvalidInput("the file exists", where=str(file), next_step="name a new file")
    private, vkey = new_cosigner_key(name)
    write_atomic(file, f"{private}\n".encode())
    return Result({"name": name, "key_file": str(file), "vkey": vkey}, [vkey])


@command("cosign", "URL --key keys.json --witness-key witness.key --state witness.state", group=log)
@click.argument("where")
@key_option
@click.option("--witness-key", required=True, type=PATH, help="The cosigner's key.")
@click.option(
    "--state", required=True, type=PATH, help="The cosigner's file for this log: what it signed last."
)
def cosign_log(where: str, key_file: Path, witness_key: Path, state: Path) -> Result:
    """Cosign a log's checkpoint.

    It must continue the one that was signed before. WHERE is the log's directory or URL, a file that
    `sisa log request` printed or, at first, a checkpoint. The line of the signature is printed: the
    operator adds it by `sisa log add-cosignature`.
    """
    from sisa.evidence.log.cosigning import cosign
    from sisa.evidence.log.published import log_reader

    vkey, private = log_vkey(key_file), read_text(witness_key)
    seen, now, line = cosign(log_reader(where), vkey, private, state)
    body = {"origin": now.origin, "size": now.size, "root": now.root.hex(), "seen_size": seen.size}
    return Result(body | {"cosignature": line.decode()}, [line.decode().removesuffix("\n")])


@command("add-cosignature", "-m model cosignature --witness VKEY", group=log)
@model_option
@click.argument("file", type=PATH)
@click.option(
    "--witness", "cosigners", multiple=True, required=True, metavar="VKEY", help="Whose signature it is."
)
def add_cosignature(directory: Path, file: Path, cosigners: tuple[str, ...]) -> Result:
    """Add a cosigner's signature to the checkpoint.

    FILE has the line of the signature, or the whole note.
    """
    from sisa.evidence.keys.model_keys import log_of

    given = read_bytes(file)
    with opened(directory) as model, model.locked():
        found = log_of(model)
        now = found.add_cosignatures(given, cosigners)
        names = [name for name, _ in found.cosigners()]
    body = {"size": now.size, "root": now.root.hex(), "cosigned": names}
    return Result(body, [f"{_entries(now.size)}, cosigned by {', '.join(names)}"])


@command("prove", "p001-q1 -m model -o proof.json")
@record_argument
@model_option
@output_option
def write_proof(record: str, directory: Path, target: Path) -> Result:
    """Prove to a person whether the model holds their record. Write a file."""
    from sisa.evidence.issued import membership_file
    from sisa.evidence.keys.model_keys import keys_of
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
    body = {"ok": True, "newest": None if published_log is None else True}
    return Result(body | proof.json, [*proof.lines, f"  {newest}"])


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
