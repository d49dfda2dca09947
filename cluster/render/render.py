"""Render results as JSON and as text, for the command line, the service and notebooks.

The JSON keys are a contract (README, "The JSON contract"): keys are added, never renamed.

>>> printable("a\\x1b[31mb\\n")
'a[31mb\\n'
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.core.requests import Request

if TYPE_CHECKING:
    from sisa.audit.verify import Verification
    from sisa.core.ports import KeptVersions
    from sisa.core.requests import Probed
    from sisa.evidence.attestations import Stated
    from sisa.flows.ask import Answer
    from sisa.flows.deletion import ForgetOutcome, ForgetPlan
    from sisa.flows.ingest import Rectified, Taken
    from sisa.flows.query import Candidate, Location
    from sisa.flows.rights.drop import Details, Standing
    from sisa.flows.rights.restriction import Restriction
    from sisa.flows.routing import HeldPrompts
    from sisa.flows.status import Status

# Exit codes of results; those of errors are in `sisa.core.errors`.
EXIT_USAGE, EXIT_INTEGRITY, EXIT_ENVIRONMENT, EXIT_REVOKED, EXIT_INTERRUPTED = 2, 4, 6, 7, 130
ENDED_AT_ONCE = "(the model ended at once)"  # instead of an empty answer
BASE_ALONE = "(the base model alone answered: no shard's records are near enough; see min_score)"
MAX_SHARDS_SHOWN = 8  # in one line of text


@dataclass(frozen=True)
class Result:
    """Hold what a command prints, as JSON and as lines of text, and its exit code."""

    json: dict[str, Any]
    lines: Sequence[str]
    exit_code: int = 0

    @property
    def text(self) -> str:
        """Return the lines, safe for a terminal: they may quote records or a model."""
        return printable("\n".join(self.lines))

    def with_more(self, json: Mapping[str, Any], lines: Iterable[str] = ()) -> Result:
        """Return the result with more keys, and with more lines at its end."""
        return replace(self, json={**self.json, **json}, lines=[*self.lines, *lines])


def printable(text: str) -> str:
    """Return text without control characters, except line breaks and tabs."""
    return "".join(c for c in text if c in "\n\t" or not unicodedata.category(c).startswith("C"))


def share(part: int, whole: int) -> str:
    """Return a part of a whole in percent."""
    return f"{100 * part / whole:.1f}%" if whole else "0%"


def retrained(of: Request | ForgetPlan) -> str:
    """Return the record-epochs that a deletion retrains, and their share of a full training."""
    part, whole = of.record_epochs_retrained, of.record_epochs_full
    return f"{part} of {whole} ({share(part, whole)})"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    >>> counted(1, "slice"), counted(1200, "slice")
    ('1 slice', '1,200 slices')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def taken(found: Taken, directory: Path) -> Result:
    lines = [
        f"{counted(found.records, 'record')} in {directory} ({found.added} added now)",
        f"{found.slices_trained} slices trained, {found.record_epochs_trained} record-epochs"
        + (f"; {found.record_epochs_others} more in other orders" if found.record_epochs_others else ""),
        f"model digest {found.model_digest}",
    ]
    if found.generation:
        text = f"appended as generation {found.generation}: to train the same model from scratch, give"
        lines.insert(1, f"{text} them `generation: {found.generation}`")
    lines += prompts(found.prompts)
    if found.deleted_not_taken:
        skipped = counted(found.deleted_not_taken, "record")
        lines.append(f"skipped: {skipped} that a request deleted before")
    if found.new_not_taken:
        new = counted(found.new_not_taken, "new record")
        lines.append(f"not added: {new}; use `sisa add -m {directory} FILE`")
    lines.append(f"next: sisa status, find, generate or forget, each with -m {directory}")
    return Result(asdict(found), lines)


def where(locations: Sequence[Location]) -> Result:
    lines = [line for each in locations for line in _located(each)]
    return Result({"records": [asdict(each) for each in locations]}, lines)


def _located(each: Location) -> list[str]:
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


def found(hits: Sequence[Candidate]) -> Result:
    rows = []
    for h in hits:
        of = "no subject" if h.subject is None else f"of {h.subject}"
        rows.append(f"{h.score:8.4f}  shard {h.shard}  slice {h.slice}  {h.match:8}{h.id}  ({of})")
        rows += [f"          {h.text}"] if h.text is not None else []
    return Result({"hits": [asdict(each) for each in hits]}, rows or ["no record matches"])


def rectified(found: Rectified) -> Result:
    taken, request = found.taken, found.request
    lines = [f"replaced {counted(taken.added, 'record')}, {taken.already_held} unchanged"]
    lines += [f"  request {request.request_id}: {request.state}"] if request else []
    lines.append(f"  trained {counted(taken.slices_trained, 'slice')}; model {taken.model_digest[:16]}")
    body = {
        "request_id": request and request.request_id,
        "replaced": taken.added,
        "unchanged": taken.already_held,
        "slices_trained": taken.slices_trained,
        "record_epochs_trained": taken.record_epochs_trained,
        "model_digest": taken.model_digest,
    }
    return Result(body, lines)


def restricted(found: Restriction, holders: Mapping[str, Any] | None = None) -> Result:
    """Render a restriction or its end, and the earlier exports with the engines that hold them."""
    exports, engines = (list(holders[name]) if holders else [] for name in ("recipients", "engines"))
    records = counted(found.num_records, "record")
    lines = [f"restricted since {found.since}: {records}" if found.since else f"released: {records}"]
    lines += [f"  shard {shard} serves {depth} of {of} slices" for shard, depth, of in found.served]
    lines += [f"  exported before, so tell whoever uses it: {each['path']}" for each in exports]
    lines += engine_lines(engines)
    body = {
        "since": found.since,
        "changed": found.changed,
        "records": found.num_records,
        "served": [list(each) for each in found.served],
        "recipients": exports,
        "engines": engines,
    }
    return Result(body, lines)


def engine_lines(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each engine that holds one of the exports, or could not be asked."""
    return [
        f"engine {each['url']}: "
        + (each["fault"] or f"holds {counted(len(each['adapters']), 'adapter')} of these exports")
        for each in engines
    ]


def drop_standing(found: Standing) -> str:
    """Return the state of DROP's cycle, in one line."""
    return (
        f"DROP: next access due {found.next_access}, {counted(found.days_left, 'day')} left; "
        f"{counted(found.open, 'work item')} open, {found.overdue} overdue"
    )


def drop_shown(found: Details | None) -> Result:
    if found is None:
        empty: dict[str, Any] = {"standing": None, "matched": [], "records_without_identity": None}
        return Result(empty, ["no download of DROP was imported"])
    standing = found.standing
    lines = [
        drop_standing(standing),
        f"  {counted(standing.work_items, 'work item')} on the lists, {standing.withdrawn} withdrawn, "
        f"{standing.to_report} to report, {standing.to_opt_out} to opt out",
        f"  {counted(found.records_without_identity, 'record')} without an identity can't be matched",
    ]
    for each in found.matched:
        what = each.request_id or f"opt out {each.consumers} consumers"
        lines.append(f"  {each.item} ({each.kind}), due {each.due}: {what}")
        lines += [f"    {name}" for name in each.ids]
    return Result(asdict(found), lines)


def meanwhile(of: Request | ForgetPlan) -> Iterator[str]:
    """Yield what is served until the shards are retrained, and the additional cost of other orders."""
    if of.served:
        shards = _shortened([f"shard {s}: {n} of {whole} slices" for s, n, whole in of.served])
        yield f"  meanwhile served: {shards}; {100 * of.serving_depth:.1f}% of all shards' slices"
    if of.record_epochs_others:
        yield f"  other orders: {of.record_epochs_others} record-epochs more"


def _shortened(shards: Sequence[object]) -> str:
    """Return the first shards, separated by commas."""
    more = ["..."] if len(shards) > MAX_SHARDS_SHOWN else []
    return ", ".join(map(str, [*shards[:MAX_SHARDS_SHOWN], *more]))


def _numbers(of: Request | ForgetPlan, shards: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return the keys that a deletion and its dry run share."""
    return {
        "shards": [{"shard": s, "first_slice": f, "slices_retrained": n} for s, f, n in shards],
        "record_epochs_retrained": of.record_epochs_retrained,
        "record_epochs_full": of.record_epochs_full,
        "record_epochs_others": of.record_epochs_others,
        "served": [{"shard": s, "slices_served": n, "of": whole} for s, n, whole in of.served],
        "serving_depth": of.serving_depth,
    }


def forget_plan(planned: ForgetPlan) -> Result:
    seconds = planned.estimated_seconds
    rows = [(shard, planned.first_slices[shard], n) for shard, n in planned.stages.items()]
    erased = {
        "checkpoints": len(planned.tainted),
        "slice_files": planned.num_slice_files,
        "index_rows": len(planned.removed),
        "exports": len(planned.exports),
    }
    body = {
        "dry_run": True,
        "records": len(planned.removed),
        "already_deleted": len(planned.already_deleted),
        **_numbers(planned, rows),
        "estimated_seconds": seconds,
        "would_erase": erased,
    }
    estimate = "unknown" if seconds is None else f"{seconds:.1f} s of one worker"
    *most, last = (counted(n, name.removesuffix("s").replace("_", " ")) for name, n in erased.items())
    lines = [
        f"would delete {counted(len(planned.removed), 'record')}; nothing was changed",
        *(f"  shard {s}: retrain {counted(n, 'slice')} from slice {first} on" for s, first, n in rows),
        f"  record-epochs: {retrained(planned)}; estimated time {estimate}",
        *meanwhile(planned),
        f"  would erase {', '.join(most)} and {last}",
        *_already(len(planned.already_deleted)),
        "next: the same command without --dry-run",
    ]
    return Result(body, lines)


def _already(count: int) -> list[str]:
    were = "was" if count == 1 else "were"
    return [f"{count} of the named records {were} already deleted"] if count else []


def forgotten(outcome: ForgetOutcome, directory: Path | str = "DIR") -> Result:
    already, after = outcome.already_deleted, outcome.model_digest
    nothing = Request("", "", "", 0, model_digest_before=after, model_digest_after=after)
    request = outcome.request or nothing
    body = {
        "request_id": request.request_id or None,
        "records": request.num_records,
        **_numbers(request, request.shards),
        "deferred": outcome.deferred,
        "seconds": request.seconds,
        "model_digest_before": request.model_digest_before,
        "model_digest_after": request.model_digest_after,
        "already_deleted": len(already),
        "already_deleted_by": sorted({each.request_id for each in already}),
        "exports_erased": request.exports_erased,
        "exports_missing": list(outcome.exports_missing),
        "old_versions_kept": [asdict(each) for each in outcome.kept],
        "probed": request.probed and asdict(request.probed),
    }
    lines = _already(len(already))
    if outcome.request is not None:
        lines = _deleted(request, outcome, directory)
    lines += missing_exports(outcome.exports_missing) + old_versions(outcome.kept)
    if request.state == "erased":
        lines.append(f"next: `sisa run -m {directory}` retrains the deferred slices")
    elif outcome.request is not None:
        lines.append(f"next: `sisa verify -m {directory} --replay sample` proves it by retraining")
    return Result(body, lines)


def _deleted(request: Request, outcome: ForgetOutcome, directory: Path | str) -> list[str]:
    """Return the facts of a deletion, and what the base alone knew."""
    to_do = "to be retrained" if request.state == "erased" else "retrained"
    lines = [f"deleted {counted(request.num_records, 'record')} exactly; request {request.request_id}"]
    for shard, first, num in request.shards:
        lines.append(f"  shard {shard}: {counted(num, 'slice')} {to_do} from slice {first} on")
    lines += meanwhile(request)
    lines.append(f"  record-epochs: {retrained(request)} in {request.seconds:.1f} s")
    before, after = request.model_digest_before, outcome.model_digest
    lines.append(f"  model digest {before[:16]}... -> {after[:16]}...")
    lines += _already(len(outcome.already_deleted))
    if request.exports_erased:
        lines.append(f"  {counted(request.exports_erased, 'export')} erased")
    return lines + probed(request.probed) + base_hint(request, directory)


def probed(found: Probed | None) -> list[str]:
    """Return what the base alone knew, as one line, or none if the base was not probed."""
    if found is None:
        return []
    if found.failure:
        return [f"  the base alone could not be asked what it knows ({found.failure})"]
    return [
        f"  approximately still known to the base alone: {found.num_known} of {found.num_probed} probed "
        f"records (continuation {found.continuation:.2f}, extraction strength "
        f"{found.extraction_strength:.2f}, exact memorisation {found.exact_memorisation:.2f}, "
        f"membership margin {found.membership_margin:+.2f})"
    ]


def base_hint(request: Request, directory: Path | str) -> list[str]:
    """Return what to do if the base alone knows a deleted record, as one line, or none."""
    if request.probed is None or not request.probed.num_known:
        return []
    start = f"  to make the base say less of it, approximately: sisa approx unlearn -m {directory}"
    if request.vaulted:
        return [f"{start} --request {request.request_id}"]
    return [
        f"{start} --forget FILE --consent WHO, if you may have the text; it rests encrypted until the "
        "base no longer knows it, or you release it"
    ]


def missing_exports(paths: Sequence[str]) -> list[str]:
    """Return what to do about each export that could not be erased."""
    from sisa.flows.export import unload_command

    return [
        f"stale export, moved or changed, to be removed by you: {path}\n"
        f"  if a vLLM server loaded it: {unload_command(path)}"
        for path in paths
    ]


def old_versions(found: Sequence[KeptVersions]) -> list[str]:
    """Return a line for each place whose old versions a bucket keeps."""
    step = "  allow s3:ListBucketVersions and s3:DeleteObjectVersion, or end the lock; then `sisa gc`"
    lines = [f"NOT PURGED, kept by the bucket: {each.where} ({each.why})" for each in found]
    return [*lines, step] if lines else []


def status(found: Status) -> Result:
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
    for each in found.shards:
        per_slice = " ".join(map(str, each.slice_records))
        head = each.head[:16] + "..." if each.head else "none (the base)"
        target = "the base" if each.target is None else f"{each.target[:16]}..."
        waiting = "" if each.converged else f"  (clean; {target} is to be trained)"
        if found.restricted_records and each.served != each.head:
            waiting += f"  (restricted: serves {counted(each.served_depth, 'slice')})"
        depth = f"{each.depth}/{each.num_stages}"
        lines.append(f"{each.shard:5}  {each.records:7}  {per_slice:20} {depth:>5}  {head}{waiting}")
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
    lines += [f"prompts go to shards in the form: {found.form}", *prompts(found.prompts)]
    if found.checkpoint_budget_bytes is not None:
        budget = f"{found.checkpoint_bytes:,} bytes of a budget of {found.checkpoint_budget_bytes:,}"
        lines.append(f"checkpoints hold {budget}")
    lines += [
        f"request {each.request_id}: {each.num_records} records at {each.created_at}, {each.state}"
        for each in found.requests
    ]
    for export in found.exports:
        fate = f"STALE by {export.request_id}, {export.standing}" if export.standing else export.state
        merged = f" (shards {_shortened(export.shards)})" if len(export.shards) > 1 else ""
        lines.append(f"export {export.path}{merged}: {fate}")
    lines.append(", ".join(f"{name} {size:,} bytes" for name, size in found.sizes_bytes.items()))
    path, standing = found.witness
    lines.append(f"witness {path}: {standing}")
    if head := found.event_head.link:
        count = found.event_head.num_events
        lines.append(f"event log: {count} events, head {count}:{head}")
    return Result(asdict(found) | {"witness": {"path": path, "standing": standing}}, lines)


def verified(found: Verification) -> Result:
    from sisa.audit.verify import NOT_REQUESTED

    lines = [
        f"{counted(found.files_checked, 'file')} checked, "
        f"{counted(found.vectors_embedded, 'text')} embedded again, "
        f"{counted(len(found.findings), 'finding')}"
    ]
    lines += [f"  - {each.where}: {each.what}" for each in found.findings]
    for each in found.shards:
        if each.replayed:
            outcome = "equal, byte for byte" if each.equal else "DIFFERENT"
            stages = counted(each.stages, "stage")
            lines.append(f"shard {each.shard}: {stages} trained from scratch: {outcome}")
            if each.equal_apart is not None:
                outcome = "equal, byte for byte" if each.equal_apart else "DIFFERENT"
                lines.append(f"shard {each.shard}: each stage in a process of its own: {outcome}")
        elif each.reason != NOT_REQUESTED:
            lines.append(f"shard {each.shard}: not replayed ({each.reason})")
    if left := sum(each.reason == NOT_REQUESTED for each in found.shards):
        lines.append(f"{counted(left, 'shard')} not replayed ({NOT_REQUESTED})")
    if not found.replayed:
        lines.append(
            "nothing was replayed: this does not show that training gives these weights; "
            "`--replay sample` or `all` does"
        )
    lines.append("ok" if found.ok else "NOT OK")
    code = 0 if found.ok else EXIT_INTEGRITY
    return Result({**asdict(found), "replayed": found.replayed}, lines, code)


def stated(done: Result, found: Stated) -> Result:
    """Add to a check's result its entry in the model's log; the verdict stays the last line."""
    line = f"not logged: {found.not_logged}"
    if found.entry is not None:
        line = f"logged: entry {found.entry}, {found.result}"
    body = {**done.json, "entry": found.entry, "not_logged": found.not_logged}
    return replace(done, json=body, lines=[*done.lines[:-1], line, *done.lines[-1:]])


def answer(found: Answer, answer_only: bool = False) -> Result:
    """Render an answer; `answer_only` leaves out the shards that answered, or that none did."""
    body: dict[str, Any] = {"answer": found.text}
    lines = [printable(found.text) or ENDED_AT_ONCE]
    if not answer_only:
        body["shards"] = list(found.shards)
        lines += [] if found.shards else [BASE_ALONE]
    if found.ended_at_once:
        body["ended_at_once"] = True
    return Result(body, lines)


def answers(found: Sequence[Answer], answer_only: bool = False) -> Result:
    made = [answer(each, answer_only) for each in found]
    lines = [f"{number}: {each.text}" for number, each in enumerate(made, start=1)]
    return Result({"answers": [each.json for each in made]}, lines)


def prompts(found: HeldPrompts | None) -> list[str]:
    """Return how stored prompts would be routed, as one line, or none if that was not checked."""
    if found is None:
        return []
    line = f"routing check: {found.turned_away} of {found.looked_up} stored prompts are turned away"
    others = f", {found.elsewhere} answered by another shard" if found.elsewhere else ""
    advice = " (see min_score and `sisa doctor`)" if found.turned_away else ""
    return [line + others + advice]


def exported(made: Sequence[Path]) -> Result:
    paths = [str(each) for each in made]
    return Result({"adapters": paths}, paths or ["no shard serves an adapter"])
