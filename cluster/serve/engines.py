"""Ask other engines which exports they hold, and make them drop what a deletion erased.

The run file names engines that load a model's exports with `vllm_plugin.py` (`service.engines`). Such an
engine sweeps itself each second, and at once when it is asked to. What it holds is compared with the
model's present exports, so nothing is stored about an engine.

    for each in engines_hold(open_model("model"), sweep=True):
        print(each.url, each.erased, each.fault)
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from sisa.config.config import EngineSource
from sisa.model import Model

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1 << 22


@dataclass(frozen=True)
class EngineHolds:
    """What an engine has in memory."""

    url: str
    held: tuple[str, ...] = ()  # adapters by the digest of their weights
    erased: tuple[str, ...] = ()  # of these, those that the model does not export any more
    nameless: int = 0  # adapters that are still loaded and that no request can name
    fault: str = ""  # why it could not be asked

    @property
    def clean(self) -> bool:
        """Whether the engine answered, and holds only what the model exports."""
        return not (self.erased or self.nameless or self.fault)


def engines_hold(model: Model, *, sweep: bool = False) -> list[EngineHolds]:
    """Return what each engine of the run file holds; with `sweep`, after it has swept."""
    if not model.config.service.engines:  # `status` is slow
        return []
    exported = {each.adapter_sha256 for each in model.status().exports if each.standing is None}
    return [_holds(each, exported, sweep) for each in model.config.service.engines]


def with_engines(model: Model, found: dict[str, Any]) -> dict[str, Any]:
    """Add to a person's file the engines that hold one of its exports, or that could not be asked."""
    exports = {each["adapter_sha256"] for each in found["recipients"]}
    engines = []
    for each in engines_hold(model):
        adapters = sorted(exports.intersection(each.held))
        if adapters or each.fault:
            engines.append({"url": each.url, "adapters": adapters, "fault": each.fault})
    return {**found, "engines": engines}


def _holds(engine: EngineSource, exported: set[str], sweep: bool) -> EngineHolds:
    try:
        answer = _ask(engine, "POST", "sweep") if sweep else _ask(engine, "GET", "adapters")
        held = sorted({*map(str, answer["held"]), *map(str, answer["named"])})
        nameless = len(answer["nameless"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        code = f" {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
        return EngineHolds(engine.url, fault=f"{type(error).__name__}{code}")
    erased = tuple(each for each in held if each not in exported)
    return EngineHolds(engine.url, tuple(held), erased, nameless)


class Unredirected(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the run file does not name its target, which would get tokens and messages."""

    def redirect_request(self, *_: object) -> None:
        """Return no request, so that the status of the redirect is an error."""


def _ask(engine: EngineSource, method: str, path: str) -> Any:
    request = urllib.request.Request(  # noqa: S310 - the run file allows http and https alone
        f"{engine.url.rstrip('/')}/v1/sisa/{path}", method=method
    )
    if engine.token_file is not None:
        request.add_header("Authorization", f"Bearer {engine.token_file.read_text('utf-8').strip()}")
    with urllib.request.build_opener(Unredirected).open(request, timeout=TIMEOUT_S) as answer:
        return json.loads(answer.read(MAX_ANSWER_BYTES))
