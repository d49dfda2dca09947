"""State what checks of a model found, and how its adapters were trained: predicates that in-toto vetted.

    verify_and_log    verify a model; the result is stated as test-result v0.1
    sweep_and_log     scan a model for traces; the result is stated as test-result v0.1
    log_hand_out      that a person was given what is held of them, or its recipients
    log_provenance    how the served adapters were trained, as SLSA Provenance v1

The predicate is `test-result` and not `svr`, which can't express a failure. Subjects are the adapters
that are served. Results name shards, kinds and numbers: no id, no text and no path. Logging a result
does not affect the check itself.

>>> sweep_results(Scan(True, ("model",), {"files": 9, "strings": 0}, (), ())).passed
['no trace of a deleted record (files: 9, places: 1)']
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from sisa.audit.residue import Scan, sweep_model
from sisa.audit.verify import EMPTY, NOT_REQUESTED, Replay, Verification
from sisa.core.digest import Keyed, digest_of, sha256_hex
from sisa.core.domain import HeldCheckpoint, WitnessHead
from sisa.core.errors import SisaError
from sisa.core.patches import active
from sisa.evidence.database import Logged, parse_logged
from sisa.evidence.hook import hook_of
from sisa.evidence.issuing import served_by
from sisa.evidence.keys.model_keys import keys_of, log_for_writing
from sisa.evidence.log.log import statement_in
from sisa.evidence.statements import (
    PROVENANCE,
    SHARD_TRAINING,
    Results,
    Served,
    access_predicate,
    decimal,
    statement,
    subject_of,
)
from sisa.flows.context.context import Context
from sisa.flows.context.served import held_state
from sisa.flows.wiring.wiring import has_evidence
from sisa.lm.base.numerics import LIBRARIES, PROCEDURE_VERSION
from sisa.model import Model
from sisa.store.areas import LOG
from sisa.verifier.certificate import CHAINED, TEST_RESULT, URN
from sisa.verifier.envelope import Refused

Right = Literal["access", "recipients"]
NO_KEYS = "the model has no keys: `sisa keys init` makes them"
CHANGED = "the model changed meanwhile: run the command again"


@dataclass(frozen=True)
class Stated:
    """The entry of a result in the log; without one, `not_logged` says why."""

    entry: int | None = None
    result: str = ""
    not_logged: str = ""


def verify_and_log(
    model: Model,
    replay: Replay,
    shard: int | None = None,
    *,
    require_replay: bool = False,
    anchor: WitnessHead | None = None,
) -> tuple[Verification, Stated]:
    """Verify a model with a replay, and log the result."""
    held = model.held_state()
    found = model.verify(replay, shard, require_replay=require_replay, anchor=anchor)
    return found, _log(model, "replay", replay_results(found), held)


def sweep_and_log(
    model: Model, *, also: Sequence[Path] = (), ids: Sequence[str] = (), texts: Sequence[str] = ()
) -> tuple[Scan, Stated]:
    """Scan a model for traces, and log the result."""
    held = model.held_state()
    found = sweep_model(model, also=also, ids=ids, texts=texts)
    return found, _log(model, "sweep", sweep_results(found), held)


def replay_results(found: Verification) -> Results:
    """Return the results of a verification, shard by shard."""
    passed, warned, failed = list[str](), list[str](), list[str]()
    for each in found.shards:
        name = f"shard-{each.shard:05d}"
        comparisons = {
            "trained from scratch": each.equal,
            "trained stage by stage, each in its own process": each.equal_apart,
        }
        for how, equal in comparisons.items():
            if equal:
                passed.append(f"{name} {how}: equal bytes")
            elif equal is False:
                failed.append(f"{name} {how}: other bytes")
        if not each.replayed and each.reason not in (NOT_REQUESTED, EMPTY):
            warned.append(f"{name} not replayed: {each.reason}")
    if found.ok:
        passed.append(f"stored files have the recorded bytes (files: {found.files_checked})")
    else:
        failed.append(f"findings: {len(found.findings)}")
    return Results(passed, warned, failed)


def sweep_results(found: Scan) -> Results:
    """Return the results of a scan, in numbers alone."""
    counts, kinds = found.scanned, Counter(each.kind for each in found.residue)
    failed = [f"traces of kind {kind}: {number}" for kind, number in sorted(kinds.items())]
    passed = []
    if not failed:
        where = f"files: {counts['files']}, places: {len(found.places)}"
        passed.append(f"no trace of a deleted record ({where})")
    if counts["strings"] and not kinds["string"]:
        passed.append(f"no given id or text (strings: {counts['strings']})")
    short = counts.get("strings_too_short_for_raw_bytes")
    warned = [f"too short for raw bytes, compared with values alone (strings: {short})"] if short else []
    return Results(passed, warned, failed)


def _log(model: Model, check: str, results: Results, held: str) -> Stated:
    """Sign and log results of a check, unless the model's state is no longer `held`."""
    if not has_evidence(model.directory, model.config, model.id):
        return Stated(not_logged=NO_KEYS)
    try:
        keys = keys_of(model)
        with model.writing() as context:
            if held_state(context.stores.ledger) != held:
                return Stated(not_logged=CHANGED)
            version = metadata.version("deletion-ready-model")
            noted = {"model": model.id, "at": context.now(), "package": version}
            run = {"name": check, "uri": f"{URN}{check}:v1", "annotations": noted}
            predicate = results.predicate([run])
            envelope = keys.sign(statement(served_subject(context), TEST_RESULT, predicate))
            entry = log_for_writing(keys, context.stores.blobs[LOG]).append(envelope, TEST_RESULT)
    except (SisaError, Refused) as error:
        return Stated(not_logged=error.what)
    return Stated(entry, results.result)


def served_subject(context: Context) -> list[dict[str, Any]]:
    """Return what the model serves now, as statements name it."""
    ledger = context.stores.ledger
    return subject_of(served_by(ledger), active(ledger.patches()), context.settings.base)


def log_hand_out(model: Model, right: Right, data: bytes, named: Iterable[str]) -> Stated:
    """State that a file was given to a person, who is named by their subject or by ids.

    The statement has the sha256 of the file and numbers. If another process writes, it is made when that
    has ended.
    """
    if not has_evidence(model.directory, model.config, model.id):
        return Stated(not_logged=NO_KEYS)
    hook = hook_of(model)
    sha256, found = sha256_hex(data), json.loads(data)
    counts = {f"num_{name}": len(found.get(name, ())) for name in ("records", "deleted", "recipients")}
    predicate = access_predicate(Keyed(model.secret), right, named, found["made_at"], counts)
    try:
        hook.tables.put_given(sha256, predicate)
        with model.writing() as context:
            made = hook.issue(context)
    except (SisaError, Refused) as error:
        return Stated(not_logged=f"pending ({error.what})")
    entry = next((each.sequence for each in made if each.about == sha256), None)
    return Stated(entry, right, "" if entry is not None else "it is stated already")


def log_provenance(model: Model) -> list[Logged]:
    """State how the served adapters were trained, once for each numerics fingerprint.

    Return these statements; those that the log has already are not signed again. Raise SisaError.
    """
    keys = keys_of(model)
    with model.writing() as context:
        log = log_for_writing(keys, context.stores.blobs[LOG])
        known = hook_of(model).tables.logged(log)
        served_now = digest_of(served_subject(context))
        first = next((e for e in known if e.kind in CHAINED and e.subject == served_now), None)
        state = statement_in(log.statement(first.sha256))["predicate"] if first else {}
        served = served_by(context.stores.ledger)
        stated, made = [each for each in known if each.kind == PROVENANCE], []
        for fingerprint in sorted({each.fingerprint for each in served}):
            adapters = [each for each in served if each.fingerprint == fingerprint]
            subject = subject_of(adapters, (), context.settings.base)
            same = [e for e in stated if statement_in(log.statement(e.sha256))["subject"] == subject]
            if same:
                made.append(same[-1])
                continue
            predicate = provenance_predicate(context, model, adapters, state)
            envelope = keys.sign(statement(subject, PROVENANCE, predicate))
            entry = log.append(envelope, PROVENANCE)
            made.append(parse_logged(entry, PROVENANCE, envelope))
    return made


def provenance_predicate(
    context: Context, model: Model, served: Sequence[Served], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the predicate of SLSA Provenance v1 for adapters of one fingerprint; `state` stated them.

    The run file is named by a digest, records by the root of their tree: nobody's data is in it.
    """
    recipe, fingerprint = context.recipe, served[0].fingerprint
    settings = [recipe.num_slices, recipe.schedule, recipe.num_epochs, dict(recipe.training)]
    held = {each.key: each for each in context.stores.ledger.checkpoints()}
    named = {"base": context.settings.base, "embedder": model.embedder.digest}
    named |= {f"patch-{e.version}": e.adapter_sha256 for e in active(context.stores.ledger.patches())}
    named["records"] = state.get("membership", {}).get("after", "")
    dependencies: list[dict[str, Any]] = [
        {"name": name, "digest": {"sha256": sha256}} for name, sha256 in named.items() if sha256
    ]
    code: dict[str, str] = {}
    if fingerprint == context.compute.fingerprint:  # it alone is known of another environment
        code["deletion-ready-model"] = metadata.version("deletion-ready-model")
        code["procedure"] = str(PROCEDURE_VERSION)
        packages = {name: f"pkg:pypi/{name}@{metadata.version(name)}" for name in LIBRARIES}
        dependencies += [{"name": name, "uri": uri} for name, uri in packages.items()]
    return {
        "buildDefinition": {
            "buildType": SHARD_TRAINING,
            "externalParameters": {
                "settings": {"digest": {"sha256": digest_of(settings)}},
                "shards": [each.shard for each in served],
            },
            "internalParameters": {
                "adapters": {f"shard-{each.shard:05d}": _cost(held[each.key]) for each in served}
            },
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": {"id": f"{URN}numerics:{fingerprint}", "version": code},
            "metadata": {
                "invocationId": f"{URN}{model.id}:{state.get('sequence', '')}",
                **({"finishedOn": state["issued_at"]} if state else {}),
            },
        },
    }


def _cost(held: HeldCheckpoint) -> dict[str, Any]:
    """Return what the last stage of an adapter cost; `job` names all that it depends on."""
    return {"job": held.key, "record_epochs": held.record_epochs, "seconds": decimal(held.seconds)}
