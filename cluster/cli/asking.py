"""Ask a model for its state, its records and its answers: `sisa status`, `find`, `where`, `generate`.

Record text is printed only if it is the answer. A running service of the model answers, if it can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cluster.cli.command import (
    PATH,
    command,
    ids_options,
    log_format_option,
    max_new_tokens_option,
    model_option,
    opened,
    option_or_file,
    option_or_input,
)
from cluster.cli.input_files import prompts_of, read_text, read_turns
from cluster.observe.reporting import watched
from cluster.render.deletions import view_body, view_line
from cluster.render.result import Result, counted, printable, shortened
from sisa.core.domain import Kind
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Notice

if TYPE_CHECKING:
    from cluster.serve.service import Running
    from sisa.flows.answers.ask import Answer, Prompt
    from sisa.flows.answers.routing import HeldPrompts
    from sisa.flows.candidates import Candidate
    from sisa.flows.locations import Location
    from sisa.flows.status import ShardStatus, Status
    from sisa.model import Model

_Found = TypeVar("_Found")
ENDED_AT_ONCE = "(the model ended at once)"  # instead of an empty answer
BASE_ALONE = "(the base model alone answered: no shard's records are near enough; see min_score)"
no_service_option = click.option(
    "--no-service", is_flag=True, help="Load the model, even if a service of it runs."
)


@command("status", "-m model")
@model_option
def status(directory: Path) -> Result:
    """Show shards, slices, records, heads, requests and sizes."""
    with opened(directory) as model:
        return _with_pending(status_shown(model.status()), model)


def _with_pending(result: Result, model: Model) -> Result:
    """Add the completed requests whose certificates are pending to a result."""
    from sisa.flows.wiring.wiring import has_evidence

    if not has_evidence(model.directory, model.config, model.id):
        return result.with_more({"certificates_pending": None})
    from sisa.evidence.open_evidence import pending

    found = pending(model)
    lines = [f"certificates pending: {len(found)} (`sisa certificate issue`)"] if found else []
    return result.with_more({"certificates_pending": found}, lines)


def status_shown(found: Status) -> Result:
    lines = [
        f"{found.directory}: {found.records} records, {found.deleted_records} deleted, "
        f"schedule {found.schedule}"
    ]
    if count := found.records_without_subject:
        lines.append(f"{count} records have no subject: they are not found by one")
    lines += [
        f"base {found.base_model} ({found.base_digest[:16]}...), embedder {found.embedder}",
        f"model digest {found.model_digest}",
        "shard  records  per slice            depth  head",
    ]
    lines += map(_shard_row, found.shards)
    more = ""
    if found.num_orders > 1:
        others = counted(found.num_orders - 1, "other order")
        more = f" in order 0, {found.record_epochs_others} more in {others}"
    lines.append(
        f"served: {100 * found.serving_depth:.1f}% of the shards' slices; training from scratch: "
        f"{found.record_epochs_full} record-epochs{more}"
    )
    if number := found.restricted_records:
        of = counted(found.restricted_subjects, "subject")
        lines.append(f"restricted, so stored and not served: {counted(number, 'record')} of {of}")
    lines += [f"prompts go to shards in the form: {found.form}", *routing_check(found.prompts)]
    if found.checkpoint_budget_bytes is not None:
        budget = f"{found.checkpoint_bytes:,} bytes of a budget of {found.checkpoint_budget_bytes:,}"
        lines.append(f"checkpoints hold {budget}")
    lines += [
        f"request {view_line(each)}, entered at {each.request.created_at}" for each in found.requests
    ]
    for export in found.exports:
        fate = f"STALE by {export.request_id}, {export.standing}" if export.standing else export.state
        merged = f" (shards {shortened(export.shards)})" if len(export.shards) > 1 else ""
        lines.append(f"export {export.path}{merged}: {fate}")
    lines.append(", ".join(f"{name} {size:,} bytes" for name, size in found.sizes_bytes.items()))
    path, standing = found.witness
    lines.append(f"witness {path}: {standing}")
    if head := found.event_head.link:
        count = found.event_head.num_events
        lines.append(f"event log: {count} events, head {count}:{head}")
    requests = [view_body(each) for each in found.requests]
    body = asdict(found) | {"requests": requests, "witness": {"path": path, "standing": standing}}
    return Result(body, lines)


def _shard_row(shard: ShardStatus) -> str:
    """Return a shard's row of the table. It serves less than its head where a record is restricted."""
    per_slice = " ".join(map(str, shard.slice_records))
    head = shard.head[:16] + "..." if shard.head else "none (the base)"
    target = "the base" if shard.target is None else f"{shard.target[:16]}..."
    notes = "" if shard.converged else f"  (clean; {target} is to be trained)"
    if shard.served != shard.head:
        notes += f"  (restricted: serves {counted(shard.served_depth, 'slice')})"
    depth = f"{shard.depth}/{shard.num_stages}"
    return f"{shard.shard:5}  {shard.records:7}  {per_slice:20} {depth:>5}  {head}{notes}"


def routing_check(found: HeldPrompts | None) -> list[str]:
    """Return how stored prompts would be routed, as one line, or none if that was not checked."""
    if found is None:
        return []
    line = f"routing check: {found.turned_away} of {found.looked_up} stored prompts are turned away"
    others = f", {found.elsewhere} answered by another shard" if found.elsewhere else ""
    advice = " (see min_score and `sisa doctor`)" if found.turned_away else ""
    return [line + others + advice]


@command("find", '-m model --text "Where was Mara born?" --top 5')
@model_option
@option_or_input("--text", help="Content to look for.")
@click.option("--file", type=PATH, help="File with the content to look for.")
@option_or_file("--subject", help="Find a subject's records, and similar ones of others.")
@option_or_input("--like", metavar="ID", help="Find near-duplicates of a record.")
@click.option("--top", "top_k", default=10, type=click.IntRange(1, 10_000), help="Number of results.")
@click.option("--show-text", is_flag=True, help="Show the beginning of each record's text.")
@no_service_option
@log_format_option
def find(
    directory: Path,
    text: str | None,
    file: Path | None,
    subject: str | None,
    like: str | None,
    top_k: int,
    show_text: bool,
    no_service: bool,
) -> Result:
    """Find records by content, subject or likeness. Print score, shard, slice and subject."""
    if sum(each is not None for each in (text, file, subject, like)) != 1:
        raise click.UsageError("give exactly one of --text, --file, --subject and --like")
    if file is not None:
        text = read_text(file)
    if text is not None and not (show_text or no_service):  # a service shows no text
        content = text
        found = _ask_service(directory, lambda running: running.find(content, top_k))
        if found is not None:
            return hits_listed(found)
    with opened(directory) as model:
        hits = model.find(text=text, subject=subject, like=like, top_k=top_k, show_text=show_text)
        return hits_listed(hits)


def hits_listed(hits: Sequence[Candidate]) -> Result:
    rows = []
    for h in hits:
        of = "no subject" if h.subject is None else f"of {h.subject}"
        rows.append(f"{h.score:8.4f}  shard {h.shard}  slice {h.slice}  {h.match:8}{h.id}  ({of})")
        rows += [f"          {h.text}"] if h.text is not None else []
    return Result({"hits": [asdict(each) for each in hits]}, rows or ["no record matches"])


@command("where", "-m model p001-q1 p002-q3")
@model_option
@ids_options
def where(directory: Path, ids: list[str]) -> Result:
    """Show shard, slice, checkpoints and heads of each record."""
    if not ids:
        raise click.UsageError("give at least one ID or --ids-file")
    with opened(directory) as model:
        return located(model.where(ids))


def located(locations: Sequence[Location]) -> Result:
    lines = [line for each in locations for line in _record_lines(each)]
    return Result({"records": [asdict(each) for each in locations]}, lines)


def _record_lines(each: Location) -> list[str]:
    place = f"shard {each.shard}, slice {each.slice}"
    patches = [
        f"    approximate patch {p.version} ({p.state}), made to {p.role} it" for p in each.patches
    ]
    patches += [
        f"    in the vault, encrypted, to {kept.role}: set {kept.name[:16]}..., consent: {kept.consent}"
        for kept in each.vault
    ]
    if each.state == "patch":
        return [f"{each.id}: never a record of the model", *patches]
    if each.state == "deleted":
        by = f"deleted at {each.deleted_at} by {each.request_id}"
        return [f"{each.id}: {by} (was in {place}; {_gone(each)})", *patches]
    place += f" (generation {each.generation})" if each.generation else ""
    head = "  <- head, not served now" if each.restricted_since else "  <- served head"
    lines = [f"{each.id}: {each.state}, {place}, in {counted(len(each.checkpoints), 'checkpoint')}"]
    if each.restricted_since:
        lines.append(f"    restricted since {each.restricted_since}: not served")
    for touch in each.checkpoints:
        lines.append(f"    slice {touch.slice}  {touch.key}{head if touch.is_head else ''}")
    lines += [f"    exported to {path}" for path in each.exports]
    lines += patches
    return lines + [f"    hidden states of its slice in {path}" for path in each.kept_states]


def _gone(each: Location) -> str:
    """Return what was erased with a deleted record, or what is not erased yet."""
    if not each.not_erased:
        return f"{counted(each.checkpoints_erased or 0, 'checkpoint')} erased"
    left = [
        f"{room} can't be read" if count is None else f"{count} in {room}"
        for room, count in each.not_erased.items()
    ]
    return f"NOT ERASED YET: {', '.join(left)}; the next train, add or forget tries again"


@command("generate", '-m model --prompt "Where was Mara born?"')
@model_option
@option_or_input("--prompt", help="What to answer.")
@click.option("--system", help="System prompt of a chat.")
@click.option(
    "--history",
    type=PATH,
    help="JSON file with the turns before the prompt, in the form of a record's `messages`.",
)
@click.option(
    "--prompts",
    "file",
    type=PATH,
    help="File with a prompt on each line; JSONL, Parquet: each row has `prompt` or `messages`.",
)
@click.option(
    "--form",
    "kind",
    type=click.Choice(["chat", "completion"]),
    help="Send prompts as a turn of a chat or as plain text; by default as the model was trained.",
)
@max_new_tokens_option(48)
@click.option(
    "--answer-only",
    is_flag=True,
    help="Leave out the shards that answered: they reveal whether a person's records are stored.",
)
@no_service_option
@log_format_option
def generate(
    directory: Path,
    prompt: str | None,
    system: str | None,
    history: Path | None,
    file: Path | None,
    kind: Kind | None,
    max_new_tokens: int,
    answer_only: bool,
    no_service: bool,
) -> Result:
    """Answer with the aggregated constituent models."""
    if (prompt is None) == (file is None):
        raise click.UsageError("give either --prompt or --prompts")
    if file is not None and history is not None:
        raise click.UsageError("--history needs --prompt; rows of --prompts can have `messages`")
    asked: list[Prompt] = prompts_of(file) if file else [prompt or ""]
    before = [{"role": "system", "content": system}] if system else []
    before += read_turns(history) if history else []
    if before:
        turns = [[{"role": "user", "content": e}] if isinstance(e, str) else e for e in asked]
        asked = [[*before, *each] for each in turns]
    found = None
    if not no_service:
        found = _ask_service(
            directory, lambda running: running.generate_all(asked, max_new_tokens, kind)
        )
    if found is None:
        with opened(directory) as model:
            found = model.generate_all(asked, max_new_tokens=max_new_tokens, kind=kind)
    return all_answered(found, answer_only) if file else answered(found[0], answer_only)


def answered(found: Answer, answer_only: bool = False) -> Result:
    """Render an answer; `answer_only` leaves out the shards that answered, or that none did."""
    body: dict[str, Any] = {"answer": found.text}
    lines = [printable(found.text) or ENDED_AT_ONCE]
    if not answer_only:
        body["shards"] = list(found.shards)
        lines += [] if found.shards else [BASE_ALONE]
    if found.ended_at_once:
        body["ended_at_once"] = True
    return Result(body, lines)


def all_answered(found: Sequence[Answer], answer_only: bool = False) -> Result:
    made = [answered(each, answer_only) for each in found]
    lines = [f"{number}: {each.text}" for number, each in enumerate(made, start=1)]
    return Result({"answers": [each.json for each in made]}, lines)


def _ask_service(directory: Path, ask: Callable[[Running], _Found]) -> _Found | None:
    """Return what `ask` gets from the model's running service; None if none runs, or if it fails."""
    from cluster.serve import service

    running = service.find_service(directory)
    if running is None:
        return None
    with watched() as report:
        report(Notice(f"asking the service at {running.url} (--no-service: load the model here)"))
        try:
            return ask(running)
        except EnvironmentFault as error:
            report(Notice(f"{error.what} ({error.got}); loading the model here"))
            return None
