"""Give evidence of deletions to outsiders: `sisa keys`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.cli.command import PATH, command, command_group, model_option, opened, read_bytes
from cluster.render.render import Result

if TYPE_CHECKING:
    from sisa.evidence.keys import Keys, Reason
    from sisa.model import Model

keys = command_group("keys", "Make, show and rotate the keys that sign evidence of deletions.")


def signer_options(function: Callable[..., Result]) -> Callable[..., Result]:
    """Add `--signer` and `--public-key`."""
    of_signer = click.option(
        "--signer",
        default="",
        show_default=False,
        help="What signs instead of a key file: a URI such as ssh-agent:, hsm: or awskms:KEY.",
    )
    of_key = click.option(
        "--public-key",
        "public_key",
        type=PATH,
        help="Public key of the signer, in PEM or OpenSSH's form.",
    )
    return of_signer(of_key(function))


@command("init", "-m model", group=keys)
@model_option
@signer_options
def make_keys(directory: Path, signer: str, public_key: Path | None) -> Result:
    """Make a model's keys, outside of it. Its deletions are certified from then on."""
    from sisa.evidence.keys import read_public_key, start_evidence

    given = None if public_key is None else read_public_key(public_key)
    with opened(directory) as model:
        return _shown(model, start_evidence(model, signer, given))


@command("show", "-m model", group=keys)
@model_option
def show_keys(directory: Path) -> Result:
    """Show a model's public keys, and where the file is that checks its certificates."""
    from sisa.evidence.keys import keys_of

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
@signer_options
def rotate_key(
    directory: Path, reason: Reason | None, until: int | None, signer: str, public_key: Path | None
) -> Result:
    """Replace the key that signs statements, and log the hand-over."""
    from sisa.evidence.keys import read_public_key, rotate

    if until is not None and reason is None:
        raise click.UsageError("--until needs --lost or --leaked")
    given = None if public_key is None else read_public_key(public_key)
    with opened(directory) as model:
        return _shown(model, rotate(model, reason or "rotated", until, signer, given))


@command("check", "keys.json --trusted older-keys.json --handover statement.json", group=keys)
@click.argument("file", type=PATH)
@click.option("--trusted", required=True, type=PATH, help="Older public keys, which you trust.")
@click.option(
    "--handover", "handovers", multiple=True, type=PATH, help="A logged hand-over; in order. Repeatable."
)
def check_keys(file: Path, trusted: Path, handovers: tuple[Path, ...]) -> Result:
    """Check, without the model, that public keys follow from older ones. Exit with 4 if they do not."""
    from sisa.verifier.certificate import successor
    from sisa.verifier.envelope import Refused, parse_keys

    known = parse_keys(read_bytes(trusted))
    for each in handovers:
        known = successor(known, read_bytes(each))
    keyid = known.certificates[-1].keyid
    if (found := parse_keys(read_bytes(file))) != known:
        raise Refused(
            "the public keys do not follow from the trusted ones",
            where=str(file),
            expected=f"the last key {keyid}",
            got=f"the last key {found.certificates[-1].keyid}",
            next_step="give the hand-over of each rotation; that of a lost or leaked key shows nothing: "
            "ask the model's owner for the present keyid",
        )
    line = f"the keys follow from the trusted ones; the last key is {keyid}"
    return Result(
        {"ok": True, "model": known.model, "keyid": keyid, "handovers": len(handovers)}, [line]
    )


def _shown(model: Model, found: Keys) -> Result:
    from sisa.evidence.keys import PUBLIC, PUBLISHED, handovers, log_blobs, public_body

    body, blobs = public_body(found.public), log_blobs(model)
    places = {
        "directory": str(found.directory),
        "public_keys": str(found.directory / PUBLIC),
        "published": blobs.location(PUBLISHED),
        "handovers": handovers(found, blobs),
    }
    lines = [
        f"signs     {found.signer or 'a key file'}, in {found.directory}",
        *(
            f"key       {each.keyid}, {each.scheme}, entries from {each.since} "
            + ("on" if each.until is None else f"to {each.until - 1}")
            for each in found.public.certificates
        ),
        f"log       {found.public.log}",
        f"VRF       {found.public.vrf.hex()}",
        *(f"hand-over {each}" for each in places["handovers"]),
        f"published {places['published']}: certificates are checked with this file",
        "Tell the last key's id to whoever checks them, on another way than the file. Back the keys up.",
    ]
    named = {"signer": found.signer or None, "keyid": found.present.keyid}
    return Result({**places, **named, **body}, lines)
