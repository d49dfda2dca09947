"""The console's files: that they load nothing and trust nothing, and the questions of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cluster.serve.api.console import PAGES
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import Role, Tokens
from sisa.config.config import ServiceBlock
from sisa.config.runfile import parse_run_file
from sisa.model import open_model
from tests.fakes.answers import FakeAnswers
from tests.fakes.ports import fake_record
from tests.models.confessing import NUM_RECORDS, RUN_FILE, record, train_in, use_fake_resources
from tests.models.tiny_model import all_files
from tests.unit.render.officer_pages import contrast, pairs, style
from tests.unit.serve.conftest import LOOPBACK

FILES = Path(__file__).resolve().parents[4] / "cluster" / "serve" / "console"
HTML, CSS, SCRIPT = (
    (FILES / name).read_text(encoding="utf-8") for name in ("index.html", "console.css", "console.js")
)


@pytest.mark.parametrize("name", ["", *PAGES])
def test_every_file_is_served_with_the_policy(client: TestClient, name: str) -> None:
    answer = client.get(f"/console/{name}".rstrip("/"))
    assert answer.status_code == 200
    policy = dict(each.split(" ", 1) for each in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["none.js", "..%2Fapp.py", "..%2F..%2F..%2Fpyproject.toml"])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/console/{name}").status_code == 404


def test_the_files_are_all_there_are() -> None:
    assert {path.name for path in FILES.iterdir()} == set(PAGES) - {"look.css"}


@pytest.mark.parametrize("text", [HTML, CSS, SCRIPT])
def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    assert re.findall(r"https?:|//[a-z]+\.|url\(|@import|import\(|\bfrom ['\"]", text) == []


def test_the_page_has_no_script_or_style_in_its_markup() -> None:
    assert re.findall(r"<style|\sstyle=|\son\w+=|javascript:", HTML) == []
    assert re.findall(r"<script[^>]*>(.*?)</script>", HTML, re.S) == [""]


def test_the_script_makes_no_markup_of_data() -> None:
    words = "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval|Function|setHTML|srcdoc"
    assert re.findall(rf"[.\b]({words})\b\s*[(=]", SCRIPT) == []
    assert re.findall("localStorage|document.cookie|sessionStorage[.[]", SCRIPT) == []


def test_the_script_and_the_page_name_the_same_elements() -> None:
    made = set(re.findall(r'\bid: "([\w-]+)"', SCRIPT)) | set(re.findall(r'table\("([\w-]+)"', SCRIPT))
    held = set(re.findall(r'\bid="([\w-]+)"', HTML)) | made
    asked = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    listed = re.findall(r"for \(const id of \[([^\]]+)\]\)", SCRIPT)
    asked |= {name for each in listed for name in re.findall(r'"([\w-]+)"', each)}
    assert len(asked) > 30
    assert asked - held == set()
    referred = set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([\w-]+)"', HTML))
    assert referred - held == set()


def test_every_control_has_a_label() -> None:
    labels = set(re.findall(r'<label for="([\w-]+)"', HTML))
    controls = re.findall(r"<(?:input|select|textarea)[^>]*>", HTML)
    ids = {re.findall(r'id="([\w-]+)"', each)[0] for each in controls if 'type="radio"' not in each}
    assert ids - labels == {"include-copies"}  # inside its label
    assert len(re.findall(r'<label class="choice"><input', HTML)) == len(controls) - len(labels)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(scheme: int) -> None:
    light, dark, _ = style()
    colours = dark if scheme else light
    found = {
        pair: contrast(colours[pair[1]], colours[pair[2]])
        for pair in pairs(re.findall(r"([^{}]+)\{([^{}]*)\}", re.sub(r"/\*.*?\*/", "", CSS, flags=re.S)))
    }
    assert len(found) > 6
    assert {pair: round(ratio, 2) for pair, ratio in found.items() if ratio < 4.5} == {}


# --- questions -----------------------------------------------------------------------------------


def test_the_shards_are_those_of_the_model(client: TestClient, service: Service) -> None:
    model = service.model
    model.forget([record(3).id])
    found = client.get("/shards").json()
    assert found["model"] == model.id
    slices = {each["shard"]: each["slices"] for each in found["shards"]}
    assert slices == {
        each.shard: [{"slice": s.slice, "records": s.records, "state": s.state} for s in standings]
        for each, standings in model.shards()
    }
    assert {each["state"] for row in slices.values() for each in row} >= {"clean", "retrained"}
    names = ("head", "depth", "served", "served_depth")
    heads = {each.shard: [getattr(each, name) for name in names] for each in model.status().shards}
    assert {each["shard"]: [each[name] for name in names] for each in found["shards"]} == heads
    assert str(model.directory) not in client.get("/shards").text


def test_a_restriction_shows_what_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)
    records = [fake_record(number, f"p{number:02}") for number in range(NUM_RECORDS)]
    train_in(tmp_path / "model", parse_run_file(RUN_FILE, "run.yaml"), records)
    model = open_model(tmp_path / "model")
    client = TestClient(build_app(Service(model, FakeAnswers(), None, ServiceBlock())), LOOPBACK)
    before = client.get("/shards").json()["shards"]
    model.restrict("p03")
    (place,) = model.where([records[3].id])
    row = client.get("/shards").json()["shards"][place.shard]
    states = {each["slice"]: each["state"] for each in row["slices"] if each["records"]}
    assert states == {each: "restricted" if each >= place.slice else "clean" for each in states}
    assert (row["served_depth"], row["depth"]) == (
        sum(each < place.slice for each in states),
        len(states),
    )
    model.release("p03")
    assert client.get("/shards").json()["shards"] == before


@pytest.fixture
def as_holder(service: Service) -> Callable[..., TestClient]:
    """Return what makes a client that holds a token."""
    tokens = Tokens(service.model.directory)
    app = build_app(replace(service, tokens=tokens))

    def holding(role: Role, shards: set[int]) -> TestClient:
        _, text = tokens.add(f"of-{role}", role, shards=shards, partition=service.model.partition)
        return TestClient(app, LOOPBACK, headers={"Authorization": f"Bearer {text}"})

    return holding


def test_a_token_of_a_shard_sees_that_shard_alone(
    as_holder: Callable[..., TestClient], service: Service
) -> None:
    client = as_holder("officer", {1})
    assert [each["shard"] for each in client.get("/shards").json()["shards"]] == [1]
    ids = [record(number).id for number in range(NUM_RECORDS)]
    shards = {place.id: place.shard for place in service.model.where(ids)}
    for name in ids[:6]:
        status = client.post("/requests/plan", json={"ids": [name]}).status_code
        assert status == (200 if shards[name] == 1 else 404)


def test_a_plan_says_what_a_deletion_then_does(client: TestClient, service: Service) -> None:
    model, before = service.model, all_files(service.model.directory)
    planned = client.post("/requests/plan", json={"ids": [record(3).id]}).json()
    assert all_files(model.directory) == before
    done = model.forget([record(3).id]).request
    assert done is not None
    assert planned["dry_run"]
    assert [tuple(each.values()) for each in planned["shards"]] == list(done.shards)
    assert planned["record_epochs_retrained"] == done.record_epochs_retrained
    assert planned["copies"] == []
