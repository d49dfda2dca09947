"""Issue evidence of what deletions, additions and patches did: a hook on deletions.

    contribute    draft a certificate before the commit, while what will be erased can be named
    reconcile     drop drafts of what was not committed
    complete      have `issuing.py` sign and log what has no statement yet
    export        sign the files of an export

A failure never stops a deletion. It is reported, and the certificate is pending: `complete` compares
with the log, so the next command that writes signs what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sisa.config.config import RunConfig
from sisa.core.domain import Export, HeldCheckpoint, Record, RecordRow
from sisa.core.errors import IntegrityError, SisaError
from sisa.core.events import Notice
from sisa.core.hooks import Contribution, Copies, Removal
from sisa.core.ledger_meta import TRAINED_ANEW
from sisa.core.patches import Patch
from sisa.core.requests import Request
from sisa.evidence import statements
from sisa.evidence.database import EvidenceTables, Logged
from sisa.evidence.issuing import Issuing
from sisa.evidence.keys.model_keys import log_for_writing, open_keys
from sisa.evidence.keys.model_signature import export_key, sign_export
from sisa.evidence.log.log import origin
from sisa.evidence.statements import NOT_RUN, Draft, Held
from sisa.flows.context.context import Context, trained_over
from sisa.flows.context.slices import slices_of, stored_in
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.model import Model
from sisa.planning.hidden_state_files import states_names
from sisa.planning.patch_plan import patches_from
from sisa.planning.plan import tainted_exports, touched
from sisa.store.areas import LOG
from sisa.verifier.envelope import Refused

PENDING = "the certificate is pending"
LATER = f"{NOT_RUN}: another command finished the deletion, or its records could not be read"
NOT_WANTED = f"{NOT_RUN}: the run file has `signing.sweep: false`"


@dataclass(frozen=True)
class EvidenceHook:
    """The hook of one model; the flows find it by name (`upper_houses.py`)."""

    directory: Path
    config: RunConfig
    model: str
    # What is being removed, by request and keyed id: in memory alone, until the deletion is completed.
    removed: dict[str, Mapping[str, Record]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tables(self) -> EvidenceTables:
        return EvidenceTables(self.directory / EVIDENCE)

    def copies(self, context: Context, rows: Sequence[RecordRow]) -> Sequence[Copies]:
        """Return nothing: no statement is erased."""
        del context, rows
        return ()

    def contribute(self, context: Context, removal: Removal) -> Contribution:
        """Draft the certificates of what is removed; add nothing to the commit."""
        ledger = context.stores.ledger
        shards = {row.shard for row in removal.rows.values()}
        try:
            former = self.tables.adapters(shards, ledger.seq(), ledger.meta().get(TRAINED_ANEW, ""))
            records = {each.request_id: _records(context, removal, each) for each in removal.requests}
            drafts = [
                _draft(context, removal, each, former, records[each.request_id])
                for each in removal.requests
            ]
            self.tables.put_drafts(drafts)
            if self.config.signing.sweep:
                self.removed.update(records)
        except SisaError as error:
            _report(context, "this deletion can't be certified: no draft could be made", error)
        return Contribution()

    def reconcile(self, context: Context) -> None:
        """Drop the drafts of what was not committed."""
        try:
            begun = {each.request_id for each in context.stores.ledger.requests() if each.committed_at}
            if stray := sorted(self.tables.drafts().keys() - begun):
                self.tables.drop_drafts(stray, commitments=True)
        except SisaError as error:
            _report(context, "drafts of certificates are not up to date", error)

    def complete(self, context: Context) -> None:
        """Sign and log whatever lacks a statement; report a failure, after which it is pending."""
        ledger = context.stores.ledger
        try:
            anew = ledger.meta().get(TRAINED_ANEW, "")
            self.tables.note_adapters(ledger.checkpoints(), ledger.seq(), anew)
            self.issue(context)
        except (SisaError, Refused) as error:
            _report(context, f"{PENDING}: `sisa certificate issue` tries again", error)
        finally:
            self.removed.clear()

    def export(self, context: Context, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the files of an export with `model.sig`, and a card that says what would revoke it."""
        if (keys := open_keys(self.config, self.model)) is None:
            context.report(Notice("the export is not signed: the keys of evidence are missing"))
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
        log = log_for_writing(keys, context.stores.blobs[LOG])
        why_not = LATER if self.config.signing.sweep else NOT_WANTED
        issuing = Issuing(context, self.tables, keys, log, self.directory, self.removed, why_not)
        return [
            *issuing.recover(),
            *issuing.certificates(),
            *issuing.state(),
            *issuing.patches(),
            *issuing.restrictions(),
            *issuing.given(),
        ]

    def pending(self, requests: Sequence[Request]) -> list[str]:
        """Return the completed requests whose certificates are not logged yet."""
        drafts = self.tables.drafts()
        return [r.request_id for r in requests if r.state == "completed" and r.request_id in drafts]


def hook_of(model: Model) -> EvidenceHook:
    """Return the hook of an open model."""
    return EvidenceHook(model.directory, model.config, model.id)


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
    former: Iterable[Export],
    records: Mapping[str, Record],
) -> Draft:
    """Return the draft of a request's certificate; `former` are adapters that were held before."""
    ledger, keyed = context.stores.ledger, context.settings.chain.keyed
    rows = removal.named[request.request_id]
    files = slices_of(context, rows)
    shards = sorted({row.shard for row in rows})
    states: frozenset[str] = frozenset()
    if context.settings.config.prefix_cache_bytes:
        names = states_names(files, context.recipe, context.compute.fingerprint)
        states = context.stores.hidden_states.held() & names
    held = Held(
        files,
        [each for shard in shards for each in ledger.indexes(shard)],
        [each for shard in shards for each in ledger.checkpoints(shard)],
        states,
        [each for hook in context.hooks for each in hook.copies(context, rows)],
    )
    ids = {key: each.id for key, each in records.items()}
    exports = tainted_exports(ledger.exports(), {request.request_id: rows})
    tainted = [each for each in former if any(touched(each, row) for row in rows)]
    revokes = _revoked(context, rows, [*exports, *tainted])
    return statements.draft_certificate(keyed, request.request_id, rows, ids, held, exports, revokes)


def _revoked(context: Context, rows: Sequence[RecordRow], exports: Sequence[Export]) -> set[str]:
    """Return the sha256 of adapters that these records touched, held or exported, patches included."""
    ledger = context.stores.ledger
    sets = ledger.sets_with([row.id_digest for row in rows])
    patches = patches_from(ledger.patches(), {name for names in sets.values() for name in names})
    keys = {each.key for each in patches}
    if keys.isdisjoint(trained_over(ledger)):
        shards = sorted({row.shard for row in rows})
        held = [each for shard in shards for each in ledger.checkpoints(shard)]
        held = [each for each in held if any(touched(each, row) for row in rows)]
    else:  # all shards were trained over one of the patches
        held = ledger.checkpoints()
    over = [each for each in ledger.exports() if not keys.isdisjoint(each.patches)]
    adapters: list[HeldCheckpoint | Export | Patch] = [*held, *exports, *over, *patches]
    return {each.adapter_sha256 for each in adapters} - {""}
