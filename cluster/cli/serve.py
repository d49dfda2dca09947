"""Serve a model over HTTP (`sisa serve`), manage its tokens (`sisa token`), look at other engines
(`sisa engines`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import command, command_group, log_format_option, model_option, opened
from cluster.render.result import EXIT_ACT, Result, counted
from sisa.core.errors import InvalidInput
from sisa.core.events import Notice

if TYPE_CHECKING:
    from cluster.serve.engines import EngineHolds
    from cluster.serve.tokens import AccessToken, Role, Scope, Tokens

ROLE_NAMES = ("reader", "officer", "operator")
SCOPE_NAMES = ("answer", "read", "submit", "decide", "erase", "access", "operate")

token = command_group("token", "Add, list and revoke tokens of the model's service.")
name_argument = click.argument("name")


@command("serve", "-m model --port 8808")
@model_option
@click.option("--host", help="Address to listen on; by default the run file's.", show_default=False)
@click.option("--port", type=click.IntRange(1, 65_535), help="Port; by default the run file's.")
@click.option(
    "--replicas", "num_replicas", default=1, type=click.IntRange(1, 1000), help="Copies of the model."
)
@click.option("--stop", is_flag=True, help="Stop the service of this model that runs here.")
@click.option("--status", "look", is_flag=True, help="Show whether one runs, and where.")
@log_format_option
def serve(
    directory: Path, host: str | None, port: int | None, num_replicas: int, stop: bool, look: bool
) -> Result:
    """Serve the model over HTTP, by OpenAI's API, until Ctrl-C."""
    from cluster.serve import service
    from cluster.serve.runner import service_runner

    if stop or look:
        found = service.stop_service(directory) if stop else service.find_service(directory)
        state = "stopped" if stop else "running"
        where = {"url": found and found.url, "pid": found and found.pid}
        line = (
            f"{state}: {found.url} (process {found.pid})" if found else "no service of this model runs"
        )
        return Result({state: found is not None, **where}, [line])
    with opened(directory) as model:
        settings = model.config.service
        address = host or settings.host, port or settings.port
        copies = counted(num_replicas, "replica")
        model.report(Notice(f"starting {copies} on Ray Serve"))
        with (
            service.started(directory, model.config, *address, num_replicas) as running,
            service_runner(directory, model.report),
        ):
            line = f"serving {running.url} ({copies}; console: {running.url}/console); Ctrl-C stops it"
            model.report(Notice(line))
            service.wait_until_ended()
        url, pid = running.url, running.pid
    return Result({"url": url, "pid": pid, "replicas": num_replicas}, [f"stopped: {url}"])


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
    help="Allow this alone, of what the role may do. Repeatable.",
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


@command("engines", "-m model --sweep")
@model_option
@click.option("--sweep", is_flag=True, help="First make the engines drop what was erased.")
def show_engines(directory: Path, sweep: bool) -> Result:
    """Show what other engines hold of the exports. Exit with 7 if they hold what was erased."""
    from cluster.serve.engines import engines_hold

    with opened(directory) as model:
        found = engines_hold(model, sweep=sweep)
    lines = [_engine_line(each) for each in found] or ["no engine is named (service.engines)"]
    lines += [f"  erased: {name}" for each in found for name in each.erased]
    body = {"engines": [{**asdict(each), "clean": each.clean} for each in found]}
    return Result(body, lines, 0 if all(each.clean for each in found) else EXIT_ACT)


def _engine_line(found: EngineHolds) -> str:
    if found.fault:
        return f"{found.url}: can't be asked ({found.fault})"
    held = f"{found.url}: holds {counted(len(found.held), 'adapter')}"
    return f"{held}, {len(found.erased)} of them erased; {found.nameless} more without a name"
