"""Make the page that a privacy officer reads: one HTML file, without script, network or record ids.

    facts = read_facts(model, now, made_by="dpo")    # effects: reads the model, its log and its keys
    page(report_body(facts))                         # pure: the same facts give the same bytes

The page shows only what is in `report_body(facts)`, which `sisa report --json` prints. What people wrote
(reasons, approvers, external ids, paths) is escaped, isolated from the text around it, and stripped of
control characters. Consent texts name people, so the page says only that a consent is recorded.

>>> cost_bars([{"committed_at": "2026-01-30T09:00:00+00:00", "record_epochs_retrained": 12}])
[{'period': '2026-01-30', 'record_epochs': 12, 'share': 1.0}]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from cluster.render.result import counted, printable, share
from sisa.core.errors import Busy, SisaError
from sisa.core.requests import CLOSED
from sisa.evidence.log.log import Log
from sisa.evidence.log.published import check_log
from sisa.evidence.log.tiles import CHECKPOINT
from sisa.verifier import note
from sisa.verifier.certificate import CERTIFICATES, CHAINED, URN, verify_chain
from sisa.verifier.envelope import PublicKeys, Refused, parse_keys

if TYPE_CHECKING:
    import jinja2

    from sisa.core.patches import Patch, VaultSet
    from sisa.flows.requests import RequestView
    from sisa.flows.status import SliceStanding, Status
    from sisa.model import Model

MAX_BARS = 24
NUM_READS = 3  # attempts, while others change the model
SOON_DAYS = 7
WITNESS_STEP = {
    "current": "",
    "absent": "open the model where its witness is kept",
    "to be caught up": "the next command that writes catches up",
    "ahead of the ledger": "an older copy was restored: the next command deletes again",
}
OF_EVIDENCE = ("keyid", "origin", "size", "root", "cosigners", "fault")
OF_SHARD = ("shard", "records", "head", "adapter_sha256", "depth", "num_stages", "converged")
OF_REQUEST = (
    *("request_id", "external_id", "state", "regime", "created_at", "received_on", "due"),
    *("num_records", "reason", "submitter", "approver", "extension", "num_copies", "copies_included"),
    *("committed_at", "shards"),
    *("cause", "record_epochs_retrained", "record_epochs_full", "record_epochs_others", "seconds"),
    *("serving_depth", "exports_erased", "model_digest_before", "model_digest_after"),
)


@dataclass(frozen=True)
class Statement:
    """Name a statement that verifies: its type, its number in the log, and its request if it has one."""

    kind: str
    sha256: str
    index: int | None
    request_id: str

    @property
    def name(self) -> str:
        """Return the type without prefix and version.

        >>> Statement("urn:deletion-ready-model:exact-deletion:v1", "", 0, "").name
        'exact-deletion'
        """
        return self.kind.removeprefix(URN).rpartition(":")[0] or self.kind


@dataclass(frozen=True)
class Evidence:
    """Hold what an outsider finds in the log and the public keys."""

    keyid: str = ""  # of the key that signs now
    origin: str = ""
    size: int = 0
    root: str = ""
    cosigners: tuple[str, ...] = ()  # named by the checkpoint; their keys are not known here
    statements: tuple[Statement, ...] = ()  # that verify
    served: Mapping[str, str] = field(default_factory=dict)  # sha256 by name, as last stated
    fault: str = ""  # why the rest does not verify
    pending: tuple[str, ...] = ()  # completed requests whose certificates are not logged yet


def check_evidence(read: Callable[[str], bytes], own: PublicKeys | None, kept: bytes) -> Evidence:
    """Return the part of a published log that verifies; `read` reads one of its files by its path.

    `own` are the model's own public keys, if its secret keys are on this machine. The log must continue
    from `kept`, a checkpoint that somebody kept.
    """
    found = Evidence()
    try:
        keys = parse_keys(read("keys.json"))
        found = replace(found, keyid=keys.present.keyid)
        if own is not None and own != keys:
            raise Refused("the published keys are not the model's own")
        checkpoint, entries = check_log(read, keys.log, seen=[kept] if kept else [])
        names = {name for name, _ in note.split_note(read(CHECKPOINT))[1]} - {checkpoint.origin}
        found = replace(
            found,
            origin=checkpoint.origin,
            size=checkpoint.size,
            root=checkpoint.root.hex(),
            cosigners=tuple(sorted(names)),
        )
        for sha256, stated in verify_chain(entries, read, keys):
            found = replace(found, statements=(*found.statements, _statement(sha256, stated)))
            if stated["predicateType"] in CHAINED:
                served = {each["name"]: each["digest"]["sha256"] for each in stated["subject"]}
                found = replace(found, served=served)
    except (Refused, SisaError) as error:
        found = replace(found, fault=_fault(error))
    return found


def _statement(sha256: str, stated: Mapping[str, Any]) -> Statement:
    predicate = stated["predicate"]
    request, index = predicate.get("request"), predicate.get("sequence")
    name = request.get("id") if isinstance(request, dict) else None
    return Statement(
        kind=str(stated["predicateType"]),
        sha256=sha256,
        index=index if isinstance(index, int) else None,
        request_id=name if isinstance(name, str) else "",
    )


@dataclass(frozen=True)
class Attention:
    """A point to act on."""

    severity: str
    what: str
    count: int | None  # 0: it does not apply; None: it applies, and has no count
    next_step: str


@dataclass(frozen=True)
class Facts:
    """Hold all that the page is made from."""

    made_at: str
    made_by: str  # as given; may be empty
    program: str
    model: str  # the model's random name
    encrypted: bool
    storage: str | None
    status: Status
    standings: Mapping[int, Sequence[SliceStanding]]
    patches: Sequence[Patch] = ()
    vault: Sequence[VaultSet] = ()
    evidence: Evidence | None = None  # None: the model has no keys of evidence


def read_facts(model: Model, now: str, made_by: str = "") -> Facts:
    """Read what the page shows, and check the log; nothing is changed. Raise Busy if others write."""
    for _ in range(NUM_READS):
        found = _read_once(model, now, made_by)
        after = model.status()
        if (after.event_head, after.shards) == (found.status.event_head, found.status.shards):
            return found
    raise Busy(
        "another process keeps changing this model",
        where=str(model.directory),
        next_step="wait until it has finished, then run the same command again",
    )


def _read_once(model: Model, now: str, made_by: str) -> Facts:
    from sisa.unlearn import patches

    status, (made, vault, _) = model.status(), patches(model)
    return Facts(
        made_at=now,
        made_by=made_by,
        program=f"deletion-ready-model {metadata.version('deletion-ready-model')}",
        model=model.id,
        encrypted=model.config.encrypt,
        storage=model.config.storage,
        status=status,
        standings={each.shard: slices for each, slices in model.shards()},
        patches=made,
        vault=vault,
        evidence=_read_evidence(model, status.requests),
    )


def _read_evidence(model: Model, requests: Sequence[RequestView]) -> Evidence | None:
    """Return the part of a model's evidence that verifies; None if it has no keys."""
    from sisa.evidence.hook import hook_of
    from sisa.evidence.keys.model_keys import log_blobs, open_keys
    from sisa.flows.wiring.wiring import EVIDENCE

    blobs = log_blobs(model)
    try:
        keys = open_keys(model.config, model.id)
        if keys is None and not blobs.held() and not (model.directory / EVIDENCE).exists():
            return None
        hook = hook_of(model)
        pending = tuple(hook.pending([each.request for each in requests]))
        kept = Log(blobs, keys).signed_note() if keys else b""
    except SisaError as error:
        return Evidence(fault=_fault(error))
    if keys and not kept and not blobs.num_bytes(CHECKPOINT):
        return Evidence(keys.present.keyid, pending=pending)  # nothing was signed yet
    found = check_evidence(
        lambda path: blobs.get(path, "file of the log"), keys.public if keys else None, kept
    )
    return replace(found, pending=pending)


def _fault(error: Refused | SisaError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what


def report_body(found: Facts) -> dict[str, Any]:
    """Return everything that the page shows, as JSON values."""
    requests = [
        {**_request(view), "certificate": _certificate(view, found.evidence)}
        for view in found.status.requests
    ]
    body = {
        "made_at": found.made_at,
        "made_by": found.made_by,
        "program": found.program,
        "model": _model(found),
        "shards": [
            {
                **{name: getattr(each, name) for name in OF_SHARD},
                "slices": [asdict(standing) for standing in found.standings[each.shard]],
            }
            for each in found.status.shards
        ],
        "requests": requests,
        "evidence": found.evidence and _evidence(found, found.evidence),
        "costs": _batches(found.status.requests),
        "patches": [_patch(each) for each in found.patches],
        "vault": {
            "sets": sum(each.held for each in found.vault),
            "records": sum(each.num_records for each in found.vault if each.held),
        },
        "exports": [asdict(each) for each in found.status.exports],
    }
    return body | {"attention": _attention(body)}


def _model(found: Facts) -> dict[str, Any]:
    status = found.status
    where, standing = status.witness
    return {
        "name": found.model,
        "directory": status.directory,
        "digest": status.model_digest,
        "base": status.base_model,
        "base_digest": status.base_digest,
        "records": status.records,
        "deleted_records": status.deleted_records,
        "records_without_subject": status.records_without_subject,
        "record_epochs_full": status.record_epochs_full,
        "serving_depth": status.serving_depth,
        "encrypted": found.encrypted,
        "storage": found.storage,
        "event_head": asdict(status.event_head),
        "witness": {"path": where, "standing": standing},
    }


def _request(view: RequestView) -> dict[str, Any]:
    request = view.request
    closed_at = view.events[-1].at if view.events and request.state in CLOSED else None
    return {
        **{name: getattr(request, name) for name in OF_REQUEST},
        "days_left": None if request.state in CLOSED else view.days_left,
        "closed_at": closed_at,
        "on_time": None if closed_at is None else closed_at[:10] <= request.due,
        "probed": request.probed and asdict(request.probed),
        "consent_recorded": bool(request.consent),
        "events": [{"state": e.state, "at": e.at, "note": e.note} for e in view.events],
    }


def _certificate(view: RequestView, evidence: Evidence | None) -> dict[str, Any]:
    """Return whether a request's deletion is certified, and by which entry of the log."""
    name, standing = view.request.request_id, "none"
    for each in evidence.statements if evidence else ():
        if each.request_id == name and each.kind in CERTIFICATES:
            return {
                "standing": "verified",
                "kind": each.name,
                "sha256": each.sha256,
                "index": each.index,
            }
    if evidence and view.request.state == "completed":
        standing = "unverified" if evidence.fault else standing
        standing = "pending" if name in evidence.pending else standing
    return {"standing": standing, "kind": "", "sha256": "", "index": None}


def _evidence(found: Facts, evidence: Evidence) -> dict[str, Any]:
    known = {view.request.request_id for view in found.status.requests}
    served = {f"shard-{e.shard:05d}": e.adapter_sha256 for e in found.status.shards if e.adapter_sha256}
    stated = {name: each for name, each in evidence.served.items() if name.startswith("shard-")}
    about = [each.request_id for each in evidence.statements if each.kind in CERTIFICATES]
    return {
        **{name: getattr(evidence, name) for name in OF_EVIDENCE},
        "statements": dict(Counter(each.name for each in evidence.statements)),
        "of_unknown_requests": sum(each not in known for each in about),
        "states_what_is_served": stated == served,
    }


def _batches(views: Sequence[RequestView]) -> list[dict[str, Any]]:
    """Return the cost of each batch of deletions, whose requests share a commit and its costs."""
    batches: dict[str, dict[str, Any]] = {}
    for request in (view.request for view in views if view.request.committed_at):
        batch = batches.setdefault(
            request.committed_at,
            {
                "committed_at": request.committed_at,
                "requests": 0,
                "records": 0,
                "record_epochs_retrained": request.record_epochs_retrained,
                "record_epochs_full": request.record_epochs_full,
                "seconds": 0.0,
            },
        )
        batch["requests"] += 1
        batch["records"] += request.num_records
        batch["seconds"] = max(batch["seconds"], request.seconds)
    return [batches[at] for at in sorted(batches)]


def cost_bars(batches: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the record-epochs of each day, month or year: the shortest that needs few bars."""
    sums: Counter[str] = Counter()
    for num_chars in (len("2026-01-30"), len("2026-01"), len("2026")):
        sums = Counter()
        for each in batches:
            sums[each["committed_at"][:num_chars]] += each["record_epochs_retrained"]
        if len(sums) <= MAX_BARS:
            break
    most = max(sums.values(), default=0)
    return [
        {"period": period, "record_epochs": sums[period], "share": sums[period] / most if most else 0.0}
        for period in sorted(sums)[-MAX_BARS:]
    ]


def _patch(patch: Patch) -> dict[str, Any]:
    return {
        "version": patch.version,
        "state": patch.state,
        "wanted_at": patch.wanted_at,
        "made_at": patch.made_at,
        "method": str(patch.job.settings.get("method", "")),
        "outcome": str(patch.report.get("outcome", "")),
        "request_id": patch.request_id,
    }


def _attention(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the points to act on, errors first."""
    requests = body["requests"]
    left = [each["days_left"] for each in requests if each["days_left"] is not None]
    states = Counter(each["state"] for each in requests)
    rolled_back = sum(s["state"] == "rolled back" for row in body["shards"] for s in row["slices"])
    stale = sum(each["standing"] in ("held", "changed", "unreadable") for each in body["exports"])
    gone = sum(each["standing"] == "gone" for each in body["exports"])
    witness = body["model"]["witness"]["standing"]
    pending = sum(each["certificate"]["standing"] == "pending" for each in requests)
    soon = sum(0 <= n <= SOON_DAYS for n in left)
    overdue, failed = sum(n < 0 for n in left), states["failed"] + states["erasure_failed"]
    waiting, held = states["received"], states["held"]
    behind = _uncounted(witness != "current")
    points = [
        Attention("error", "Open requests past their due date", overdue, "run or decide them"),
        Attention("error", "Failed deletions", failed, "`sisa run` retries"),
        Attention(
            "error", "Exports that still hold deleted records", stale, "remove them: `sisa status`"
        ),
        Attention(
            "error", "Moved exports that held deleted records", gone, "find and remove every copy"
        ),
        *_about_evidence(body["evidence"], pending),
        Attention("warning", f"Open requests due within {SOON_DAYS} days", soon, "run them in time"),
        Attention("warning", "Requests that wait for a decision", waiting, "approve, deny or hold"),
        Attention("warning", "Requests under a legal hold", held, "approve when the hold ends"),
        Attention(
            "warning", "Slices rolled back and not retrained yet", rolled_back, "`sisa run` trains them"
        ),
        Attention("warning", f"Witness: {witness}", behind, WITNESS_STEP[witness]),
    ]
    found = sorted((each for each in points if each.count != 0), key=lambda each: each.severity)
    return [asdict(each) for each in found]


def _uncounted(applies: bool) -> int | None:
    """Return the count of a point that has none."""
    return None if applies else 0


def _about_evidence(evidence: Mapping[str, Any] | None, pending: int) -> list[Attention]:
    """Return the points to act on in the evidence."""
    if evidence is None:
        step = "`sisa keys init` makes keys"
        return [Attention("warning", "Deletions are not certified", None, step)]
    unknown, fault = evidence["of_unknown_requests"], evidence["fault"]
    stale = not (evidence["states_what_is_served"] or fault)
    of_unknown = "Certificates of requests that the model does not know"
    about_older = "The log's last statement is not about what is served now"
    return [
        Attention(
            "error", "The log does not verify", _uncounted(bool(fault)), "keep it, and find out why"
        ),
        Attention("error", of_unknown, unknown, "`sisa doctor`"),
        Attention(
            "warning", "Certificates that are pending", pending, "`sisa certificate issue` signs them"
        ),
        Attention("warning", about_older, _uncounted(stale), "`sisa certificate issue` states it"),
    ]


def page(body: Mapping[str, Any]) -> str:
    """Return the page of a body that `report_body` returned."""
    return _template().render(**body, bars=cost_bars(body["costs"]), soon_days=SOON_DAYS)


@cache
def _template() -> jinja2.Template:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cluster.render"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "given": lambda text: printable(str(text)),
        "moment": _moment,
        "counted": counted,
        "share": share,
    }
    return environment.get_template("report.html.j2")


def _moment(at: str) -> str:
    """Return a time to the minute.

    >>> _moment("2026-01-30T09:00:31.123+00:00")
    '2026-01-30 09:00 UTC'
    """
    return datetime.fromisoformat(at).strftime("%Y-%m-%d %H:%M UTC")
