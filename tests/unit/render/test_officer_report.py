"""The officer's page: sound HTML that loads nothing, escapes what people wrote, readable by all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.render import officer_report
from cluster.render.officer_report import (
    MAX_BARS,
    Evidence,
    Facts,
    Statement,
    cost_bars,
    page,
    report_body,
)
from sisa.core.domain import Patch, PatchJob, Probed, Request, RequestEvent, VaultSet, WitnessHead
from sisa.core.errors import Busy
from sisa.flows.lifecycle import RequestView
from sisa.flows.query import ExportStatus, ShardStatus, SliceStanding, Status
from sisa.verifier.certificate import EXACT, STATE

NOW = "2026-02-10T12:00:00.000+00:00"
STATES = ("clean", "retrained", "rolled back", "restricted", "empty")
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=http://evil.example/x onerror=alert(1)>',
    "</bdi></p></section><!-- ' & {{ 7 * 7 }} {% raw %}",
    "\u202eevil\u202c טקסט بيانات \x00\x1b[31m \ud800",
)
VOID = {"meta", "br", "line"}


def request(name: str, words: str = "as given", **values: Any) -> RequestView:
    found = Request(f"req-{name}", "2026-01-05T09:00:00+00:00", "2026-02-05", 2, **values)
    given: dict[str, Any] = {
        "external_id": words,
        "reason": words,
        "submitter": words,
        "approver": words,
        "extension": words,
    }
    found = replace(found, **given, cause=words, consent=words)
    events = (
        RequestEvent(found.request_id, "received", found.created_at),
        RequestEvent(found.request_id, found.state, "2026-02-01T10:00:00+00:00", words),
    )
    return RequestView(found, -5 if found.state == "approved" else 5, events)


def facts(num_shards: int = 4, num_slices: int = 4, words: str = "as given") -> Facts:
    """Return facts with every state; `words` stand wherever people write."""
    sizes = tuple(range(num_slices))
    shards = tuple(
        ShardStatus(n, "h" * 64, 2, num_slices, 9, sizes, n > 0, None, "a" * 64, num_stages=3)
        for n in range(num_shards)
    )
    lineage = {
        n: [SliceStanding(s, s, STATES[(n + s) % 5] if s else "empty") for s in range(num_slices)]  # type: ignore[arg-type]
        for n in range(num_shards)
    }
    cost: dict[str, Any] = {"record_epochs_retrained": 20, "record_epochs_full": 90, "seconds": 2.5}
    done = {"state": "completed", "committed_at": "2026-01-31T10:00:00+00:00", **cost}
    probed = Probed(2, 2, 1, 0.5, 0.5, 0.1, 0.5)
    requests = [
        request("a", words, **done, probed=probed, exports_erased=1, num_copies=2),
        request("b", words, **{**done, "state": "erasure_failed"}, probed=Probed(2, failure="Busy")),
        *(request(state, words, state=state) for state in ("received", "approved", "held", "denied")),
    ]
    job = PatchJob("base", (), ("set",), "written", {"method": words}, "f")
    path = f"/exports/{words}"
    return Facts(
        made_at=NOW,
        made_by=words,
        program="deletion-ready-model 0",
        model="0" * 32,
        encrypted=False,
        storage=words,
        status=Status(
            directory=f"/models/{words}",
            records=36,
            deleted_records=4,
            model_digest="d" * 64,
            base_model=words,
            base_digest="b" * 64,
            embedder="hashing",
            schedule="cumulative",
            shards=shards,
            requests=tuple(each.request for each in requests),
            sizes_bytes={},
            witness=(f"/witness/{words}", "absent"),
            event_head=WitnessHead("e" * 64, 12),
            exports=(
                ExportStatus(path, 0, "k", "a" * 64, NOW, "clean", "", None, (0, 1)),
                ExportStatus(path, -1, "l", "a" * 64, NOW, "tainted", "req-a", "changed", (-1,)),
            ),
            record_epochs_full=90,
        ),
        lineage=lineage,
        requests=requests,
        patches=[Patch(1, job, "active", NOW, NOW, request_id="req-a", report={"outcome": words})],
        vault=[VaultSet("set", "forget", 2, words, NOW, "s", 9)],
        evidence=Evidence(
            keyid="c" * 64,
            origin=f"deletion-ready-model/{words}",
            size=2,
            root="f" * 64,
            cosigners=(words,),
            statements=(Statement(STATE, "1" * 64, 0, ""), Statement(EXACT, "2" * 64, 1, "req-a")),
            served={f"shard-{n:05d}": "a" * 64 for n in range(num_shards)},
        ),
    )


def bare() -> Facts:
    """Return facts of a model without requests, exports, patches and shards."""
    full = facts(0)
    status = replace(full.status, requests=(), exports=(), witness=("/w", "current"))
    bare = replace(full, status=status, requests=[], patches=[], vault=[], storage=None, made_by="")
    return replace(bare, evidence=Evidence())


def with_evidence(**values: Any) -> Facts:
    full = facts()
    assert full.evidence is not None
    return replace(full, evidence=replace(full.evidence, **values))


def html(found: Facts) -> str:
    return page(json.loads(json.dumps(report_body(found))))


class Walk(HTMLParser):
    """Read a page; note its structure, and every fault of it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.structure: list[str] = []
        self.faults: list[str] = []
        self.attributes: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self._columns: list[int] = []
        self._cells = 0
        self.feed(text)
        self.close()
        self.faults += [f"<{name}> is not closed" for name in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.structure.append(f"<{tag} {' '.join(sorted(given))}>")
        self.attributes.append((tag, given))
        if len(given) < len(attrs):
            self.faults.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._columns.append(0)
        self._cells = 0 if tag == "tr" else self._cells + (tag in ("th", "td"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self.structure.append(f"</{tag}>")
        if not self._open or self._open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")
        if tag == "tr":
            self._columns[-1] = self._columns[-1] or self._cells
            if self._columns[-1] != self._cells:
                self.faults.append(f"a row has {self._cells} of {self._columns[-1]} cells")

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [given for name, given in self.attributes if name == tag]


def faults(text: str) -> Iterator[str]:
    """Yield what is wrong with a page as HTML, for keyboards and for screen readers."""
    walk = Walk(text)
    yield from walk.faults
    ids = [given["id"] for _, given in walk.attributes if "id" in given]
    yield from (f"id {each} twice" for each in set(ids) if ids.count(each) > 1)
    for tag, given in walk.attributes:
        named = given.get("aria-labelledby", "").split() + given.get("href", "#content").split("#")[1:]
        yield from (f"<{tag}> names {each}, which is nowhere" for each in named if each not in ids)
        yield from (f"<{tag} {name}>" for name in given if name.startswith("on") or name == "src")
        if tag == "th" and given.get("scope") not in ("row", "col"):
            yield "a <th> without scope"
        if tag in ("table", "section", "svg", "article") and "aria-labelledby" not in given:
            yield f"<{tag}> without a name"
        if given.get("role") == "region" and given.get("tabindex") != "0":
            yield "a scrolling region that no key reaches"
    loaded = {tag for tag, _ in walk.attributes} & {"script", "link", "img", "iframe", "object", "base"}
    yield from sorted(loaded)
    if walk.of("html") != [{"lang": "en"}] or not re.search(r"<title>\w", text):
        yield "no language or title"
    if "width=device-width" not in str(walk.of("meta")) or "default-src 'none'" not in str(
        walk.of("meta")
    ):
        yield "no viewport or policy"
    yield from re.findall(r"url\(|@import|https?:|srcset", re.sub(r"<bdi.*?</bdi>", "", text))


@pytest.mark.parametrize(
    "found",
    [
        *(facts(), bare(), replace(facts(), encrypted=True), replace(facts(), evidence=None)),
        with_evidence(statements=(), fault="the chain is broken", size=0, cosigners=()),
    ],
)
def test_the_page_is_sound(found: Facts) -> None:
    assert list(faults(html(found))) == []


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("</section>", ""),
        ('id="requests"', 'id="costs"'),
        ("<header>", '<header><img src="x">'),
        ("<header>", '<header><a href="https://example.org/#content">x</a>'),
        ('scope="col"', ""),
        ('href="#law"', 'href="#lore"'),
        ('tabindex="0"', ""),
        ("</td>", "</td><td></td>"),
    ],
)
def test_the_walk_finds_what_it_looks_for(good: str, bad: str) -> None:
    text = html(facts())
    assert good in text
    assert list(faults(text.replace(good, bad, 1)))


@pytest.mark.parametrize("words", HOSTILE)
def test_what_people_wrote_changes_nothing_but_text(words: str) -> None:
    found = html(facts(words=words))
    assert Walk(found).structure == Walk(html(facts())).structure
    assert list(faults(found)) == []
    assert not re.search(r"[\x00\x1b\u202a-\u202e\u2066-\u2069]", found)
    shown = re.sub(r"[\x00\x1b\u202a-\u202e\ud800]", "", words)
    assert found.encode()
    assert Walk(found).text.count(shown) >= 20


def test_a_consent_is_recorded_and_not_quoted() -> None:
    found = report_body(replace(facts(), requests=[request("a", "as given")]))
    assert found["requests"][0]["consent_recorded"] is True
    assert "consent" not in found["requests"][0]


def test_a_model_that_others_keep_changing_is_not_described(monkeypatch: pytest.MonkeyPatch) -> None:
    full = facts()
    states = [replace(full.status, event_head=WitnessHead("e", count)) for count in (1, 2, 2, 2)]
    model: Any = SimpleNamespace(status=lambda: states.pop(0), directory="model")
    read = lambda *_: replace(full, status=model.status())  # noqa: E731
    monkeypatch.setattr(officer_report, "_read_once", read)
    assert officer_report.read_facts(model, NOW).status.event_head.num_events == 2
    states[:] = [replace(full.status, event_head=WitnessHead("e", count)) for count in range(6)]
    with pytest.raises(Busy):
        officer_report.read_facts(model, NOW)


def test_the_same_facts_give_the_same_bytes() -> None:
    assert html(facts()) == html(facts())


def test_two_hundred_shards_fit() -> None:
    text = html(facts(num_shards=200, num_slices=16))
    assert len(text.encode()) < 1_000_000
    assert list(faults(text)) == []
    assert len(re.findall(r'<td class="[ctrxe]"', text)) == 200 * 16


def test_each_cell_of_the_grid_says_its_state_without_colour() -> None:
    text = html(facts())
    cells = re.findall(r'<td class="[ctrxe]" title="([^"]*)" aria-label="([^"]*)">([^<]*)<', text)
    assert len(cells) == 16
    assert all(title == label for title, label, _ in cells)
    shown = {title.split(",")[0]: sign.split()[0] for title, _, sign in cells}
    assert set(shown) == set(STATES)
    assert len(set(shown.values())) == len(STATES)


def test_what_needs_somebody_comes_first() -> None:
    found = report_body(facts())["attention"]
    assert [each["severity"] for each in found] == sorted(each["severity"] for each in found)
    counts = {each["what"]: each["count"] for each in found}
    assert counts["Open requests past their due date"] == 1
    assert counts["Failed deletions"] == 1
    assert counts["Exports that still hold deleted records"] == 1
    assert counts["Requests under a legal hold"] == 1
    assert counts["Witness: absent"] is None
    assert report_body(bare())["attention"] == []
    assert "Nothing waits" in html(bare())


@pytest.mark.parametrize(
    ("found", "standing", "words"),
    [
        (facts(), "verified", "certificate verified"),
        (with_evidence(statements=(), pending=("req-a",)), "pending", "certificate pending"),
        (with_evidence(statements=(), fault="the chain is broken"), "unverified", "the chain is broken"),
        (with_evidence(statements=()), "none", "not certified"),
        (replace(facts(), evidence=None), "none", "Deletions of this model are not certified"),
    ],
)
def test_a_completed_deletion_is_certified_or_says_why_not(
    found: Facts, standing: str, words: str
) -> None:
    requests = report_body(found)["requests"]
    assert [each["certificate"]["standing"] for each in requests] == [standing, *["none"] * 5]
    assert words in html(found)


@pytest.mark.parametrize(
    ("found", "what", "severity"),
    [
        (replace(facts(), evidence=None), "Deletions are not certified", "warning"),
        (with_evidence(fault="the chain is broken"), "The log does not verify", "error"),
        (
            with_evidence(served={}),
            "The log's last statement is not about what is served now",
            "warning",
        ),
        (with_evidence(pending=("req-a",), statements=()), "Certificates that are pending", "warning"),
        (
            with_evidence(statements=(Statement(EXACT, "2" * 64, 1, "req-z"),)),
            "Certificates of requests that the model does not know",
            "error",
        ),
    ],
)
def test_evidence_that_is_wrong_needs_somebody(found: Facts, what: str, severity: str) -> None:
    assert what not in str(report_body(facts())["attention"])
    rows = [each for each in report_body(found)["attention"] if what in each["what"]]
    assert [each["severity"] for each in rows] == [severity]


def test_a_request_that_was_closed_late_says_so() -> None:
    late = request("a", state="completed")
    late = replace(late, request=replace(late.request, due="2026-01-31"))
    (found,) = report_body(replace(facts(), requests=[late]))["requests"]
    assert (found["days_left"], found["on_time"]) == (None, False)
    assert "closed after its due date" in html(replace(facts(), requests=[late]))


def test_a_batch_is_counted_once() -> None:
    (batch,) = report_body(facts())["costs"]
    assert (batch["requests"], batch["records"], batch["record_epochs_retrained"]) == (2, 4, 20)


@pytest.mark.parametrize(
    ("days", "length"), [([1, 1, 2], 10), (range(1, 29), 7), ([0], 10)], ids=["days", "months", "one"]
)
def test_bars_are_few(days: Any, length: int) -> None:
    batches = [
        {"committed_at": f"2026-{1 + day % 3:02}-{1 + day:02}T00:00:00", "record_epochs_retrained": 5}
        for day in days
    ]
    found = cost_bars(batches)
    assert {len(each["period"]) for each in found} == {length}
    assert sum(each["record_epochs"] for each in found) == 5 * len(batches)
    assert max(each["share"] for each in found) == 1.0
    assert len(found) <= MAX_BARS
    assert cost_bars([]) == []


# --- colours -------------------------------------------------------------------------------------


@cache
def style() -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Return the colours in light and dark, and the rules as (selector, declarations)."""
    (css,) = re.findall(r"<style>(.*?)</style>", html(bare()), re.S)
    light, dark = ([*re.findall(r"--([\w-]+): (#\w{6})", each)] for each in css.split("@media", 1))
    dark = dark[: len(light)]
    rules = re.findall(r"([^{}]+)\{([^{}]*)\}", css)
    return dict(light), dict(dark), rules


def luminance(colour: str) -> float:
    """Return the relative luminance of `#rrggbb`; source: WCAG 2.2, definition."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(each) for each in (one, other))
    return (high + 0.05) / (low + 0.05)


def pairs(rules: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Yield selector, colour of the text and colour behind it, by the names of the style."""
    for selector, declared in rules:
        behind = re.findall(
            r"var\(--([\w-]+)\)", "".join(re.findall(r"background[^:]*:([^;]*)", declared))
        )
        texts = re.findall(r"(?:^|[;\s])(?:color|fill): var\(--([\w-]+)\)", declared)
        assert texts or not behind, f"{selector} sets a background and no colour"
        for text in texts:
            for surface in behind or ("page", "card", "plain"):
                yield selector.strip(), text, surface


def test_contrast_is_computed_as_defined() -> None:
    assert contrast("#000000", "#ffffff") == 21
    assert round(contrast("#777777", "#ffffff"), 2) == 4.48


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_all_text_has_the_contrast_of_wcag_aa(scheme: int) -> None:
    light, dark, rules = style()
    assert set(light) == set(dark)
    colours = dark if scheme else light
    found = {pair: contrast(colours[pair[1]], colours[pair[2]]) for pair in pairs(rules)}
    assert len(found) > 30
    assert {pair: round(ratio, 2) for pair, ratio in found.items() if ratio < 4.5} == {}
