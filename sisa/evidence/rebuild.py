"""Train a certificate's shards again, as a second party, and state what came out.

    certificate + remaining records + run file + partition key  ->  adapters  ->  a statement

The second party trains in a directory of its own, without the operator's model, and signs with a key of
its own. README.md explains the verdicts; that of all shards is the worst.

A job's key names records, settings, base and fingerprint. Under another fingerprint, the key is computed
as if under the certified one and compared; equality of bytes is then never claimed.

>>> key, adapter = "5e6f", "ab" * 32
>>> RebuiltShard(0, adapter, adapter, key, key, same_numerics=True).verdict
'equal'
>>> RebuiltShard(0, adapter, "cd" * 32, key, key, same_numerics=False).verdict
'same procedure, other bits'
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sisa.config.config import RunConfig, ScratchBase
from sisa.config.runfile import load_run_file
from sisa.core.digest import Keyed
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput
from sisa.core.events import Report
from sisa.data.reader import read_like
from sisa.evidence.issuing import served_by
from sisa.evidence.keys.model_keys import keys_of, log_for_writing
from sisa.evidence.statements import Served, check_facts, statement
from sisa.flows.wiring.executors import OpenExecutor
from sisa.model import Model
from sisa.planning.layout import Assigner
from sisa.planning.plan import jobs
from sisa.store.areas import LOG
from sisa.store.blobs.keyring import read_secret
from sisa.train import train_model
from sisa.verifier.certificate import REBUILD, Certificate
from sisa.verifier.envelope import Refused, StatementKey, verify_envelope

NOT_GIVEN = ("datasets", "partition_key_file")  # of the operator's run file: other files replace them
RebuildVerdict = Literal["equal", "same procedure, other bits", "other procedure", "differs"]
VERDICTS: tuple[RebuildVerdict, ...] = get_args(RebuildVerdict)


@dataclass(frozen=True)
class RebuiltShard:
    """Hold what came out for one shard; `rebuilt_key` is under the certified fingerprint."""

    shard: int
    certified: str
    rebuilt: str
    certified_key: str
    rebuilt_key: str
    same_numerics: bool

    @property
    def verdict(self) -> RebuildVerdict:
        if self.certified_key != self.rebuilt_key:
            return "other procedure"
        if not self.same_numerics:
            return "same procedure, other bits"
        return "equal" if self.certified == self.rebuilt else "differs"


@dataclass(frozen=True)
class Rebuild:
    """Hold the shards that were trained again, and the fingerprint of this environment."""

    shards: tuple[RebuiltShard, ...]
    fingerprint: str
    num_records: int  # of these shards
    num_given: int = 0  # in the file
    num_certified: int = 0  # that remained in the whole model

    @property
    def verdict(self) -> RebuildVerdict:
        return max((each.verdict for each in self.shards), key=VERDICTS.index)


def rebuild(
    certificate: Certificate,
    shards: Collection[int],
    run_file: Path,
    records: Path,
    key_file: Path,
    directory: Path,
    executor: str | OpenExecutor,
    report: Report,
) -> Rebuild:
    """Train the shards of a verified certificate in `directory`, and compare: those that its request
    touched, unless `shards` names others. Raise InvalidInput.
    """
    config = load_run_file(run_file, NOT_GIVEN)
    remaining = read_like(config, records)
    heads = certified_heads(certificate, shards)
    found = rebuild_shards(heads, config, remaining, key_file, directory, executor, report)
    num_certified = certificate.statement["predicate"]["membership"]["num_records"]
    return replace(found, num_given=len(remaining), num_certified=num_certified)


def certified_heads(certificate: Certificate, shards: Collection[int] = ()) -> list[Served]:
    """Return the served heads of these shards, or of those that the request touched."""
    predicate = certificate.statement["predicate"]
    check_facts(certificate.kind, predicate, "the certificate")
    served = [Served(**each) for each in predicate["served"]]
    wanted = set(shards) or {each["shard"] for each in predicate["touched"]}
    found = [each for each in served if each.shard in wanted]
    missing = set(shards) - {each.shard for each in served}
    if found and not missing:
        return found
    names = ", ".join(str(each.shard) for each in served) or "none"
    raise InvalidInput(
        "the certificate names no adapter of these shards",
        expected=f"shards that serve one: {names}",
        got=", ".join(map(str, sorted(missing)))
        or "the shards that the request touched serve no adapter now",
        next_step="name shards with --shard",
    )


def rebuild_shards(
    certified: Sequence[Served],
    config: RunConfig,
    records: Sequence[Record],
    key_file: Path,
    directory: Path,
    executor: str | OpenExecutor,
    report: Report,
) -> Rebuild:
    """Train the certified shards from the remaining records in `directory`, and compare.

    Raise InvalidInput if no record belongs to one of the shards.
    """
    config = apart(config, key_file, directory)
    assigner = Assigner(Keyed(read_secret(key_file)), config.layout)
    wanted = {each.shard for each in certified}
    found = {shard: [r for r in records if assigner.place(r)[0] == shard] for shard in sorted(wanted)}
    if absent := [shard for shard, its in found.items() if not its]:
        raise InvalidInput(
            "none of the records belongs to a shard that the certificate says is served",
            where=", ".join(f"shard {shard}" for shard in absent),
            expected="the remaining records, the model's partition key and its run file",
            got=f"{len(records)} records",
            next_step="ask the operator for the file of remaining records and for partition.key",
        )
    chosen = [record for its in found.values() for record in its]
    model, _ = train_model(config, records=chosen, executor=executor, report=report, allow_deleted=True)
    return _compared(model, certified)


def apart(config: RunConfig, key_file: Path, directory: Path) -> RunConfig:
    """Return the operator's run file for a directory of the second party's own.

    What changes affects no byte of an adapter: where things are stored, encryption, the index.
    """
    changed: dict[str, Any] = {
        "output_dir": directory / "model",
        "witness": directory / "witness",
        "storage": None,
        "encrypt": False,
        "keyring": None,
        "sisa": config.sisa.model_copy(update={"partition_key_file": key_file, "embedder": "hashing"}),
    }
    if isinstance(config.base_model, ScratchBase):  # by default it lies beside `output_dir`
        block = config.base_model.scratch.model_copy(update={"directory": Path(config.base)})
        changed["base_model"] = ScratchBase(scratch=block)
    return config.model_copy(update=changed)


def _compared(model: Model, certified: Sequence[Served]) -> Rebuild:
    with model.context() as context:
        ledger, here = context.stores.ledger, context.compute.fingerprint
        rebuilt = {each.shard: each.sha256 for each in served_by(ledger)}
        shards = []
        for each in certified:
            path = jobs(each.shard, ledger.slices(each.shard), context.recipe, each.fingerprint)
            same = each.fingerprint == here
            shards.append(
                RebuiltShard(each.shard, each.sha256, rebuilt[each.shard], each.key, path[-1].key, same)
            )
        return Rebuild(tuple(shards), here, sum(ledger.counts().values()))


def rebuild_statement(found: Rebuild, certificate: Certificate, at: str) -> dict[str, Any]:
    """Return what the second party signs."""
    subject = [
        {"name": f"shard-{each.shard:05d}", "digest": {"sha256": each.rebuilt}} for each in found.shards
    ]
    predicate = {
        "model": certificate.statement["predicate"]["model"],
        "certificate": certificate.sha256,
        "entry": certificate.index,
        "at": at,
        "verdict": found.verdict,
        "fingerprint": found.fingerprint,
        "num_records": found.num_records,
        "shards": [asdict(each) | {"verdict": each.verdict} for each in found.shards],
    }
    return statement(subject, REBUILD, predicate)


def add_rebuild(model: Model, envelope: bytes, public_key: StatementKey) -> int:
    """Log a second party's statement beside the model's own, and return the number of its entry.

    Raise Refused unless that key signed it and it is about a certificate of this log.
    """
    keys = keys_of(model)
    parties = replace(keys.public, statement_keys=(replace(public_key, since=0, until=None),))
    stated = verify_envelope(envelope, parties)
    predicate = stated["predicate"] if stated["predicateType"] == REBUILD else {}
    with model.writing() as context:
        log = log_for_writing(keys, context.stores.blobs[LOG])
        logged = {each.sha256: each for each in log.entries()}
        known = logged.get(predicate.get("certificate", ""))
        if predicate.get("model") != model.id or known is None:
            raise Refused(
                "the rebuild is not of this model's certificates",
                expected=f"a certificate in the log of {model.id}",
                got=str(predicate.get("certificate"))[:64],
            )
        return log.append(envelope, REBUILD)
