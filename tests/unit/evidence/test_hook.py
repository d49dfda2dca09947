"""The hook that issues certificates, over fakes: what is stated, when, and after a failure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from google.protobuf.json_format import ParseDict
from in_toto_attestation.predicates.test_result.v0.test_result_pb2 import TestResult as ResultPb

from sisa.core.errors import EnvironmentFault
from sisa.core.patches import Patch, PatchJob
from sisa.core.ports import Change
from sisa.evidence import issuing
from sisa.evidence.database import EvidenceTables
from sisa.evidence.keys.keys import Keys
from sisa.evidence.log.log import Log
from sisa.evidence.statements import APPROX_REPORT, Draft
from sisa.flows.context.commit import commit
from sisa.flows.export import export_adapters
from sisa.flows.patches.patching import Wish, make_wanted, want
from sisa.flows.reconcile import reconcile
from sisa.flows.restored_backup import catch_up
from sisa.store.areas import LOG
from sisa.verifier.certificate import (
    CERTIFICATES,
    EXACT,
    MIXED,
    REBUILD,
    RECTIFICATION,
    STATE,
    TEST_RESULT,
)
from tests.crash import fuses
from tests.fakes.ports import changed, fake_record
from tests.models.certified import SCHEMA, VALIDATOR, Certified, certified, statements_of
from tests.property.histories import COMMITS, Saved, effects_of


@pytest.fixture
def model(tmp_path: Path) -> Certified:
    return certified(tmp_path)


def statements(model: Certified) -> list[dict[str, Any]]:
    return statements_of(Path(model.fake.context.stores.blobs[LOG].location()), model.keys.public)


def certificates(model: Certified) -> list[dict[str, Any]]:
    """Return what certificates state."""
    return [each["predicate"] for each in statements(model) if each["predicateType"] in CERTIFICATES]


def kinds(model: Certified) -> list[str]:
    return [each["predicateType"] for each in statements(model)]


def test_a_training_a_deletion_and_an_addition_are_stated(model: Certified) -> None:
    assert kinds(model) == [STATE]
    words: dict[str, Any] = {"reason": "secret words", "external_id": "T-17", "approver": "a person"}
    request = model.forget(1, 2, 3, **words)
    model.add(100)
    found = statements(model)
    assert [each["predicateType"] for each in found] == [STATE, EXACT, STATE]
    stated = found[1]["predicate"]
    assert stated["request"]["id"] == request.request_id
    assert stated["commitments"]["number"] == 3
    assert stated["membership"]["before"] == found[0]["predicate"]["membership"]["after"]
    assert [each["predicate"]["membership"]["num_records"] for each in found] == [12, 9, 10]
    assert not model.notices
    text = json.dumps(found)
    assert not any(each in text for each in words.values())


def test_the_subjects_are_the_heads_that_are_served(model: Certified) -> None:
    model.forget(1)
    held = {each.key: each.adapter_sha256 for each in model.fake.ledger.checkpoints()}
    served = {f"shard-{h.shard:05d}": held[h.key] for h in model.fake.ledger.heads() if h.key}
    subject = statements(model)[-1]["subject"]
    assert {each["name"]: each["digest"]["sha256"] for each in subject} == served
    model.forget(*range(12))
    assert [each["name"] for each in statements(model)[-1]["subject"]] == ["base"]


def test_what_was_erased_is_named_without_plain_digests(model: Certified) -> None:
    rows = model.fake.rows(1)
    files = [each.sha256 for each in model.fake.ledger.slices(rows[0].shard)]
    keys = [each.key for each in model.fake.ledger.checkpoints(rows[0].shard)]
    model.forget(1)
    stated = statements(model)[-1]["predicate"]
    found = {each["what"]: len(each["digests"]) for each in stated["erased"]}
    assert {"index row", "slice file", "index file", "checkpoint", "optimizer state"} <= found.keys()
    assert found["checkpoint"] == found["optimizer state"] == stated["touched"][0]["checkpoints"]
    text = json.dumps(stated["erased"])
    assert not any(each in text for each in [*files, *keys, rows[0].id_digest, rows[0].text_digest])


def test_what_other_hooks_erase_is_stated(model: Certified) -> None:
    """Two patches have records in their retain sets, and the second one is on top of the first."""
    context, digest = model.fake.context, model.fake.context.settings.chain.keyed.digest
    for number, kept in ((50, 3), (51, 5)):
        want(context, Wish({"method": "npo"}, [fake_record(number)], [fake_record(kept)], "asked"))
        make_wanted(context)
    sets = [each.name for each in model.fake.ledger.vault() if each.role == "retain"]
    first, second = model.fake.ledger.patches()
    model.forget(5)
    model.forget(7)
    model.forget(3)
    stated = [
        {each["what"]: each for each in predicate["erased"] if each["shard"] == -1}
        for predicate in certificates(model)
    ]
    assert [set(each) for each in stated] == [{"retain set", "patch"}, set(), {"retain set", "patch"}]
    assert stated[0]["patch"]["digests"] == [digest("erased", "patch", second.key)]
    assert digest("erased", "patch", first.key) in stated[2]["patch"]["digests"]
    found = [stated[number]["retain set"]["digests"] for number in (0, 2)]
    assert [len(each) for each in found] == [1, 1]
    assert {each for (each,) in found} == {digest("erased", "retain set", each) for each in sets}
    assert context.stores.vault.held().isdisjoint(sets)
    assert {first.key, second.key}.isdisjoint(context.stores.patches.held())


def test_a_certificate_of_many_records_names_their_rows_by_a_root_alone(
    model: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sisa.evidence.statements.MAX_LISTED", 2)
    model.forget(1, 2, 3, 4, 5, 6, 7)
    stated = statements(model)[-1]["predicate"]
    (tombstones, _) = [each for each in stated["remains"] if each["what"] == "tombstone"]
    assert (tombstones["number"], tombstones["digests"], len(tombstones["root"])) == (7, [], 64)
    for each in stated["erased"]:
        row = each["what"] in ("index row", "ledger row")
        assert len(each["digests"]) == (0 if row and each["number"] > 2 else each["number"])


def test_a_damaged_slice_file_does_not_stop_a_deletion_that_needs_none(model: Certified) -> None:
    """A certificate without receipts is better than none."""
    (row,) = model.fake.rows(1)
    names = [each.name for each in model.fake.ledger.slices(row.shard) if each.slice == row.slice]
    model.fake.records.erase(names)
    digests = {each.id_digest for each in model.fake.ledger.rows(row.shard, row.slice)}
    digest = model.fake.context.settings.assigner.id_digest
    model.forget(*(n for n in range(12) if digest(fake_record(n).id) in digests))
    stated = statements(model)[-1]
    assert stated["predicateType"] == EXACT
    assert stated["predicate"]["commitments"] == {"number": 0, "root": ""}
    assert any("no receipts" in each for each in model.notices)


def test_nothing_is_stated_twice(model: Certified) -> None:
    model.forget(1)
    before = kinds(model)
    for _ in range(2):
        reconcile(model.fake.context)
    assert kinds(model) == before
    assert model.hook.issue(model.fake.context) == []


def test_a_deferred_deletion_is_certified_when_it_is_trained(model: Certified) -> None:
    model.forget(1, defer=True)
    assert kinds(model) == [STATE, STATE]  # heads have rolled back, and a record less remains
    assert not model.notices
    reconcile(model.fake.context)
    found = statements(model)
    assert [each["predicateType"] for each in found[2:]] == [EXACT]
    roots = [each["predicate"]["membership"] for each in found]
    assert roots[2] == roots[1]
    assert roots[1]["before"] == roots[0]["after"] != roots[1]["after"]


def test_requests_of_one_batch_have_a_certificate_each(model: Certified) -> None:
    one, two = model.forget(1, defer=True), model.forget(2, defer=True)
    reconcile(model.fake.context)
    found = [each["request"]["id"] for each in certificates(model)]
    assert found == [one.request_id, two.request_id]


def test_a_record_that_is_added_again_makes_a_rectification(model: Certified) -> None:
    model.forget(1, defer=True)
    model.add(1, again=True)
    assert kinds(model)[-1] == RECTIFICATION
    stated = statements(model)[-1]["predicate"]
    assert "tombstone" not in {each["what"] for each in stated["remains"]}
    assert stated["membership"]["num_records"] == 12


def test_shards_under_several_fingerprints_are_another_tier(model: Certified) -> None:
    model.fake.context = changed(model.fake.context, fingerprint="another")
    model.forget(1)
    stated = statements(model)[-1]
    assert stated["predicateType"] == MIXED
    assert stated["predicate"]["guarantee"] == "same procedure, other bits"


def test_a_failing_signer_stops_nothing(model: Certified, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Keys, "sign", _fails_to_sign)
        request = model.forget(1)
        assert request.state == "completed"
        assert model.hook.pending(model.fake.ledger.requests()) == [request.request_id]
    assert kinds(model) == [STATE]
    assert any("pending" in each and "token" in each for each in model.notices)
    reconcile(model.fake.context)
    assert kinds(model) == [STATE, EXACT]
    assert model.hook.pending(model.fake.ledger.requests()) == []


def _fails_to_sign(*_: object) -> bytes:
    raise EnvironmentFault("the token is not plugged in")


def test_missing_keys_stop_nothing(model: Certified, tmp_path: Path) -> None:
    (tmp_path / "keys").rename(tmp_path / "away")
    assert model.forget(1).state == "completed"
    assert any("keys" in each for each in model.notices)
    (tmp_path / "away").rename(tmp_path / "keys")
    reconcile(model.fake.context)
    assert kinds(model) == [STATE, EXACT]


def test_what_another_party_signed_is_logged_and_not_parsed(model: Certified) -> None:
    model.log.append(b"no JSON at all", REBUILD)
    model.forget(1)
    assert kinds(model) == [STATE, EXACT]
    assert [each.sequence for each in model.logged] == [0, 1, 2]
    assert not model.notices


def test_a_damaged_statement_stops_no_deletion(model: Certified) -> None:
    model.log.append(b"{}", STATE)
    assert model.forget(1).state == "completed"
    assert any("pending" in each and "another form" in each for each in model.notices)


def test_lost_notes_are_made_again_from_the_log(model: Certified, tmp_path: Path) -> None:
    model.forget(1)
    before, logged = kinds(model), model.logged
    (tmp_path / "evidence.sqlite").unlink()
    reconcile(model.fake.context)
    assert kinds(model) == before
    assert model.logged == logged


def test_a_restored_backup_is_certified_once(model: Certified) -> None:
    saved = Saved(model.fake)
    request = model.forget(1)
    saved.restore(model.fake)
    catch_up(model.fake.context)
    reconcile(model.fake.context)
    assert [each["request"]["id"] for each in certificates(model)] == [request.request_id]
    assert model.evidence.drafts() == {}
    assert model.fake.ledger.requests()[-1].state == "completed"


def test_a_restored_backup_does_not_replace_commitments(model: Certified) -> None:
    request = model.forget(1, 2)
    before = model.evidence.commitments(request.request_id)
    model.evidence.put_drafts([Draft(request.request_id, ("ab" * 32,), (), (), ())])
    assert model.evidence.commitments(request.request_id) == before
    reconcile(model.fake.context)
    assert model.evidence.drafts() == {}
    assert len(certificates(model)) == 1


def test_a_deletion_that_only_a_restored_backup_completes_is_certified(
    model: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Saved(model.fake)
    with monkeypatch.context() as patched:
        patched.setattr(Keys, "sign", _fails_to_sign)
        model.forget(1)
    assert kinds(model) == [STATE]
    saved.restore(model.fake)
    catch_up(model.fake.context)
    reconcile(model.fake.context)
    found = statements(model)
    assert [each["predicateType"] for each in found] == [STATE, EXACT]
    assert found[-1]["predicate"]["backups"]["restored"]
    assert found[-1]["predicate"]["commitments"]["number"] == 1


def test_what_was_signed_is_logged_later(model: Certified, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise EnvironmentFault("the bucket is away")

    with monkeypatch.context() as patched:
        patched.setattr(Log, "append", fail)
        model.forget(1)
    signed = model.evidence.signed()
    assert kinds(model) == [STATE]
    reconcile(model.fake.context)
    assert signed is not None
    assert model.log.statement(model.logged[1].sha256) == signed[2]


def test_a_patch_has_a_report_of_its_own_type(model: Certified) -> None:
    settings = {"rate": 0.1, "seed": 2**63}
    job = PatchJob(BASE_DIGEST, (), ("set",), "written", settings, "fingerprint")
    report = {"utility": 0.25, "composition": {"base": 1}, "approximate": True}
    at = "2026-01-01T00:00:00.000+00:00"
    patch = Patch(1, job, "active", at, made_at=at, adapter_sha256="cd" * 32, report=report)
    commit(model.fake.context, Change(patches=[patch]))
    model.hook.complete(model.fake.context)
    found = statements(model)
    assert [each["predicateType"] for each in found] == [STATE, STATE, APPROX_REPORT]
    assert found[-1]["predicate"]["report"] == {"approximate": True, "utility": "0.25"}
    assert found[-1]["predicate"]["settings"] == {"rate": "0.1", "seed": f"{2**63}"}
    assert {each["name"] for each in found[1]["subject"]} >= {"patch-1"}
    reconcile(model.fake.context)
    assert len(statements(model)) == 3


BASE_DIGEST = "ba" * 32

EVIDENCE_EFFECTS = (
    *((EvidenceTables, name) for name in ("put_drafts", "drop_drafts", "put_signed", "put_logged")),
    (Log, "append"),
)


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_any_effect_loses_no_certificate_and_makes_none_twice(
    after: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Die at each effect in turn, of the deletion and of its evidence; then run the next command."""
    for fuse in fuses(after=after, more_than=12):
        model = certified(tmp_path_factory.mktemp("model"), 3, num_shards=1)
        one = model.forget(0, defer=True)
        with fuse.on(*EVIDENCE_EFFECTS, *effects_of(model.fake, COMMITS)):
            model.forget(1)
        catch_up(model.fake.context)
        reconcile(model.fake.context)
        if model.fake.rows(1):
            model.forget(1)
        found = certificates(model)
        ids = [each["request"]["id"] for each in found]
        assert len(ids) == len(set(ids)) == 2
        assert one.request_id in ids
        assert all(each["commitments"]["number"] == 1 for each in found)
        assert model.evidence.drafts() == {}
        assert model.evidence.signed() is None


def every_guess(record_id: str, text: str) -> Iterator[bytes]:
    """Yield digests of an id and a text, under every prefix and framing that the formats use."""
    bodies = [each.encode() for each in (record_id, text, record_id + text, text + record_id)]
    bodies += [json.dumps([record_id]).encode(), json.dumps(record_id).encode()]
    prefixes = [
        *(b"", b"\x00", b"\x01", b"\x02", b"deletion-ready-model/commitment/v1\x00"),
        *(b"deletion-ready-model/commitment/v1\x00" + bytes(32), b"sisa/id", b"sisa/text"),
        *(b"sisa/record", b"sisa/subject", b"sisa/erased", b"sisa/receipt", b"sisa/remains"),
    ]
    for body in bodies:
        for prefix in prefixes:
            framed = prefix + len(body).to_bytes(8, "big") + body
            for data in (prefix + body, framed):
                once = hashlib.sha256(data).digest()
                yield once
                yield hashlib.sha256(once).digest()
                yield hashlib.sha256(b"\x00" + once).digest()  # as a leaf


def test_nobody_learns_from_what_is_published_who_was_deleted(model: Certified, tmp_path: Path) -> None:
    """Try every id and text of the data set against all certificates, the log and the public keys."""
    model.forget(1, 2)
    model.forget(7)
    files = [each for each in (tmp_path / "log").rglob("*") if each.is_file()]
    payloads = [json.dumps(each).encode() for each in statements(model)]
    public = b"\n".join([*(each.read_bytes() for each in files), *payloads, model.keys.public_file])
    for number in range(12):
        record = fake_record(number)
        assert record.id.encode() not in public
        assert record.text.encode() not in public
        for guess in every_guess(record.id, record.text):
            assert guess not in public
            assert guess.hex().encode() not in public
            assert guess.hex()[:16].encode() not in public


@pytest.mark.parametrize(
    "damage",
    [
        lambda stated: stated.pop("probe"),
        lambda stated: stated["request"].update(id=3),
        lambda stated: stated.update(more=1),
        lambda stated: stated["membership"].update(after="x"),
    ],
)
def test_the_schema_refuses_other_forms(model: Certified, damage: Callable[[Any], Any]) -> None:
    model.forget(1)
    stated = statements(model)[-1]
    damage(stated["predicate"])
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(stated)


@pytest.mark.parametrize(
    "name",
    [
        *("deletion", "approx_report", "revocations", "test_result", "provenance"),
        *("access", "restriction", "audit", "key_handover"),
    ],
)
def test_the_readme_lists_every_field_as_the_schema_describes_it(name: str) -> None:
    def rows(node: Any, start: str = "") -> Iterator[str]:
        for field, each in node.get("properties", {}).items():
            yield f"| `{start}{field}` | {each['description']} |"
            inner = each["items"] if each.get("type") == "array" else each
            yield from rows(inner, f"{start}{field}{'[]' * (inner is not each)}.")

    text = (resources.files("sisa.evidence") / "schemas/README.md").read_text("utf-8")
    table = text.partition(f"<!-- table: {name} -->")[2].partition("<!-- end of table -->")[0]
    assert table.strip().splitlines()[2:] == list(rows(SCHEMA["$defs"][name]))


def sweep_of(model: Certified) -> Any:
    return certificates(model)[-1]["checks"]["sweep"]


def test_a_certificate_says_what_a_search_for_what_was_deleted_found(
    model: Certified, tmp_path: Path
) -> None:
    model.forget(1, 2)
    found = sweep_of(model)
    assert found["predicateType"] == TEST_RESULT
    assert ParseDict(found["predicate"], ResultPb()).result == "PASSED"
    (name,) = found["predicate"]["passedTests"]
    assert name.startswith("deleted ids and texts (searched: 6; files: ")
    assert name.endswith("): none found")
    assert model.hook.removed == {}
    assert model.notices == []
    (tmp_path / "left-behind").write_text(f"... {fake_record(3).parts[0].text} ...")
    (tmp_path / f"of-{fake_record(4).id}").touch()
    model.forget(3)
    assert sweep_of(model)["predicate"]["failedTests"][0].endswith("): 1 found")
    assert model.notices[-1].endswith("directory: 1; `sisa sweep` says where")
    model.forget(4)
    assert sweep_of(model)["predicate"]["result"] == "FAILED"


def test_the_search_is_for_the_records_of_each_request(model: Certified, tmp_path: Path) -> None:
    """What is given again is not searched for; another request's finding is not this one's."""
    (tmp_path / "left-behind").write_text(fake_record(3).text)
    one, other = model.forget(3, defer=True), model.forget(4, defer=True)
    digest = model.fake.context.settings.assigner.id_digest
    for request, record in ((one, fake_record(3)), (other, fake_record(4))):
        model.hook.removed[request.request_id] = {digest(record.id): record}
    reconcile(model.fake.context)
    found = certificates(model)
    results = {e["request"]["id"]: e["checks"]["sweep"]["predicate"]["result"] for e in found}
    assert results == {one.request_id: "FAILED", other.request_id: "PASSED"}


def test_exports_that_were_not_found_are_counted(model: Certified) -> None:
    export_adapters(model.fake.context, Path("no-such-folder"))
    model.fake.exports.stored.clear()
    model.forget(1)
    (stated,) = certificates(model)
    assert stated["exceptions"]["exports_not_found"] == 1


def test_the_tables_know_what_is_certified_without_keys(model: Certified, tmp_path: Path) -> None:
    first, later = model.forget(1), model.forget(2, defer=True)
    assert [model.evidence.is_certified(each.request_id) for each in (first, later)] == [True, False]
    assert not EvidenceTables(tmp_path / "absent").is_certified(first.request_id)
    assert not (tmp_path / "absent").exists()


def test_an_export_that_can_not_be_signed_is_reported(model: Certified) -> None:
    shutil.rmtree(model.keys.directory)
    files = {"README.md": b"card", "adapter_model.safetensors": b"weights"}
    assert model.hook.export(model.fake.context, "v1-shard-00000", files) == files
    assert model.notices[-1].startswith("the export is not signed")


def test_a_deletion_that_another_command_finishes_is_not_searched_for(model: Certified) -> None:
    model.forget(1, defer=True)
    reconcile(model.fake.context)
    assert sweep_of(model).startswith("not run: another command")


def test_a_search_that_is_not_wanted_or_too_large_is_not_made(
    model: Certified, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(issuing, "MAX_STRINGS", 5)
        model.forget(1, 2)
    assert sweep_of(model) == "not run: 6 ids and texts, more than 5"
    with monkeypatch.context() as patched:
        patched.setattr(issuing, "MAX_SEARCHED_BYTES", 100)
        model.forget(3)
    assert sweep_of(model)["predicate"]["result"] == "WARNED"
    signing = model.hook.config.signing.model_copy(update={"sweep": False})
    config = model.hook.config.model_copy(update={"signing": signing})
    model.fake.context = changed(
        model.fake.context, hooks=(dataclasses.replace(model.hook, config=config, removed={}),)
    )
    model.forget(4)
    assert sweep_of(model).endswith("`signing.sweep: false`")


def test_nothing_of_what_is_searched_for_is_written(model: Certified, tmp_path: Path) -> None:
    model.forget(1)
    model.forget(2, defer=True)
    written = [each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()]
    written.append(repr(model.hook).encode())
    for number in (1, 2):
        record = fake_record(number)
        assert not any(each.encode() in data for each in (record.id, record.text) for data in written)
