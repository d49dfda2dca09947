"""Show, check and cosign the transparency log: `sisa log`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from cluster.cli.command import PATH, command, command_group, model_option, opened
from cluster.cli.evidence.published import log_at
from cluster.cli.input_files import read_bytes, read_text
from cluster.render.result import Result
from sisa.core.errors import InvalidInput

log = command_group("log", "Show, check and cosign the transparency log.")
key_option = click.option(
    "--key", "key_file", required=True, type=PATH, help="The model's public keys, or a log's vkey."
)
cosigner_option = click.option(
    "--witness",
    "cosigners",
    multiple=True,
    metavar="VKEY",
    help="A cosigner that must have signed. Repeatable.",
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
@click.option(
    "--seen", type=PATH, multiple=True, help="A checkpoint of this log that you kept. Repeatable."
)
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
        with log_at(where):
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
    "--witness",
    "cosigners",
    multiple=True,
    required=True,
    metavar="VKEY",
    help="Whose signature it is. Repeatable.",
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


@command("add-rebuild", "-m model rebuild.json --public-key rebuild.pub.pem", group=log)
@model_option
@click.argument("file", type=PATH)
@click.option(
    "--public-key",
    required=True,
    type=PATH,
    help="Public key of the second party, in PEM.",
)
def log_rebuild(directory: Path, file: Path, public_key: Path) -> Result:
    """Log what a second party's rebuild found."""
    from sisa.evidence.keys.signing import read_public_key
    from sisa.evidence.rebuild import add_rebuild

    key = read_public_key(public_key)
    with opened(directory) as model:
        index = add_rebuild(model, read_bytes(file), key)
    return Result({"entry": index, "keyid": key.keyid}, [f"entry {index}, signed by {key.keyid}"])
