"""The states of requests and slices: the officer's page and the console say the same of all of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

import cluster
from cluster.render.officer_report import SOON_DAYS
from sisa.core.requests import BY_HAND, CLOSED, Request, RequestState, waits_to_run
from sisa.flows.status import SliceStanding

HOUSE = Path(cluster.__file__).parent
PAGE = (HOUSE / "render" / "templates" / "report.html.j2").read_text(encoding="utf-8")
CONSOLE = (HOUSE / "serve" / "console" / "console.js").read_text(encoding="utf-8")
STATES = set(get_args(RequestState))
DECISIONS: dict[str, RequestState] = {
    "approve": "approved",
    "deny": "denied",
    "hold": "held",
    "cancel": "cancelled",
}


def value(text: str, name: str) -> Any:
    """Return a constant of the console, or a variable of the page; YAML reads the literals of both."""
    pattern = rf"(?:const|% set) {name} = (.*?)(?:;(?: //[^\n]*)?$| %}})"
    (found,) = re.findall(pattern, text, re.DOTALL | re.MULTILINE)
    return yaml.safe_load(re.sub(r"// .*", "", found).replace("...CLOSED", ""))


def test_the_page_and_the_console_have_the_same_words_for_every_state_of_a_request() -> None:
    words = value(PAGE, "words")
    assert words.keys() == STATES
    assert value(CONSOLE, "WORDS") == words
    assert value(CONSOLE, "TONES") == value(PAGE, "tones")
    assert value(PAGE, "tones").keys() <= STATES
    assert value(CONSOLE, "SOON_DAYS") == SOON_DAYS


def test_the_console_offers_what_the_states_allow() -> None:
    assert set(value(CONSOLE, "CLOSED")) == CLOSED
    assert set(value(CONSOLE, "WAITING")) <= STATES
    ready = {each for each in STATES if waits_to_run(Request("", "", "", 1, state=each))}
    assert set(value(CONSOLE, "READY")) == ready
    offered = value(CONSOLE, "DECISIONS")
    for decision, state in DECISIONS.items():
        assert {each for each, allowed in offered.items() if decision in allowed} == BY_HAND[state]
    extendable = {each for each, allowed in offered.items() if "extend" in allowed}
    assert extendable < STATES - CLOSED
    known = {*DECISIONS, "extend"}
    assert {each for allowed in offered.values() for each in allowed} == known
    assert value(CONSOLE, "NAMES").keys() == value(CONSOLE, "DONE").keys() == known


def test_the_page_and_the_console_show_every_state_of_a_slice_alike() -> None:
    signs, classes, meanings = (value(PAGE, name) for name in ("signs", "classes", "meanings"))
    assert signs.keys() == set(get_args(get_type_hints(SliceStanding)["state"]))
    alike = {state: [classes[state], sign, meanings[state]] for state, sign in signs.items()}
    assert value(CONSOLE, "SLICES") == alike
