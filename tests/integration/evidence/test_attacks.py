"""What an operator may try, and which check catches it: each attack is carried out on a real model.

The table in `sisa/evidence/README.md` is the one that these tests carry out. Where nothing catches an
attack, a test shows that, too.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import cli
from cluster.render.result import EXIT_ACT, EXIT_INTEGRITY
from sisa.audit.residue import sweep_model
from sisa.config.paths import state_dir
from sisa.core.checkpoint_files import ADAPTER_FILE, MANIFEST_FILE
from sisa.core.digest import Keyed
from sisa.core.domain import RecordRow
from sisa.core.errors import EnvironmentFault
from sisa.core.event_chain import chained
from sisa.core.ports import Change, merged
from sisa.core.requests import RequestEvent
from sisa.evidence.keys.keys import Keys, create_keys
from sisa.evidence.keys.model_keys import PUBLIC_KEYS, rotate
from sisa.evidence.keys.vrf_key import VrfKey
from sisa.evidence.log.cosigning import cosign, new_cosigner_key
from sisa.evidence.log.log import SIGNED, Log
from sisa.evidence.log.published import log_reader
from sisa.evidence.membership import Membership
from sisa.evidence.open_evidence import certificate_file, membership_file, receipt_file
from sisa.evidence.revocations import FEED, publish
from sisa.flows.context.commit import commit
from sisa.flows.deletion import _write_remaining, plan_forget
from sisa.flows.locations import lookup
from sisa.flows.reconcile import reconcile
from sisa.flows.requests import Terms
from sisa.flows.wiring import wiring
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.store.areas import CHECKPOINTS
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier.certificate import (
    CERTIFICATES,
    STATE,
    log_entry,
    verify_certificate,
    verify_receipt,
)
from sisa.verifier.envelope import PublicKeys, Refused, canonical, strict_json
from sisa.verifier.membership import LABEL_BYTES, verify_absent, verify_membership, verify_present
from sisa.verifier.vrf import verify_output
from tests.fakes.ports import SECRET
from tests.integration.evidence.conftest import Operator, certify
from tests.models import rewriting
from tests.models.confessing import record
from tests.models.rewriting import change, date_back, take_witness_away

README = Path(__file__).resolve().parents[3] / "sisa" / "evidence" / "README.md"
NOBODY = "nothing"
ATTACKS: dict[str, str] = {}  # what the operator does, and what catches it: the table of the README


def attack(what: str, caught_by: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Put an attack, which the test carries out, into the table."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        ATTACKS[what] = caught_by
        return test

    return register


def test_an_honest_operator_passes(operator: Operator) -> None:
    found = operator.audit(operator.keep(), sample=2)
    assert [each for each in found.checks if each.result != "passed"] == []
    assert len(found.shards) == 2


def test_an_honest_operator_passes_whatever_has_happened(operator: Operator) -> None:
    kept, model = operator.keep(), operator.model
    model.forget([record(5).id], defer=True)
    assert operator.failed(kept) == set()  # erased, not trained, not certified yet
    model.run()
    model.add([record(30), record(31)])
    for number in (6, 7):
        model.submit([record(number).id], terms=Terms(approver="a person"))
    model.run()
    model.add([record(5)], allow_deleted=True)
    rotate(model)
    operator.forget(30, 31, 8)
    operator.forget(*operator.numbers)
    assert operator.numbers == []
    assert operator.failed(kept, sample=9) == set()


def test_the_readme_has_the_table_of_these_attacks() -> None:
    rows = [f"| {what} | {caught_by} |" for what, caught_by in ATTACKS.items()]
    assert "\n".join(["| the operator | caught by |", "| --- | --- |", *rows, ""]) in README.read_text()


# --- records -------------------------------------------------------------------------------------


def proof_of(operator: Operator, number: int) -> tuple[bytes, bytes, dict[str, Any]]:
    """Return the root of the tree, a record's label, and the operator's honest proof."""
    name, keys = record(number).id.encode(), operator.keys
    tree = Membership(operator.directory / wiring.EVIDENCE, keys.vrf_secret)
    proof = tree.prove(record(number).id)
    return (
        bytes.fromhex(tree.root),
        verify_output(keys.public.vrf, name, bytes.fromhex(proof["vrf"]))[:LABEL_BYTES],
        proof,
    )


@attack("says of a held record that it is absent", "the membership proof")
def test_a_held_record_is_denied(operator: Operator) -> None:
    root, label, proof = proof_of(operator, 5)
    path = [bytes.fromhex(each) for each in proof["path"]]
    value = canonical(proof["leaf"])
    verify_present(root, label, value, path)
    for siblings in (path, path[:-1], []):
        for neighbour in (None, (label, sha256(value).digest()), (bytes(32), sha256(value).digest())):
            with pytest.raises(Refused):
                verify_absent(root, label, siblings, neighbour)


@attack("proves with the label of another record", "the VRF's proof")
def test_a_label_is_false(operator: Operator) -> None:
    deleted = operator.keys.public.vrf, record(3).id.encode()  # absent, so its label would do
    proof = bytes.fromhex(proof_of(operator, 3)[2]["vrf"])
    verify_output(*deleted, proof)
    other = record(5).id.encode()
    for false in (proof, VrfKey(bytes(32)).prove(other)):  # another key's proof of the right id
        with pytest.raises(Refused):
            verify_output(operator.keys.public.vrf, other, false)


@attack("leaves a held record out of the tree", "`sisa audit`: membership")
def test_a_held_record_is_left_out_of_the_tree(operator: Operator) -> None:
    tree = Membership(operator.directory / wiring.EVIDENCE, operator.keys.vrf_secret)
    _, label, _ = proof_of(operator, 5)
    with tree._tree(write=True) as tables:
        tables.replace([label], [])
    certify(operator)  # so the false root is the certified one
    assert operator.failed() == {"membership"}


@attack("answers by an older state, in which a record was there or not", "`sisa verify-proof`: `--log`")
def test_an_answer_is_old(operator: Operator, tmp_path: Path) -> None:
    proof, keys = tmp_path / "proof.json", tmp_path / "keys.json"
    proof.write_bytes(membership_file(operator.model, record(5).id))
    keys.write_bytes(operator.keys.public_file)
    check = ["verify-proof", str(proof), "--key", str(keys)]
    assert cli.run([*check, "--log", str(operator.log)]) == 0
    operator.forget(5)
    assert cli.run([*check, "--log", str(operator.log)]) == EXIT_INTEGRITY
    assert cli.run(check) == 0  # it says of which time it is


@attack("dates a record falsely in the tree", NOBODY)
def test_a_record_is_dated_falsely(operator: Operator) -> None:
    tree = Membership(operator.directory / wiring.EVIDENCE, operator.keys.vrf_secret)
    _, label, _ = proof_of(operator, 5)
    with tree._tree(write=True) as tables:
        row = tables.db.execute("SELECT * FROM leaves WHERE label = ?", (label,)).fetchone()
        tables.replace([label], [(*row[:4], "2001-01-01")])
    certify(operator)
    answer = verify_membership(membership_file(operator.model, record(5).id), operator.keys.public)
    assert answer.present is not None
    assert answer.present["since"] == "2001-01-01"
    assert operator.failed() == set()


@attack("deletes records without a request", "`sisa audit`: chain")
def test_records_vanish_without_a_request(operator: Operator) -> None:
    with operator.model.writing() as context:
        (row,) = lookup(context, [record(5).id])
        assert isinstance(row, RecordRow)
        plan = plan_forget(context, [row])
        heads, emptied = [each.head for each in plan.plans], plan.emptied
        gone = Change(removed=plan.removed, dropped=plan.tainted, heads=heads, emptied=emptied)
        commit(context, merged([gone, _write_remaining(context, plan)]))
        reconcile(context)
    assert operator.failed() == {"chain"}


@attack("gives a receipt for another record", "the receipt")
def test_a_receipt_is_made_out_to_another_record(operator: Operator) -> None:
    request, other = operator.forget(5), operator.forget(6)
    keys = operator.keys.public
    certificate = verify_certificate(certificate_file(operator.model, request), keys)
    receipt = receipt_file(operator.model, request, record(5).id)
    assert verify_receipt(receipt, certificate, keys) == record(5).id
    renamed = canonical(strict_json(receipt, "it") | {"id": record(6).id}) + b"\n"
    for false in (renamed, receipt_file(operator.model, other, record(6).id)):
        with pytest.raises(Refused):
            verify_receipt(false, certificate, keys)


# --- certificates --------------------------------------------------------------------------------


@attack("issues a certificate of a deletion that never was", "`sisa audit`: certificates")
def test_a_certificate_without_a_deletion(operator: Operator) -> None:
    def invented(predicate: dict[str, Any]) -> None:
        predicate["request"]["id"] = "req-invented"

    state_again(operator, invented)
    assert operator.failed() == {"certificates"}


def state_again(operator: Operator, change: Callable[[dict[str, Any]], None]) -> None:
    """Sign and log the last certificate once more, with changes that fit into the chain."""
    keys, log = operator.keys, Log(LocalBlobs(operator.log), operator.keys)
    last = [each for each in log.entries() if each.predicate_type in CERTIFICATES][-1]
    statement = payload(log.statement(last.sha256))
    predicate = statement["predicate"]
    predicate |= {"sequence": log.size, "previous": last.sha256}
    predicate["membership"]["before"] = predicate["membership"]["after"]
    change(predicate)
    log.append(keys.sign({name: statement[name] for name in STATED}), last.predicate_type)


STATED = ("subject", "predicateType", "predicate")


def payload(envelope: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(b64decode(json.loads(envelope)["payload"]))
    return found


@attack("never issues a certificate", "`sisa audit`: certificates")
def test_a_certificate_is_withheld(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> bytes:
        raise EnvironmentFault("the signer does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Keys, "sign", fails)
        operator.forget(5)
    assert operator.failed() == {"certificates", "heads", "membership"}


@attack("re-signs a certificate with another key", "the signature")
def test_a_certificate_is_signed_again_by_another_key(operator: Operator, tmp_path: Path) -> None:
    request = operator.forget(5)
    forged, _ = signed_elsewhere(operator, request, tmp_path)
    honest = strict_json(certificate_file(operator.model, request), "it")
    mixed = canonical(honest | {"envelope": strict_json(forged, "it")["envelope"]}) + b"\n"
    for each in (forged, mixed):
        with pytest.raises(Refused):
            verify_certificate(each, operator.keys.public)


@attack("hands out other keys with other evidence", f"{NOBODY}, unless the keyid comes another way")
def test_all_evidence_is_under_other_keys(operator: Operator, tmp_path: Path) -> None:
    forged, keys = signed_elsewhere(operator, operator.forget(5), tmp_path)
    verify_certificate(forged, keys)
    assert keys.present.keyid != operator.keys.present.keyid


def signed_elsewhere(operator: Operator, request: str, at: Path) -> tuple[bytes, PublicKeys]:
    """Return a request's certificate, signed and logged by other keys, and these."""
    file = strict_json(certificate_file(operator.model, request), "it")
    other, statement = create_keys(at / "other", operator.keys.model), payload(file["envelope"].encode())
    envelope, kind = other.sign({name: statement[name] for name in STATED}), statement["predicateType"]
    log, index = Log(LocalBlobs(at / "log"), other), statement["predicate"]["sequence"]
    for number in range(index):
        log.append(b"%d" % number, STATE)
    assert log.append(envelope, kind) == index
    entry = log_entry(sha256(envelope).hexdigest(), kind).decode()
    forged = {**file, "envelope": envelope.decode(), "entry": entry, "proof": log.proof(index).decode()}
    return canonical(forged) + b"\n", other.public


@attack("dates a certificate before the statement that precedes it", "`sisa audit`: chain")
def test_a_certificate_is_dated_back(operator: Operator) -> None:
    def earlier(predicate: dict[str, Any]) -> None:
        predicate["issued_at"] = "2001-01-01T00:00:00.000+00:00"

    state_again(operator, earlier)
    assert "chain" in operator.failed()


@attack("writes down a request with a false time of arrival", NOBODY)
def test_a_request_is_dated_when_it_is_written_down(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wiring, "_now", lambda: "2999-01-01T00:00:00.000+00:00")  # years too late
    request = operator.forget(5)
    monkeypatch.undo()
    assert operator.failed() <= {"doctor"}  # which warns of a clock alone
    certified = verify_certificate(certificate_file(operator.model, request), operator.keys.public)
    assert certified.statement["predicate"]["request"]["times"]["received"].startswith("2999")


# --- what is served ------------------------------------------------------------------------------


def serve_another(operator: Operator, number: int) -> None:
    """Replace the adapter that a record's shard serves, with all digests that lead to it."""
    model = operator.model
    shard = model.where([record(number).id])[0].shard
    (head,) = (each for each in model.status().shards if each.shard == shard)
    folder = operator.directory / CHECKPOINTS / str(head.head)
    adapter = (folder / ADAPTER_FILE).read_bytes() + b" "
    (folder / ADAPTER_FILE).write_bytes(adapter)
    manifest = (folder / MANIFEST_FILE).read_bytes()
    changed = manifest.replace(str(head.adapter_sha256).encode(), sha256(adapter).hexdigest().encode())
    assert changed != manifest
    (folder / MANIFEST_FILE).write_bytes(changed)
    digests = {
        "adapter_sha256": sha256(adapter).hexdigest(),
        "manifest_sha256": sha256(changed).hexdigest(),
    }
    with closing(sqlite3.connect(operator.directory / LEDGER)) as connection:
        change(connection, "checkpoints", {"key": head.head}, **digests)
        connection.commit()


@attack("serves another adapter than the certified one", "`sisa audit`: heads, replay")
def test_another_adapter_is_served(operator: Operator) -> None:
    serve_another(operator, 5)
    assert operator.failed() == {"heads"}
    assert operator.failed(sample=2) == {"heads", "replay"}


@attack("certifies an adapter that was trained on other records", "`sisa audit`: replay; `sisa rebuild`")
def test_an_adapter_of_other_records_is_certified(operator: Operator) -> None:
    serve_another(operator, 5)
    certify(operator)
    assert operator.failed() == set()  # no shard was drawn
    assert operator.failed(sample=2) == {"replay"}


@attack(
    "keeps a copy of the model or of an export elsewhere, and answers from it",
    f"{NOBODY}; `sisa sweep --also` where it is, and `sisa check-adapter` for who holds it",
)
def test_a_copy_is_kept(operator: Operator, tmp_path: Path) -> None:
    shutil.copytree(operator.directory / CHECKPOINTS, tmp_path / "copy")
    operator.forget(5)
    assert operator.failed(sample=2) == set()
    found = sweep_model(operator.model, also=[tmp_path / "copy"])
    assert {each.kind for each in found.residue} == {"tainted"}


@attack(
    "leaves an adapter out of the feed of revocations, or hands out an old feed",
    "`sisa check-adapter`: `--log`, or `--not-older-than` with a feed that somebody kept",
)
def test_a_revocation_is_withheld(operator: Operator, tmp_path: Path) -> None:
    def check(feed: Path, *options: str | Path) -> int:
        given = ["--feed", feed, "--key", operator.log / PUBLIC_KEYS, *options]
        return cli.run([str(each) for each in ("check-adapter", tmp_path / "copy", *given)])

    shutil.copytree(operator.directory / CHECKPOINTS, tmp_path / "copy")
    old, short, honest = tmp_path / "old.json", tmp_path / "short.json", operator.log / FEED
    publish(operator.model, old)
    operator.forget(5)
    publish(operator.model)
    assert check(honest, "--log", operator.log) == EXIT_ACT
    statement = json.loads(b64decode(json.loads(honest.read_bytes())["payload"]))
    statement["predicate"]["revoked"] = {}
    short.write_bytes(operator.keys.sign(statement))
    for withholding in (old, short):
        assert check(withholding) == 0
        assert check(withholding, "--log", operator.log) == EXIT_INTEGRITY
        assert check(withholding, "--not-older-than", honest) == EXIT_INTEGRITY


# --- the log -------------------------------------------------------------------------------------


@attack("drops a certificate from what is published", "`sisa audit`: chain")
def test_a_certificate_is_dropped(operator: Operator) -> None:
    last = list(Log(LocalBlobs(operator.log), operator.keys).entries())[-1]
    (operator.log / f"statements/{last.sha256}.json").unlink()
    assert "chain" in operator.failed()


@contextmanager
def new_log(operator: Operator, at: Path) -> Iterator[tuple[Log, list[tuple[str, bytes]]]]:
    """Yield an empty log under the model's keys, and what its log states; then put it in its place."""
    keys = operator.keys
    old = Log(LocalBlobs(operator.log), keys)
    listed = [(each.predicate_type, old.statement(each.sha256)) for each in old.entries()]
    (at / "keys").mkdir()
    made = Log(LocalBlobs(at / "log"), replace(keys, directory=at / "keys"))
    yield made, listed
    shutil.rmtree(operator.log)
    shutil.copytree(at / "log", operator.log)
    (operator.log / PUBLIC_KEYS).write_bytes(keys.public_file)
    shutil.copy(at / "keys" / SIGNED, keys.directory)  # what the keys remember is set back as well


@attack("reorders the log, and signs it anew", "`sisa audit`: chain; a checkpoint that somebody kept")
def test_the_log_is_reordered(operator: Operator, tmp_path: Path) -> None:
    kept = operator.keep()
    with new_log(operator, tmp_path) as (log, listed):
        for kind, envelope in reversed(listed):
            log.append(envelope, kind)
    assert "chain" in operator.failed()
    assert "log" in operator.failed(kept)


@attack("rewrites the log from its beginning, and signs it anew", "a checkpoint that somebody kept")
def test_the_log_is_rewritten(operator: Operator, tmp_path: Path) -> None:
    kept = operator.keep()
    with new_log(operator, tmp_path) as (log, listed):
        kind, envelope = listed[-1]
        statement = payload(envelope)
        first = {"sequence": 0, "previous": ""}
        statement["predicate"] |= first
        statement["predicate"]["membership"]["before"] = ""
        log.append(operator.keys.sign({name: statement[name] for name in STATED}), kind)
    assert "log" in operator.failed(kept)


@attack("forks the log for two audiences", "two checkpoints that are compared; a cosigner's signature")
def test_the_log_is_forked(operator: Operator, tmp_path: Path) -> None:
    private, _ = new_cosigner_key("witness.example/1")
    state, log_key = tmp_path / "seen", operator.keys.public.log
    cosign(log_reader(str(operator.log)), log_key, private, state)
    saved = save(operator, tmp_path / "saved", memory=True)
    operator.forget(5)
    one = operator.keep()
    cosign(log_reader(str(operator.log)), log_key, private, state)
    saved()
    operator.forget(6)
    assert operator.failed() == set()  # each audience alone sees a whole log
    assert operator.failed(one) == {"log"}
    with pytest.raises(Refused):
        cosign(log_reader(str(operator.log)), log_key, private, state)


# --- backups and the ledger ----------------------------------------------------------------------


def save(
    operator: Operator, at: Path, *, witness: bool = False, memory: bool = False
) -> Callable[[], None]:
    """Make a backup; return what restores it. `memory`: what the keys remember, and the witness, too."""
    places = [operator.directory]
    places += [state_dir() / "witness"] if witness or memory else []
    places += [operator.keys.directory] if memory else []
    for number, each in enumerate(places):
        shutil.copytree(each, at / str(number))

    def restore() -> None:
        for number, each in enumerate(places):
            shutil.rmtree(each)
            shutil.copytree(at / str(number), each)

    return restore


@attack("restores a backup of the model", "the witness, which deletes again; `sisa audit`: log")
def test_a_backup_is_restored(operator: Operator, tmp_path: Path) -> None:
    restore = save(operator, tmp_path / "saved")
    operator.forget(5)
    restore()
    assert {"doctor", "log"} <= operator.failed()
    (found,) = operator.model.where([record(5).id])
    assert found.state == "deleted"


def test_a_backup_that_has_caught_up_with_witness_and_log_passes(
    operator: Operator, tmp_path: Path
) -> None:
    restore = save(operator, tmp_path / "saved")
    operator.forget(5)
    shutil.copytree(operator.log, tmp_path / "published")
    restore()
    shutil.copytree(tmp_path / "published", operator.log, dirs_exist_ok=True)
    operator.model.run()
    assert operator.failed(sample=2) == set()


@attack("restores a backup of the model and its witness", "`sisa audit`: log (the keys remember)")
def test_a_backup_is_restored_with_its_witness(operator: Operator, tmp_path: Path) -> None:
    restore = save(operator, tmp_path / "saved", witness=True)
    operator.forget(5)
    restore()
    (found,) = operator.model.where([record(5).id])
    assert found.state == "trained"
    assert operator.failed() == {"log"}


@attack(
    "restores a backup of the model, its witness and its keys",
    f"a checkpoint or a certificate that somebody kept; else {NOBODY}",
)
def test_all_is_restored(operator: Operator, tmp_path: Path) -> None:
    restore = save(operator, tmp_path / "saved", memory=True)
    operator.forget(5)
    kept = operator.keep()
    restore()
    assert operator.failed() == set()
    restore()
    assert operator.failed(kept) == {"log"}


@attack("edits the ledger together with its checksums", "`sisa audit`: replay (the chain of events)")
def test_the_ledger_is_edited_without_the_partition_key(operator: Operator) -> None:
    take_witness_away(operator.directory)
    date_back(operator.directory, "the change on")
    assert "replay" in operator.failed()


@attack("edits the ledger under the partition key", "`sisa audit`: certificates")
def test_the_ledger_is_edited_under_the_key(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    take_witness_away(operator.directory)
    keyed = Keyed(SECRET)

    def under_the_key(link: str, event: RequestEvent) -> str:
        return keyed.digest("event", chained(link, event))

    monkeypatch.setattr(rewriting, "chained", under_the_key)
    date_back(operator.directory, "the first on")
    assert operator.failed() == {"certificates"}
