"""The officer's page: sound HTML that loads nothing, escapes what people wrote, readable by all."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.render import officer_report
from cluster.render.officer_report import MAX_BARS, Facts, Statement, cost_bars, report_body
from sisa.core.domain import WitnessHead
from sisa.core.errors import Busy
from sisa.verifier.certificate import EXACT
from tests.unit.render.officer_pages import (
    HOSTILE,
    NOW,
    STATES,
    Walk,
    bare,
    contrast,
    facts,
    faults,
    html,
    pairs,
    request,
    style,
    with_evidence,
    with_requests,
)


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
    found = report_body(with_requests(request("a", "as given")))
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
    late = replace(late, request=replace(late.request, due="2026-01-31", received_on="2025-12-31"))
    (found,) = report_body(with_requests(late))["requests"]
    assert (found["days_left"], found["on_time"]) == (None, False)
    page = html(with_requests(late))
    assert "closed after its due date" in page
    assert "on 2025-12-31, entered" in page


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
