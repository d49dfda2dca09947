"""Make, show, rotate and check the keys that sign evidence: `sisa keys`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import PATH, command, command_group, model_option, opened
from cluster.cli.evidence.published import log_at, read_public_keys
from cluster.render.result import Result

if TYPE_CHECKING:
    from sisa.evidence.keys.keys import Keys, Reason
    from sisa.model import Model
    from sisa.verifier.envelope import StatementKey


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
    from sisa.evidence.keys.model_keys import start_evidence
    from sisa.evidence.keys.signing import read_public_key
    from sisa.evidence.open_evidence import state_what_is_held

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
        with log_at(where):
            known = follow(known, check_log(read, known.log)[1], read)
    keyid = known.present.keyid
    if found != known:
        raise Refused(
            "the public keys do not follow from the trusted ones",
            where=str(file),
            expected=f"the last key {keyid}",
            got=f"the last key {found.present.keyid}",
            next_step="give --log; or ask the owner for the present keyid through another channel",
        )
    body = {"ok": True, "model": known.model, "keyid": keyid, "num_keys": len(known.statement_keys)}
    return Result(body, [f"the keys follow from the trusted ones; the last key is {keyid}"])


def _time_of(key: StatementKey) -> str:
    if key.until is None:
        return f"entries from {key.since} on"
    return f"entries {key.since} to {key.until - 1}" if key.since < key.until else "no entries"


def _shown(model: Model, found: Keys) -> Result:
    from sisa.evidence.keys.keys import PUBLIC, public_body
    from sisa.evidence.keys.model_keys import PUBLIC_KEYS, log_blobs

    body, blobs = public_body(found.public), log_blobs(model)
    places = {
        "directory": str(found.directory),
        "public_keys": str(found.directory / PUBLIC),
        "published": blobs.location(PUBLIC_KEYS),
    }
    lines = [
        f"signs     {found.signer or 'a key file'}, in {found.directory}",
        *(
            f"key       {each.keyid}, {each.scheme}, {_time_of(each)}"
            for each in found.public.statement_keys
        ),
        f"log       {found.public.log}",
        f"VRF       {found.public.vrf.hex()}",
        f"published {places['published']}: certificates are checked with this file",
        "Give the last key's id to whoever checks them, but not with the file. Back the keys up.",
    ]
    named = {"signer": found.signer or None, "keyid": found.present.keyid}
    return Result({**places, **named, **body}, lines)
