"""The console in a real Chromium, over a real server: one erasure by keyboard alone, layout, names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.cli import run
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import Tokens
from sisa.config.config import ServiceBlock
from sisa.evidence.keys.keys import create_keys
from sisa.evidence.open_evidence import certificate_file, state_what_is_held
from sisa.flows.requests import Terms
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.model import Model, open_model
from tests.fakes.answers import FakeAnswers
from tests.models.confessing import build, record, use_fake_resources
from tests.models.programs.chromium import CHROMIUM, Page, browser, wait
from tests.models.programs.local_server import served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

HOSTILE = "<img src=x onerror=alert(1)> \u202eevil\u202c \x1b[31m"
FOCUSED = "document.activeElement"
DIALOG = "document.getElementById('request')"
STOP = """
(() => {
  const focused = document.activeElement, style = getComputedStyle(focused);
  const box = focused.getBoundingClientRect();
  const inside = box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth;
  const outlined = style.outlineStyle != "none" && parseFloat(style.outlineWidth) > 1;
  return [focused.id || focused.className || focused.tagName, inside && outlined];
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a browser's page that the tests of this file share."""
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of 24 confessing records."""
    directory = tmp_path_factory.mktemp("trained") / "model"
    build(directory)
    return directory


@pytest.fixture
def model(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Return a copy of the model."""
    use_fake_resources(monkeypatch)
    return open_model(Path(shutil.copytree(trained, tmp_path / "model")))


@dataclass(frozen=True)
class Site:
    """The console of a service with tokens, and the officer's one."""

    url: str
    token: str


@pytest.fixture
def site(model: Model) -> Iterator[Site]:
    """Return the console of a service with an officer."""
    tokens = Tokens(model.directory)
    _, token = tokens.add("officer", "officer")
    with served(build_app(Service(model, FakeAnswers(), tokens, ServiceBlock()))) as address:
        yield Site(f"{address}/console", token)


@dataclass
class Keyboard:
    """Hands on a keyboard: where the focus went, and where it could not be seen."""

    page: Page
    stops: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    def to(self, selector: str) -> None:
        """Press Tab until an element has the focus."""
        for _ in range(80):
            if self.page.value(f"{FOCUSED}.matches({json.dumps(selector)})"):
                return
            self.page.press("Tab")
            name, seen = self.page.value(STOP)
            self.stops.append(name)
            self.unseen += [name] * (not seen and name != "BODY")
        raise AssertionError(f"{selector} can't be reached: {self.stops[-80:]}")

    def enter(self, selector: str, text: str = "") -> None:
        """Go to an element, type into it or press it."""
        self.to(selector)
        if text:
            self.page.type(text)
        else:
            self.page.press("Enter")


def faults(page: Page) -> list[Any]:
    """Return what the page threw or the browser refused; a refused token is no fault."""
    bad = [each["params"] for each in page.events if each["method"] == "Runtime.exceptionThrown"]
    entries = [each["params"]["entry"] for each in page.events if each["method"] == "Log.entryAdded"]
    worse = [each for each in entries if each["level"] in ("warning", "error")]
    return bad + [each for each in worse if "401" not in each["text"]]


def sign_in(page: Page, site: Site) -> None:
    page.events.clear()
    page.open(site.url)
    page.until(f"{FOCUSED}.id == 'token'")
    page.type(site.token)
    page.press("Enter")
    page.until(f"{FOCUSED}.id == 'content'")


def test_a_whole_erasure_by_keyboard_alone(page: Page, site: Site, model: Model) -> None:
    page.look()
    sign_in(page, site)
    hands = Keyboard(page)
    hands.enter("#ids", record(3).id)
    hands.enter("#reason", HOSTILE)
    hands.enter("#external-id", "T-17")
    hands.enter("#erase-form [type=submit]")
    page.until(f"{FOCUSED}.id == 'plan'")
    assert model.requests() == []  # nothing was sent yet
    assert "1 record." in page.value("document.getElementById('plan').textContent")
    hands.enter("#send")
    page.until(f"{FOCUSED}.id.startsWith('open-')")
    (view,) = model.requests()
    assert (view.request.external_id, view.request.state) == ("T-17", "received")
    assert "Sent: request T-17" in page.value("document.getElementById('said').textContent")

    page.press("Enter")
    page.until(f"{DIALOG}.open")
    hands.enter("#decide-approve")
    page.until("document.getElementById('request-said').textContent == 'Approved.'")
    assert model.requests()[0].request.approver == "officer"
    model.run()
    page.until("document.querySelector('#request-body .tag').textContent == 'Completed'")
    steps = page.value("[...document.querySelectorAll('.timeline strong')].map(e => e.textContent)")
    assert (steps[0], steps[1], steps[-1]) == (
        "Received, waits for a decision",
        "Approved, waits to be run",
        "Completed",
    )
    told = page.value("document.getElementById('request-body').textContent")
    assert "not certified" in told  # the model has no keys
    (place,) = model.requests()[0].request.shards
    assert f"shard {place[0]}: {place[2]} slice" in told
    page.press("Escape")
    page.until(f"!{DIALOG}.open && {FOCUSED} != document.body")
    assert page.value("document.querySelectorAll('#grid td.t').length") > 0  # retrained slices
    assert hands.unseen == []
    assert len(set(hands.stops)) > 8
    assert faults(page) == []


def test_the_token_is_kept_nowhere(page: Page, site: Site) -> None:
    sign_in(page, site)
    stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert page.value(stored) == '[{},{},""]'
    assert site.token not in page.value(
        "document.documentElement.outerHTML + document.getElementById('token').value"
    )
    page.open(site.url)
    page.until(f"{FOCUSED}.id == 'token'")
    assert page.value("document.getElementById('queue').textContent") == ""
    page.type("a forged token")
    page.press("Enter")
    page.until("document.getElementById('fault').textContent")
    assert page.value("document.getElementById('signed-in').hidden")


def test_what_people_wrote_is_text(page: Page, site: Site, model: Model) -> None:
    model.submit([record(1).id], terms=Terms(external_id=HOSTILE, reason=HOSTILE))
    sign_in(page, site)
    page.value("document.querySelector('#queue button').click()")
    page.until(f"{DIALOG}.open")
    assert page.value("document.querySelectorAll('img, bdi *').length") == 0
    shown = page.value("document.getElementById('request-title').textContent")
    assert shown.startswith("<img src=x onerror=alert(1)>")
    assert not {"\u202e", "\x1b"} & set(shown)
    assert faults(page) == []
    refused = "try { document.body.innerHTML = '<b>x</b>'; 'made' } catch (error) { error.name }"
    assert page.value(refused) == "TypeError"  # the policy refuses markup from data


def test_records_are_found_and_added_to_a_request(page: Page, site: Site) -> None:
    sign_in(page, site)
    hands = Keyboard(page)
    hands.enter("#text", "question 5")
    page.press("Enter")
    page.until("document.querySelector('#hits tbody tr')")
    hands.enter("#hit-0")
    page.until(f"{FOCUSED}.id == 'ids'")
    assert page.value("document.getElementById('ids').value") == page.value(
        "document.querySelector('#hits tbody th').textContent"
    )


def test_a_certificate_is_saved_and_verifies(
    page: Page, site: Site, model: Model, tmp_path: Path
) -> None:
    create_keys(evidence_keys_dir(model.config, model.id), model.id)
    state_what_is_held(model)
    model.submit([record(3).id], terms=Terms(approver="dpo"))
    (done,) = model.run()
    page.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    sign_in(page, site)
    page.value("document.querySelector('#closed button').click()")
    page.until(f"{DIALOG}.open && document.getElementById('save-certificate')")
    page.value("document.getElementById('save-certificate').click()")
    page.until("document.getElementById('request-said').textContent.startsWith('Saved.')")
    file = tmp_path / f"{done.request_id}.certificate.json"
    wait(file.exists, "the download")
    assert file.read_bytes() == certificate_file(model, done.request_id)
    keys = model.directory / "log" / "keys.json"
    assert run(["verify-certificate", str(file), "--key", str(keys)]) == 0
    assert faults(page) == []


def test_an_unknown_record_is_refused_in_words(page: Page, site: Site, model: Model) -> None:
    sign_in(page, site)
    hands = Keyboard(page)
    hands.enter("#ids", "nobody\nnothing")
    hands.enter("#erase-form [type=submit]")
    page.until("document.getElementById('erase-fault').textContent")
    said = page.value("document.getElementById('erase-fault').textContent")
    assert "2 of 2 ids are unknown" in said
    assert page.value("document.getElementById('plan').hidden")
    assert model.requests() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_console_fits_and_can_be_read(
    page: Page, site: Site, model: Model, width: int, dark: bool
) -> None:
    model.submit([record(1).id], terms=Terms(external_id=HOSTILE, reason=HOSTILE * 9))
    model.forget([record(7).id])
    page.look(width=width, dark=dark)
    sign_in(page, site)
    page.value(
        f"document.getElementById('ids').value = '{record(3).id}';"
        "document.querySelector('#erase-form [type=submit]').click()"
    )
    page.until("!document.getElementById('plan').hidden")
    page.value("document.querySelector('#queue button').click()")
    page.until(f"{DIALOG}.open")
    found = page.measure()
    assert (found["width"], found["dark"]) == (width, dark)
    assert found["overflow"] <= 0
    assert found["texts"] > 100
    assert found["contrast"] >= 4.5
    wrong = ("unreachable", "reordered", "hidden")
    assert {name: found[name] for name in wrong} == dict.fromkeys(wrong, 0)
    assert found["first"] == "skip"
    assert unnamed(page) == []


def unnamed(page: Page) -> list[str]:
    """Return the roles of controls and regions that a screen reader could not name."""
    roles = {"button", "textbox", "combobox", "checkbox", "radio", "link", "table", "region", "dialog"}
    return [
        each["role"]["value"]
        for each in page.send("Accessibility.getFullAXTree")["nodes"]
        if not each.get("ignored")
        and each["role"]["value"].lower() in roles | {"searchbox"}
        and not each.get("name", {}).get("value", "").strip()
    ]


def test_a_service_without_tokens_asks_for_none(page: Page, model: Model) -> None:
    with served(build_app(Service(model, FakeAnswers(), None, ServiceBlock()))) as address:
        page.events.clear()
        page.open(f"{address}/console")
        page.until("!document.getElementById('signed-in').hidden")
        assert page.value("document.getElementById('sign-in').hidden")
        assert faults(page) == []
