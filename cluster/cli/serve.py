"""Say who may call a model's service: `sisa token`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import command, command_group, model_option, opened
from cluster.render.render import Result
from sisa.core.errors import InvalidInput

if TYPE_CHECKING:
    from cluster.serve.tokens import AccessToken, Role, Scope, Tokens

ROLE_NAMES = ("reader", "officer", "operator")
SCOPE_NAMES = ("answer", "read", "submit", "decide", "erase", "access", "operate")

token = command_group("token", "Tokens of the model's service: who may call it, and what for.")
name_argument = click.argument("name")


def _numbers(_context: click.Context, _option: click.Parameter, given: Any) -> list[int] | None:
    """Parse `0,3`."""
    if given is None:
        return None
    if not all(each.strip().isdecimal() for each in given.split(",")):
        raise click.BadParameter("expected numbers of shards, such as 0,3")
    return sorted({int(each) for each in given.split(",")})


@command("add", "-m model anna --role officer", group=token)
@model_option
@name_argument
@click.option("--role", required=True, type=click.Choice(ROLE_NAMES), help="What the token is for.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPE_NAMES),
    help="Allow this alone, of what the role may do; may be repeated.",
)
@click.option("--shards", callback=_numbers, metavar="N,N", help="Show these shards' records alone.")
@click.option("--days", default=90, type=click.IntRange(1, 3660), help="Days until it expires.")
def add_token(
    directory: Path,
    name: str,
    role: Role,
    scopes: tuple[Scope, ...],
    shards: list[int] | None,
    days: int,
) -> Result:
    """Make a token in a person's or a program's name, and show it once."""
    with opened(directory) as model:
        num_shards = model.config.sisa.shards
        if shards and shards[-1] >= num_shards:
            raise InvalidInput(
                "the model has no such shard", expected=f"0 to {num_shards - 1}", got=str(shards[-1])
            )
        partition = model.partition
        made, text = _tokens(directory).add(
            name, role, scopes=scopes, shards=shards, partition=partition, days=days
        )
    lines = [
        f"token     {text}",
        _line(made, "active"),
        "It is shown this once: keep it where secrets are.",
    ]
    return Result({**_body(made, "active"), "token": text}, lines)


@command("list", "-m model", group=token)
@model_option
def list_tokens(directory: Path) -> Result:
    """List all tokens without their texts: name, role, scopes, shards, expiry."""
    with opened(directory):
        found = _tokens(directory).listed()
    body = {"tokens": [_body(each, state) for each, state in found]}
    return Result(body, [_line(each, state) for each, state in found] or ["no tokens"])


@command("revoke", "-m model anna", group=token)
@model_option
@name_argument
def revoke_token(directory: Path, name: str) -> Result:
    """End a token at once, in a running service as well."""
    with opened(directory):
        ended = _tokens(directory).revoke(name)
    return Result(_body(ended, "revoked"), [_line(ended, "revoked")])


def _tokens(directory: Path) -> Tokens:
    from cluster.serve.tokens import Tokens

    return Tokens(directory)


def _body(found: AccessToken, state: str) -> dict[str, Any]:
    return {**found.model_dump(mode="json", exclude={"sha256", "partition"}), "state": state}


def _line(found: AccessToken, state: str) -> str:
    shards = "" if found.shards is None else f", shards {', '.join(map(str, found.shards))} alone"
    until = f"until {found.expires_at}" if found.revoked_at is None else f"since {found.revoked_at}"
    return f"{found.name:<9} {found.role} ({', '.join(found.scopes)}){shards}, {state} {until}"
