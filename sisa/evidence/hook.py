"""Issue evidence of what deletions, additions and patches did: a hook on deletions.

    contribute    draft a certificate before the commit, while what will be erased can be named
    reconcile     drop drafts of what was not committed
    complete      bring the tree of records to what the ledger holds; sign and log what has no statement:
                  completed requests, a changed state, patches that were made

`complete` compares with the log, so every command signs what a crash or a failing signer left out.
Nothing is stated twice: a signed statement is noted, then logged from that note. A failure never stops
a deletion; it is reported, and the certificate is pending.

    drafts        what can't be named any more, by request, until its certificate is logged
    commitments   sorted commitments to a request's records, from which receipts are made
    given         files handed to people, and not stated yet: the sha256 of each, and numbers
    signed        the statement that is signed and not yet logged
    logged        what the log's statements are about: a copy, made again from the log if it is lost
    adapters      those that were held and are not revoked: which slices, as of which commit
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.audit.residue import search_model
from sisa.config.config import RunConfig
from sisa.core.digest import canonical_json, digest_of, sha256_hex
from sisa.core.domain import (
    ANY_SHARD,
    Export,
    Head,
    HeldCheckpoint,
    Record,
    RecordRow,
    Request,
    Tombstone,
    active,
)
from sisa.core.errors import IntegrityError, SisaError
from sisa.core.events import Notice
from sisa.core.ports import Contribution, Ledger, Removal
from sisa.evidence import certificate
from sisa.evidence.certificate import (
    ACCESS,
    NOT_RUN,
    RESTRICTION,
    Draft,
    Held,
    Outcome,
    Served,
    State,
    erased_name,
)
from sisa.evidence.database import transaction
from sisa.evidence.keys import Keys, open_keys, open_log
from sisa.evidence.log import Log, origin, statement_in
from sisa.evidence.membership import Membership
from sisa.evidence.model_signature import export_key, sign_export
from sisa.flows.wiring.context import (
    TRAINED_ANEW,
    Context,
    areas,
    known_by_area,
    purge,
    restricted_rows,
    restrictions,
    served_heads,
    slices_of,
    stored_in,
    trained_over,
)
from sisa.flows.wiring.wiring import EVIDENCE, LOG
from sisa.flows.wiring.witness import REPLAYED
from sisa.lm.base.numerics import PROCEDURE_VERSION
from sisa.planning.patch_plan import lineage
from sisa.planning.plan import marked, prefix_names, touched
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.verifier.certificate import APPROX_REPORT, CERTIFICATES, CHAINED
from sisa.verifier.envelope import Refused

_SCHEMA = """
CREATE TABLE IF NOT EXISTS drafts (request TEXT PRIMARY KEY, draft TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS commitments (request TEXT PRIMARY KEY, hashes BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS given (sha256 TEXT PRIMARY KEY, predicate TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS signed (sequence INTEGER, kind TEXT, envelope BLOB) STRICT;
CREATE TABLE IF NOT EXISTS logged (
    sequence INTEGER PRIMARY KEY, kind TEXT NOT NULL, sha256 TEXT NOT NULL, about TEXT NOT NULL,
    before TEXT NOT NULL, after TEXT NOT NULL, subject TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS adapters (
    sha256 TEXT PRIMARY KEY, shard INTEGER NOT NULL, prefix TEXT NOT NULL, seq INTEGER NOT NULL,
    anew TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS adapters_of_shard ON adapters (shard);
"""
PENDING = "the certificate is pending"
MAX_STRINGS, MAX_SEARCHED_BYTES = 200, 64 * 2**20  # half a second of a core
LATER = f"{NOT_RUN}: another command finished the deletion, or its records could not be read"
NOT_WANTED = f"{NOT_RUN}: the run file has `signing.sweep: false`"


@dataclass(frozen=True)
class Logged:
    """What a statement in the log is about: a request, a patch, or what the model holds and serves."""

    sequence: int
    kind: str
    sha256: str
    about: str = ""  # request id, the patch's key, or the sha256 of a file that was handed out
    before: str = ""
    after: str = ""
    subject: str = ""  # digest of what was served; of a restriction, of what it says


class Evidence:
    """The tables of one model's evidence, beside its tree of records."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def _tables(self) -> Iterator[sqlite3.Connection]:
        with transaction(self.path, _SCHEMA) as db:
            yield db

    def put_drafts(self, drafts: Sequence[Draft]) -> None:
        """Note drafts and their commitments, in place of earlier ones of the same requests.

        The commitments of a certificate stay: of a restored backup, a draft may name fewer records.
        """
        with self._tables() as db:
            for each in drafts:
                text = canonical_json({**asdict(each), "commitments": []}).decode()
                db.execute("INSERT OR REPLACE INTO drafts VALUES (?, ?)", (each.request_id, text))
                named, hashes = each.request_id, bytes.fromhex("".join(each.commitments))
                if not db.execute("SELECT 1 FROM logged WHERE about = ?", (named,)).fetchone():
                    db.execute("INSERT OR REPLACE INTO commitments VALUES (?, ?)", (named, hashes))

    def drafts(self) -> dict[str, Draft]:
        """Return the drafts by request; nothing is written."""
        if not self.path.is_file():
            return {}
        with transaction(self.path, "", write=False) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'drafts'").fetchone():
                return {}
            rows = db.execute(
                "SELECT request, draft, hashes FROM drafts JOIN commitments USING (request)"
            )
            found = [(request, json.loads(text), hashes) for request, text, hashes in rows]
        return {
            request: Draft(**{**_tuples(parsed), "commitments": _split(hashes)})
            for request, parsed, hashes in found
        }

    def commitments(self, request_id: str) -> tuple[str, ...]:
        """Return the commitments of a request, sorted; none if it has none."""
        with self._tables() as db:
            query = "SELECT hashes FROM commitments WHERE request = ?"
            return _split(b"".join(row[0] for row in db.execute(query, (request_id,))))

    def drop(self, requests: Sequence[str], *, commitments: bool) -> None:
        """Drop the drafts of requests, and their commitments if no certificate names them."""
        with self._tables() as db:
            for table in ("drafts", *(["commitments"] if commitments else [])):
                db.executemany(
                    f"DELETE FROM {table} WHERE request = ?",  # noqa: S608 (our own table name)
                    [(each,) for each in requests],
                )

    def note_adapters(self, held: Iterable[HeldCheckpoint], seq: int, anew: str) -> None:
        """Note adapters that are held; any record of commit `seq` may be in those of before `anew`."""
        with self._tables() as db:
            db.execute(
                "UPDATE adapters SET shard = ?, prefix = '[]', seq = ?, anew = ? WHERE anew != ?",
                (ANY_SHARD, seq, anew, anew),
            )
            db.executemany(
                "INSERT INTO adapters VALUES (?, ?, ?, ?, ?) ON CONFLICT (sha256) DO UPDATE "
                "SET (shard, prefix, seq) = (excluded.shard, excluded.prefix, excluded.seq) "
                "WHERE seq != excluded.seq",
                [(e.adapter_sha256, e.shard, json.dumps(e.prefix), e.seq, anew) for e in held],
            )

    def adapters(self, shards: Collection[int], seq: int, anew: str) -> list[Export]:
        """Return the adapters of shards that were ever held and are not revoked, as if exported."""
        with self._tables() as db:
            rows = db.execute(
                "SELECT sha256, shard, prefix, seq, anew FROM adapters "
                "WHERE anew != ? OR shard IN (SELECT value FROM json_each(?))",
                (anew, json.dumps([ANY_SHARD, *shards])),
            )
            return [
                Export("", shard, tuple(json.loads(prefix)), made, "", sha256, "")
                if of == anew
                else Export("", ANY_SHARD, (), seq, "", sha256, "")
                for sha256, shard, prefix, made, of in rows
            ]

    def drop_adapters(self, revoked: Iterable[str]) -> None:
        """Drop adapters that a certificate in the log revokes."""
        with self._tables() as db:
            db.executemany("DELETE FROM adapters WHERE sha256 = ?", [(each,) for each in revoked])

    def put_given(self, sha256: str, predicate: Mapping[str, Any]) -> None:
        """Note a file that was handed to a person; it is stated with what is issued next."""
        with self._tables() as db:
            text = canonical_json(dict(predicate)).decode()
            db.execute("INSERT OR REPLACE INTO given VALUES (?, ?)", (sha256, text))

    def given(self) -> list[tuple[str, dict[str, Any]]]:
        """Return the files that were handed out and are not stated yet, with what is to be stated."""
        with self._tables() as db:
            rows = db.execute("SELECT sha256, predicate FROM given ORDER BY rowid").fetchall()
        return [(sha256, json.loads(text)) for sha256, text in rows]

    def sign(self, sequence: int, kind: str, envelope: bytes) -> None:
        """Note a signed statement that is to be logged as this entry."""
        with self._tables() as db:
            db.execute("DELETE FROM signed")
            db.execute("INSERT INTO signed VALUES (?, ?, ?)", (sequence, kind, envelope))

    def signed(self) -> tuple[int, str, bytes] | None:
        """Return the statement that is signed and not yet known to be logged."""
        with self._tables() as db:
            found = db.execute("SELECT sequence, kind, envelope FROM signed").fetchone()
        return found and (found[0], found[1], bytes(found[2]))

    def note(self, found: Logged) -> None:
        """Note a statement that is in the log; what was signed for its place has been or is void."""
        with self._tables() as db:
            values = tuple(asdict(found).values())
            db.execute("INSERT OR REPLACE INTO logged VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            db.execute("DELETE FROM given WHERE sha256 = ?", (found.about,))
            db.execute("DELETE FROM signed WHERE sequence <= ?", (found.sequence,))

    def logged(self, log: Log) -> list[Logged]:
        """Return what the statements of the log are about, in order; note those that are new."""
        with self._tables() as db:
            noted = [Logged(*row) for row in db.execute("SELECT * FROM logged ORDER BY sequence")]
        for each in log.entries(len(noted)):
            found = about(each.index, each.predicate_type, log.statement(each.sha256))
            self.note(found)
            noted.append(found)
        return noted


def _split(hashes: bytes) -> tuple[str, ...]:
    return tuple(hashes[at : at + 32].hex() for at in range(0, len(hashes), 32))


def _tuples(parsed: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(each) if isinstance(each, list) else each for key, each in parsed.items()}


@dataclass(frozen=True)
class EvidenceHook:
    """The hook of one model."""

    directory: Path
    config: RunConfig
    model: str
    named: dict[str, Mapping[str, Record]] = field(default_factory=dict, repr=False, compare=False)
    # what is being removed, by request and keyed id: in memory alone, until the deletion is completed

    name = "evidence"

    @property
    def evidence(self) -> Evidence:
        return Evidence(self.directory / EVIDENCE)

    def contribute(self, context: Context, removal: Removal) -> Contribution:
        """Draft the certificates of what is removed; add nothing to the commit."""
        ledger = context.stores.ledger
        shards = {row.shard for row in removal.rows.values()}
        try:
            held = self.evidence.adapters(shards, ledger.seq(), ledger.meta().get(TRAINED_ANEW, ""))
            found = {each.request_id: _records(context, removal, each) for each in removal.requests}
            drafts = [
                _draft(context, removal, each, held, found[each.request_id]) for each in removal.requests
            ]
            self.evidence.put_drafts(drafts)
            if self.config.signing.sweep:
                self.named.update(found)
        except SisaError as error:
            _report(context, "this deletion can't be certified: no draft could be made", error)
        return Contribution()

    def reconcile(self, context: Context) -> None:
        """Drop the drafts of what was not committed."""
        try:
            begun = {each.request_id for each in context.stores.ledger.requests() if each.committed_at}
            if stray := sorted(self.evidence.drafts().keys() - begun):
                self.evidence.drop(stray, commitments=True)
        except SisaError as error:
            _report(context, "drafts of certificates are not up to date", error)

    def complete(self, context: Context) -> None:
        """Sign and log whatever lacks a statement; report a failure, after which it is pending."""
        ledger = context.stores.ledger
        try:
            anew = ledger.meta().get(TRAINED_ANEW, "")
            self.evidence.note_adapters(ledger.checkpoints(), ledger.seq(), anew)
            self.issue(context)
        except (SisaError, Refused) as error:
            _report(context, f"{PENDING}: `sisa certificate issue` tries again", error)
        finally:
            self.named.clear()

    def export(self, context: Context, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the files of an export with `model.sig`, and a card that says what would revoke it."""
        del context
        if (keys := open_keys(self.config, self.model)) is None:
            return files
        return sign_export(origin(self.model), export_key(keys.log_seed), name, files)

    def issue(self, context: Context) -> list[Logged]:
        """Sign and log whatever lacks a statement, and return what was logged. Raise SisaError."""
        if (keys := open_keys(self.config, self.model)) is None:
            raise IntegrityError(
                "the keys that sign this model's evidence are missing",
                where=self.model,
                next_step="restore them from a backup, or make new ones: `sisa keys init`",
            )
        log = open_log(keys, context.stores.blobs[LOG])
        why = LATER if self.config.signing.sweep else NOT_WANTED
        issuing = _Issuing(context, self.evidence, keys, log, self.directory, self.named, why)
        steps = (
            *(issuing.recover, issuing.certificates, issuing.state, issuing.patches),
            *(issuing.restrictions, issuing.given),
        )
        return [made for step in steps for made in step()]

    def pending(self, requests: Sequence[Request]) -> list[str]:
        """Return the completed requests whose certificates are not logged yet."""
        drafts = self.evidence.drafts()
        return [r.request_id for r in requests if r.state == "completed" and r.request_id in drafts]


def open_hook(directory: Path, config: RunConfig, model: str) -> EvidenceHook:
    """Return the hook of a model, for the flows, which find it by name."""
    return EvidenceHook(directory, config, model)


def _report(context: Context, what: str, error: SisaError | Refused) -> None:
    context.report(Notice(f"{what} ({type(error).__name__}: {error.what})"))


def _records(context: Context, removal: Removal, request: Request) -> dict[str, Record]:
    """Return the records that a request removes, by keyed id; none if a file can't be read."""
    rows = removal.named[request.request_id]
    try:
        return {e.id_digest: e.record for e in stored_in(context, slices_of(context, rows), rows)}
    except SisaError as error:  # the deletion itself may need none of these files
        _report(context, "the certificate will name no record, and there will be no receipts", error)
        return {}


def _draft(
    context: Context,
    removal: Removal,
    request: Request,
    noted: Iterable[Export],
    records: Mapping[str, Record],
) -> Draft:
    """Return the draft of a request's certificate, from what its records touch now, or did."""
    ledger, keyed = context.stores.ledger, context.settings.chain.keyed
    rows = removal.named[request.request_id]
    files = slices_of(context, rows)
    shards = sorted({row.shard for row in rows})
    states: frozenset[str] = frozenset()
    if context.settings.keeps_prefixes:
        names = prefix_names(files, context.recipe, context.compute.fingerprint)
        states = context.stores.prefixes.held() & names
    held = Held(
        files,
        [each for shard in shards for each in ledger.indexes(shard)],
        [each for shard in shards for each in ledger.checkpoints(shard)],
        states,
    )
    ids = {key: each.id for key, each in records.items()}
    exports = marked(ledger.exports(), {request.request_id: rows})
    former = [each for each in noted if any(touched(each, row) for row in rows)]
    revokes = _revoked(context, rows, [*exports, *former])
    return certificate.draft(keyed, request.request_id, rows, ids, held, exports, revokes)


def _revoked(context: Context, rows: Sequence[RecordRow], exports: Sequence[Export]) -> set[str]:
    """Return the sha256 of adapters that these records touched, held or exported, patches included."""
    ledger = context.stores.ledger
    sets = ledger.sets_with([row.id_digest for row in rows])
    patches = lineage(ledger.patches(), {name for names in sets.values() for name in names})
    keys = {each.key for each in patches}
    beneath_all = not keys.isdisjoint(trained_over(ledger))
    shards = [None] if beneath_all else sorted({row.shard for row in rows})
    held = [each for shard in shards for each in ledger.checkpoints(shard)]
    over = [each for each in ledger.exports() if not keys.isdisjoint(each.patches)]
    found = {e.adapter_sha256 for e in held if beneath_all or any(touched(e, row) for row in rows)}
    found |= {each.adapter_sha256 for each in (*exports, *over)}
    return (found | {each.adapter_sha256 for each in patches}) - {""}


def about(sequence: int, kind: str, envelope: bytes) -> Logged:
    """Return what a logged statement is about; others than the hook's are not parsed."""
    found = Logged(sequence, kind, sha256_hex(envelope))
    if kind not in (*CHAINED, APPROX_REPORT, ACCESS, RESTRICTION):
        return found
    try:
        statement = statement_in(envelope)
        predicate = statement["predicate"]
        if kind == APPROX_REPORT:
            return replace(found, about=predicate["patch"]["key"])
        if kind == ACCESS:
            return replace(found, about=statement["subject"][0]["digest"]["sha256"])
        if kind == RESTRICTION:
            return replace(found, subject=certificate.restricted(predicate))
        roots, served = predicate["membership"], digest_of(statement["subject"])
        name = predicate["request"]["id"] if kind in CERTIFICATES else ""
        return replace(found, about=name, before=roots["before"], after=roots["after"], subject=served)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            "a statement of the log is of another form",
            where=f"entry {sequence}, {found.sha256}",
            got=type(error).__name__,
            next_step="`sisa log check` checks the log; restore it from where it is published",
        ) from None


@dataclass(frozen=True)
class _Issuing:
    """The statements of one model that are to be made now."""

    context: Context
    evidence: Evidence
    keys: Keys
    log: Log
    directory: Path
    named: Mapping[str, Mapping[str, Record]] = field(repr=False)  # removed now, by request and keyed id
    not_swept: str  # why there is no search for what other requests removed

    @cached_property
    def swept(self) -> dict[str, Mapping[str, Any] | str]:
        """Return by request what a search for what it removed found, or why there was none."""
        return _search(self.context, self.directory, self.named)

    @cached_property
    def old_versions(self) -> list[str]:
        """Return why a bucket keeps old versions of erased objects, one for each place."""
        return [each.why for each in purge(self.context, dry_run=True)]

    @cached_property
    def held(self) -> State:
        """Return what the model holds and serves, which no statement changes."""
        tree = Membership(self.evidence.path, self.keys.vrf_secret)
        tree.sync(self.context)
        return State(
            model=self.keys.model,
            base=self.context.settings.base,
            after=tree.root,
            num_records=tree.num_records,
            served=tuple(served_by(self.context.stores.ledger)),
            patches=tuple(active(self.context.stores.ledger.patches())),
            code={
                "package": metadata.version("deletion-ready-model"),
                "procedure_version": str(PROCEDURE_VERSION),
            },
        )

    @cached_property
    def logged(self) -> list[Logged]:
        """Return what the log's statements are about, in order; statements made here are added to it."""
        return self.evidence.logged(self.log)

    def recover(self) -> list[Logged]:
        """Log what was signed before a crash, and return it; what belongs elsewhere is void."""
        waiting = self.evidence.signed()
        return [self._append(*waiting)] if waiting and waiting[0] == len(self.logged) else []

    def _issue(self, statement: Mapping[str, Any]) -> Logged:
        """Sign a statement, note it, and log it."""
        kind, sequence = str(statement["predicateType"]), len(self.logged)
        envelope = self.keys.sign(dict(statement))
        self.evidence.sign(sequence, kind, envelope)
        return self._append(sequence, kind, envelope)

    def _append(self, sequence: int, kind: str, envelope: bytes) -> Logged:
        if (index := self.log.append(envelope, kind)) != sequence:
            raise IntegrityError(
                "a statement was logged at another index than it names",
                expected=f"entry {sequence}",
                got=f"entry {index}",
                next_step="`sisa log` shows the log; another process may have written to it",
            )
        self.logged.append(found := about(sequence, kind, envelope))
        self.evidence.note(found)
        return found

    def certificates(self) -> list[Logged]:
        """Issue the certificates of completed requests that have a draft and none yet."""
        drafts = self.evidence.drafts()
        ledger = self.context.stores.ledger
        done = [r for r in ledger.requests() if r.state == "completed" and r.request_id in drafts]
        issued = {each.about for each in self.logged if each.kind in CERTIFICATES}
        made = []
        for request in done:
            if request.request_id not in issued:  # it is, after a crash here or a restored backup
                drafted = drafts[request.request_id]
                sweep = self.swept.get(request.request_id, self.not_swept)
                outcome = _outcome(self.context, request, drafted, sweep, self.old_versions)
                keyed = self.context.settings.chain.keyed
                statement = certificate.deletion_statement(keyed, drafted, outcome, self._state())
                made.append(self._issue(statement))
            self.evidence.drop_adapters(drafts[request.request_id].revokes)
            self.evidence.drop([request.request_id], commitments=False)
        return made

    def state(self) -> list[Logged]:
        """State what the model holds and serves, unless the last statement says the same."""
        now = self._state()
        last = _last(self.logged)
        if last is not None and (last.after, last.subject) == (now.after, digest_of(now.subject)):
            return []
        return [self._issue(certificate.state_statement(now))]

    def patches(self) -> list[Logged]:
        """State the reports of patches that were made, each once."""
        stated = {each.about for each in self.logged if each.kind == APPROX_REPORT}
        made = [each for each in self.context.stores.ledger.patches() if each.adapter_sha256]
        now, model = self.context.now, self.keys.model
        return [
            self._issue(certificate.approx_report(each, model, now(), len(self.logged)))
            for each in made
            if each.key not in stated
        ]

    def restrictions(self) -> list[Logged]:
        """State whose processing is restricted and what is served, unless the log says the same."""
        ledger = self.context.stores.ledger
        known = restrictions(ledger)
        if not known.number:
            return []
        counts = Counter(row.subject_digest for row in restricted_rows(ledger))
        keyed, served = self.context.settings.chain.keyed, served_by(ledger, served_heads(ledger))
        predicate = certificate.restriction(keyed, known, counts, served_by(ledger), served)
        stated = [each.subject for each in self.logged if each.kind == RESTRICTION]
        if stated[-1:] == [certificate.restricted(predicate)]:
            return []
        subject = certificate.subject_of(served, active(ledger.patches()), self.context.settings.base)
        return [
            self._issue(certificate.right_statement(RESTRICTION, self._signed_now(predicate), subject))
        ]

    def given(self) -> list[Logged]:
        """State the files that were handed to people, each once."""
        return [
            self._issue(
                certificate.right_statement(
                    ACCESS,
                    self._signed_now(predicate),
                    [{"name": "file", "digest": {"sha256": sha256}}],
                )
            )
            for sha256, predicate in self.evidence.given()
        ]

    def _signed_now(self, predicate: Mapping[str, Any]) -> dict[str, Any]:
        return {"model": self.keys.model, "issued_at": self.context.now(), **predicate}

    def _state(self) -> State:
        """Return what the model holds and serves, as the next entry of the log would say it."""
        last = _last(self.logged)
        before = last.after if last else ""
        if last is not None and last.after == self.held.after:
            before = last.before  # several statements may be about the same change
        return replace(
            self.held,
            issued_at=self.context.now(),
            sequence=len(self.logged),
            previous=last.sha256 if last else "",
            before=before,
        )


def served_by(ledger: Ledger, heads: Sequence[Head] | None = None) -> list[Served]:
    """Return the adapters of some heads, or of all heads."""
    held = {each.key: each for each in ledger.checkpoints()}
    return [
        Served(each.shard, found.adapter_sha256, found.key, found.fingerprint, each.depth)
        for each in (ledger.heads() if heads is None else heads)
        if each.key is not None and (found := held[each.key])
    ]


def _last(logged: Sequence[Logged]) -> Logged | None:
    """Return the last statement of what the model holds."""
    return next((each for each in reversed(logged) if each.kind in CHAINED), None)


def _outcome(
    context: Context,
    request: Request,
    drafted: Draft,
    sweep: Mapping[str, Any] | str,
    old_versions: Sequence[str],
) -> Outcome:
    """Return what became of a completed request, after checking that what it erased is gone."""
    ledger = context.stores.ledger
    named = ledger.lookup(ledger.named_by(request.request_id))
    live = [each for each in named.values() if isinstance(each, RecordRow)]
    events = [each for each in ledger.events() if each.request_id == request.request_id]
    return Outcome(
        request=request,
        events=events,
        tombstones=[each.id_digest for each in named.values() if isinstance(each, Tombstone)],
        exports_left=sum(e.stale and e.request_id == request.request_id for e in ledger.exports()),
        old_versions=old_versions,
        holds=sum(each.state == "held" for each in ledger.requests()),
        rectified=bool(live) and len(live) == len(named),
        restored=any(each.note == REPLAYED for each in events),
        passed=_erasure_checks(context, drafted, [] if live else ["checkpoint"]),
        sweep=sweep,
    )


def _search(
    context: Context, directory: Path, named: Mapping[str, Mapping[str, Record]]
) -> dict[str, Mapping[str, Any] | str]:
    """Search once for what some requests removed; return what was found, by request, in numbers.

    An id that was given again is not searched for, and a record that could not be read can't be.
    """
    live = context.stores.ledger.lookup([key for records in named.values() for key in records])
    given: dict[str, tuple[list[str], list[str]]] = {}
    for request, records in named.items():
        gone = [each.id for key, each in records.items() if not isinstance(live.get(key), RecordRow)]
        if records:
            given[request] = gone, [part.text for each in records.values() for part in each.parts]
    ids, texts = ({each for pair in given.values() for each in pair[at]} for at in (0, 1))
    if not given:
        return {}
    if (number := len(ids | texts)) > MAX_STRINGS:
        return dict.fromkeys(given, f"{NOT_RUN}: {number:,} ids and texts, more than {MAX_STRINGS}")
    searched = search_model(context, directory, sorted(ids), sorted(texts), MAX_SEARCHED_BYTES)
    if found := len(searched.found):
        what = f"ids and texts that were deleted and are still in the model's directory: {found}"
        context.report(Notice(f"{what}; `sisa sweep` says where"))
    return {
        request: certificate.search_results({*gone, *parts}, searched).embedded()
        for request, (gone, parts) in given.items()
    }


def _erasure_checks(context: Context, drafted: Draft, never_again: Sequence[str]) -> list[str]:
    """Return the names of checks that passed. Raise IntegrityError if something erased is held.

    What is `never_again` held: a record that is added again, as it was, brings its checkpoints back.
    """
    keyed, known = context.settings.chain.keyed, known_by_area(context)
    gone = {name for e in drafted.erased if e["what"] in never_again for name in e["digests"]}
    held = {erased_name(keyed, "checkpoint", key) for key in context.stores.checkpoints.held()}
    left = {
        area: sum(not name.startswith(TEMPORARY_PREFIX) for name in store.held() - known[area])
        for area, store in areas(context).items()
    }
    if not gone.isdisjoint(held) or any(left.values()):
        raise IntegrityError(
            "what a deletion erased is still held",
            got=", ".join(f"{count} files in {area}" for area, count in left.items() if count),
            next_step="run `sisa gc`, then `sisa certificate issue`",
        )
    found = [f"no erased {each} is held" for each in never_again]
    return [*found, "no file is held that the ledger does not list"]
