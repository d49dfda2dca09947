"""The rights of a person beside erasure, by command and by API, over a model of fakes with keys."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fastapi.testclient import TestClient

from cluster.serve import engines
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import Tokens
from sisa.audit.doctor import diagnose
from sisa.config.config import EngineSource, ServiceBlock
from sisa.config.runfile import parse_run_file
from sisa.core.domain import Part, Record
from sisa.core.errors import IntegrityError
from sisa.core.ports import Change
from sisa.data.reader import read_records
from sisa.evidence.keys.model_keys import keys_of
from sisa.flows.context.commit import commit
from sisa.flows.context.served import restricting, restrictions, served_keys
from sisa.flows.locations import of_subject
from sisa.flows.requests import Terms
from sisa.flows.rights.access import as_file, held_of, row_of
from sisa.model import open_model
from tests.fakes.answers import FakeAnswers
from tests.fakes.ports import fake_record
from tests.models.certified import statements_of
from tests.models.confessing import RUN_FILE, content, train_in
from tests.unit.commands import Sisa
from tests.unit.serve.conftest import LOOPBACK

URN = "urn:deletion-ready-model:"
FILES = json.loads((resources.files("sisa.flows.rights") / "access.schema.json").read_text("utf-8"))
PAGE = Path(__file__).parents[4] / "cluster/serve/README.md"
PRIVACY = "privacy: {contact: dpo@example.com, purposes: to answer questions}\n"
WHO, OTHER = "p1", "p2"


def records() -> list[Record]:
    return [fake_record(number, f"p{number % 6}") for number in range(18)]


def of(subject: str) -> list[Record]:
    return [each for each in records() if each.subject_id == subject]


def corrected(subject: str) -> list[dict[str, Any]]:
    parts = (Part("prompt", "who?"), Part("completion", "somebody else"))
    return [row_of(replace(each, parts=parts)) for each in of(subject)[:1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with subjects that the tests share, and change in copies."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder / "model", parse_run_file(RUN_FILE + PRIVACY, "run.yaml"), records())
    return folder / "model"


@pytest.fixture
def model(bare: Path, sisa: Sisa) -> Path:
    """Return a copy of the model, with keys."""
    assert sisa("keys", "init", "-m", bare)[0] == 0
    return bare


@pytest.fixture
def client(model: Path) -> Iterator[TestClient]:
    with TestClient(build_app(service_of(model)), base_url=LOOPBACK) as made:
        yield made


def service_of(directory: Path, tokens: Any = None) -> Service:
    return Service(open_model(directory), FakeAnswers(), tokens=tokens, settings=ServiceBlock())


def statements(directory: Path) -> list[dict[str, Any]]:
    return statements_of(directory / "log", keys_of(open_model(directory)).public)


def kinds(directory: Path) -> list[str]:
    return [each["predicateType"].removeprefix(URN) for each in statements(directory)]


def told_of_others(text: str, subject: str) -> list[str]:
    """Return what a text says of other people: their names, ids and texts."""
    strings = [(str(e.subject_id), e.id, *(part.text for part in e.parts)) for e in records()]
    own = {each for said in strings if said[0] == subject for each in said}
    return [each for said in strings for each in said if each not in own and f'"{each}"' in text]


def test_an_access_file_holds_everything_of_a_person_and_nothing_of_others(
    model: Path, sisa: Sisa, tmp_path: Path
) -> None:
    assert sisa("export", "-m", model, "--to", tmp_path / "out")[0] == 0
    assert sisa("forget", "-m", model, of(WHO)[0].id, of(OTHER)[0].id, "--executor", "serial")[0] == 0
    assert sisa("restrict", "-m", model, "--subject", WHO)[0] == 0
    assert sisa("export", "-m", model, "--to", tmp_path / "again")[0] == 0
    file = tmp_path / "p1.json"
    code, out, _ = sisa("access", "-m", model, "--subject", f" {WHO} ", "-o", file, "--json")
    done, found = json.loads(out), json.loads(file.read_text())
    jsonschema.validate(found, FILES)
    assert (code, done["records"], done["deleted"], done["requests"]) == (0, 2, 1, 1)
    assert done["missing"] == ["categories", "source", "retention", "disclosed_to", "decisions"]
    assert found["processing"]["controller"]["contact"] == "dpo@example.com"
    assert found["restricted_since"] is not None
    assert found["requests"][0]["num_records"] == 1
    assert found["recipients"] == []  # one export was erased, the other does not hold these records
    assert told_of_others(file.read_text(), WHO) == []
    lines = tmp_path / "taken.jsonl"
    lines.write_text("".join(json.dumps(each["data"]) + "\n" for each in found["records"]))
    assert sorted(read_records([lines]), key=lambda e: e.id) == of(WHO)[1:]
    for each in found["records"]:
        assert each["state"] == "trained"
        assert any(touch["is_head"] for touch in each["checkpoints"])


def test_an_access_file_says_when_a_late_letter_arrived(model: Path) -> None:
    opened, day = open_model(model), "2026-01-31"
    opened.submit([of(WHO)[0].id], terms=Terms(received_on=day))
    found = json.loads(as_file(opened.access(subject=WHO)))
    jsonschema.validate(found, FILES)
    assert [each["received_on"] for each in found["requests"]] == [day]


def test_an_access_file_is_for_its_owner_alone_and_overwrites_nothing(
    model: Path, sisa: Sisa, tmp_path: Path
) -> None:
    file, link = tmp_path / "p1.json", tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    umask = os.umask(0)
    try:
        assert sisa("access", "-m", model, "--subject", WHO, "-o", file)[0] == 0
    finally:
        os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before, logged = file.read_bytes(), len(statements(model))
    for target in (file, link, tmp_path):
        code, _, err = sisa("access", "-m", model, "--subject", WHO, "-o", target)
        assert code == 2
        assert "there is a file already" in err
    assert file.read_bytes() == before
    assert not (tmp_path / "elsewhere").exists()
    assert len(statements(model)) == logged


def test_a_file_that_can_not_be_made_is_named(model: Path, sisa: Sisa, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "p1.json", tmp_path / ("p" * 300)):
        code, out, _ = sisa("access", "-m", model, "--subject", WHO, "-o", target, "--json")
        assert (code, json.loads(out)["error"]["where"]) == (6, str(target))
    assert kinds(model) == ["state:v1"]


@pytest.mark.parametrize("command", ["access", "recipients"])
def test_what_is_handed_out_is_stated_by_its_bytes_alone(model: Path, sisa: Sisa, command: str) -> None:
    more = ("-o", "-") if command == "access" else ()
    code, out, err = sisa(command, "-m", model, *(e.id for e in of(WHO)), *more, "--json")
    jsonschema.validate(json.loads(out), FILES)
    stated = statements(model)[-1]
    assert code == 0
    assert "logged: entry 1" in err
    assert stated["subject"][0]["digest"]["sha256"] == sha256(out.encode()).hexdigest()
    said = stated["predicate"]
    assert (said["right"], said["num_records"]) == (command, 3 * (command == "access"))
    published = b"".join(e.read_bytes() for e in (model / "log").rglob("*") if e.is_file())
    assert not any(each.id.encode() in published for each in of(WHO))
    assert WHO.encode() + b'"' not in published


def test_what_a_busy_model_can_not_state_is_stated_next(model: Path, sisa: Sisa) -> None:
    with open_model(model).locked():
        code, out, err = sisa("access", "-m", model, "--subject", WHO, "-o", "-")
    assert code == 0
    assert "not logged: pending" in err
    assert json.loads(out)["subject"] == WHO
    assert kinds(model) == ["state:v1"]
    assert sisa("certificate", "issue", "-m", model)[0] == 0
    assert sisa("certificate", "issue", "-m", model)[0] == 0
    assert kinds(model) == ["state:v1", "access:v1"]


def test_a_restriction_is_in_force_while_another_process_writes(model: Path, sisa: Sisa) -> None:
    with open_model(model).locked():
        code, out, _ = sisa("restrict", "-m", model, "--subject", WHO, "--json")
    assert (code, json.loads(out)["changed"]) == (0, True)
    assert kinds(model) == ["state:v1"]
    assert sisa("certificate", "issue", "-m", model)[0] == 0
    assert kinds(model) == ["state:v1", "restriction:v1"]


def test_a_model_without_keys_hands_out_and_restricts_all_the_same(bare: Path, sisa: Sisa) -> None:
    code, _, err = sisa("access", "-m", bare, "--subject", WHO, "-o", "-")
    assert (code, "has no keys" in err) == (0, True)
    assert sisa("restrict", "-m", bare, "--subject", WHO)[0] == 0
    assert not (bare / "log").exists()


def test_a_restriction_is_stated_with_what_is_served_instead(model: Path, sisa: Sisa) -> None:
    before = content(model)
    code, out, _ = sisa("restrict", "-m", model, "--subject", WHO, "--json")
    assert (code, json.loads(out)["changed"]) == (0, True)
    restricted = statements(model)[-1]
    assert restricted["predicate"]["in_force"][0]["num_records"] == 3
    assert len(restricted["predicate"]["held_back"]) == 1
    status = json.loads(sisa("status", "-m", model, "--json")[1])
    (held,) = [each for each in status["shards"] if each["served"] != each["head"]]
    assert (status["restricted_subjects"], status["restricted_records"]) == (1, 3)
    assert held["shard"] == restricted["predicate"]["held_back"][0]["shard"]
    where = json.loads(sisa("where", "-m", model, of(WHO)[0].id, of(OTHER)[0].id, "--json")[1])
    assert [each["restricted_since"] is None for each in where["records"]] == [False, True]
    assert content(model) == before
    assert sisa("release", "-m", model, "--subject", WHO)[0] == 0
    assert statements(model)[-1]["predicate"]["in_force"] == []
    assert statements(model)[-1]["subject"] == statements(model)[0]["subject"]
    assert sisa("release", "-m", model, "--subject", WHO)[0] == 2
    assert content(model) == before


def test_a_record_that_its_slice_lacks_is_not_left_out_of_an_access_file(bare: Path) -> None:
    model = open_model(bare)
    with model.context() as context:
        (row, *others), deleted = of_subject(context, WHO)
        rows = [replace(row, id_digest="0" * 64), *others]
        with pytest.raises(IntegrityError, match="file of their slice"):
            held_of(context, rows, deleted)


def test_a_restored_backup_does_not_serve_what_was_restricted_since(
    model: Path, sisa: Sisa, tmp_path: Path
) -> None:
    backup = Path(shutil.copytree(model, tmp_path / "backup"))
    assert sisa("restrict", "-m", model, "--subject", WHO)[0] == 0
    assert diagnose(model).healthy
    shutil.rmtree(model)
    backup.rename(model)
    (found,) = diagnose(model).findings
    assert (found.kind, found.what.endswith("restrictions are not as they were")) == ("behind", True)
    heads = {each.shard: each.head for each in open_model(model).status().shards}
    with open_model(model).context() as context:
        assert served_keys(context.stores.ledger) != heads
    assert open_model(model).status().restricted_records == 3
    assert diagnose(model).ok


def test_the_doctor_names_a_restriction_of_nobody(model: Path) -> None:
    """It is left where a rectification of somebody's only record was cut short."""
    with open_model(model).writing() as context:
        known = restrictions(context.stores.ledger)
        commit(context, Change(meta=restricting(known, {"0" * 64: "2026-01-01T00:00:00+00:00"})))
    (found,) = diagnose(model).findings
    assert (found.kind, found.severity) == ("restriction", "warning")


def test_an_unknown_person_is_refused(model: Path, sisa: Sisa, client: TestClient) -> None:
    for command in (("access", "-o", "-"), ("recipients",), ("restrict",), ("release",)):
        assert sisa(command[0], "-m", model, "--subject", "nobody", *command[1:])[0] == 3
        assert client.post(f"/rights/{command[0]}", json={"subject": "nobody"}).status_code == 404
    assert kinds(model) == ["state:v1"]


@pytest.mark.parametrize(
    "body",
    [{}, {"subject": ""}, {"subject": WHO, "ids": ["a"]}, {"subject": WHO, "more": 1}, {"ids": [1]}],
)
def test_a_body_of_another_form_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    assert client.post("/rights/access", json=body).status_code == 422


@pytest.mark.parametrize("right", ["access", "recipients", "rectify", "restrict", "release"])
def test_a_right_needs_the_shard_of_the_person(model: Path, right: str) -> None:
    opened, tokens = open_model(model), Tokens(model)
    (place,) = opened.where([of(WHO)[0].id])
    bearers = {}
    for name, shard in (("here", place.shard), ("there", 1 - place.shard)):
        bearers[name] = tokens.add(name, "officer", shards=[shard], partition=opened.partition)[1]
    bearers["all"] = tokens.add("all", "officer")[1]
    body = {"records": corrected(WHO)} if right == "rectify" else {"subject": WHO}
    codes = {}
    with TestClient(build_app(service_of(model, tokens)), base_url=LOOPBACK) as client:
        for name, bearer in bearers.items():
            headers = {"Authorization": f"Bearer {bearer}"}
            codes[name] = client.post(f"/rights/{right}", json=body, headers=headers).status_code
    if right in ("access", "recipients"):
        assert codes == {"here": 200, "there": 404, "all": 200}
    else:
        changed = 409 if right == "release" else 200  # nothing is restricted
        assert codes == {"here": 409, "there": 409, "all": changed}


def test_a_bad_correction_is_refused_whole(model: Path, client: TestClient) -> None:
    before = content(model)
    given = [*corrected(WHO), {"id": of(OTHER)[0].id}, {"no": "id"}]
    found = client.post("/rights/rectify", json={"records": given})
    assert found.status_code == 400
    assert {each["where"] for each in found.json()["problems"]} == {
        "records.jsonl, line 2",
        "records.jsonl, line 3",
    }
    assert content(model) == before


def test_engines_that_hold_what_was_exported_are_named(
    model: Path, sisa: Sisa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sisa("export", "-m", model, "--to", tmp_path / "out")[0] == 0
    (first,) = json.loads(sisa("recipients", "-m", model, "--subject", WHO, "--json")[1])["recipients"]
    answers = {"a": {"held": [first["adapter_sha256"], "f" * 64], "named": [], "nameless": []}}

    def asked(engine: EngineSource, *_: str) -> Any:
        return answers[engine.url.removeprefix("http://")]

    named = tuple(EngineSource(url=f"http://{each}") for each in "ab")
    monkeypatch.setattr(engines, "_ask", asked)
    opened = open_model(model)
    opened.config = opened.config.model_copy(update={"service": ServiceBlock(engines=named)})
    found = engines.with_engines(opened, opened.recipients(subject=WHO))
    jsonschema.validate(json.loads(as_file(found)), FILES)
    assert [(e["url"], e["adapters"], e["fault"]) for e in found["engines"]] == [
        ("http://a", [first["adapter_sha256"]], ""),
        ("http://b", [], "KeyError"),
    ]


def rows() -> list[list[str]]:
    """Return the cells of the table of rights, without their marks."""
    table = PAGE.read_text().partition("<!-- table: rights -->")[2].partition("<!-- end of table -->")[0]
    return [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        for line in table.strip().splitlines()[2:]
    ]


@pytest.mark.parametrize("how", ["command", "api"])
@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_each_row_of_the_table_of_rights(
    row: list[str], how: str, model: Path, sisa: Sisa, client: TestClient, tmp_path: Path
) -> None:
    """Carry a right out as its row says, and find the evidence that the row names."""
    _, command, path, evidence = row
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(each) + "\n" for each in corrected(WHO)))
    if "release" in command:
        assert sisa("restrict", "-m", model, "--subject", WHO)[0] == 0
    before = len(statements(model))
    if how == "command":
        names = {"DIR": model, "WHO": WHO, "OUT": tmp_path / "out", "NEW": tmp_path / "new.jsonl"}
        words = [str(names.get(each, each)) for each in command.split()[1:]]
        more = ["--executor", "serial"] if words[0] in ("rectify", "forget") else []
        assert sisa(*words, *more)[0] == 0
    else:
        body: dict[str, Any] = {"records": corrected(WHO)} if "rectify" in path else {"subject": WHO}
        done = client.post(path.removeprefix("POST "), json=body)
        assert done.status_code in (200, 201)
        if "/requests" in path:  # it waits for a decision, and for the runner
            asked = done.json()["request_id"]
            assert client.post(f"/requests/{asked}/approve", json={}).status_code == 200
            open_model(model).run()
    assert kinds(model)[before:][-1:] == [evidence]
