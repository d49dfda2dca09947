"""Facts for an officer's page, and what a page may not have: unsound HTML, or text of low contrast."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from typing import Any

from cluster.render.officer_report import Evidence, Facts, Statement, page, report_body
from sisa.core.domain import WitnessHead
from sisa.core.patches import Patch, PatchJob, VaultSet
from sisa.core.requests import Probed, Request, RequestEvent
from sisa.flows.requests import RequestView
from sisa.flows.status import ExportStatus, ShardStatus, SliceStanding, Status
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
    standings = {
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
            requests=tuple(requests),
            sizes_bytes={},
            witness=(f"/witness/{words}", "absent"),
            event_head=WitnessHead("e" * 64, 12),
            exports=(
                ExportStatus(path, 0, "k", "a" * 64, NOW, "clean", "", None, (0, 1)),
                ExportStatus(path, -1, "l", "a" * 64, NOW, "tainted", "req-a", "changed", (-1,)),
            ),
            record_epochs_full=90,
        ),
        standings=standings,
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
    bare = replace(full, status=status, patches=[], vault=[], storage=None, made_by="")
    return replace(bare, evidence=Evidence())


def with_requests(*requests: RequestView) -> Facts:
    full = facts()
    return replace(full, status=replace(full.status, requests=requests))


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
