"""Ask other engines what they hold of a model, and have them let go of what a deletion erased.

An engine that loads a model's exports by `vllm_plugin.py` is named in the run file (`service.engines`).
It sweeps itself each second; asked to sweep, it does so at once. What it holds is compared with what the
model exports now, so that nothing has to be remembered about an engine.

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
from sisa.store.blobs.files import read_whole

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 1 << 22


@dataclass(frozen=True)
class EngineHolds:
    """What an engine has in memory; a fault is why it could not be asked."""

    url: str
    held: tuple[str, ...] = ()  # adapters by the digest of their weights
    erased: tuple[str, ...] = ()  # of these, what the model exports no more
    nameless: int = 0  # adapters that nobody can ask for and that are still loaded
    fault: str = ""

    @property
    def clean(self) -> bool:
        """Whether the engine was asked, and holds nothing that it should not."""
        return not (self.erased or self.nameless or self.fault)


def engines_hold(model: Model, *, sweep: bool = False) -> list[EngineHolds]:
    """Return what each engine of the run file holds; with `sweep`, after it has swept."""
    if not model.config.service.engines:  # spares the model's whole status
        return []
    exported = {each.adapter_sha256 for each in model.status().exports if each.standing is None}
    return [_holds(each, exported, sweep) for each in model.config.service.engines]


def with_engines(model: Model, found: dict[str, Any]) -> dict[str, Any]:
    """Return a file for a person with the engines that hold an adapter of its recipients now.

    An engine that could not be asked is named with the fault: it may hold one.
    """
    given = {each["adapter_sha256"] for each in found["recipients"]}
    some = [(each, sorted(given.intersection(each.held))) for each in engines_hold(model)]
    engines = [
        {"url": each.url, "adapters": adapters, "fault": each.fault}
        for each, adapters in some
        if adapters or each.fault
    ]
    return {**found, "engines": engines}


def _holds(engine: EngineSource, exported: set[str], sweep: bool) -> EngineHolds:
    try:
        said = _asked(engine, "sweep" if sweep else "adapters", "POST" if sweep else "GET")
        held = sorted({*map(str, said["held"]), *map(str, said["named"])})
        nameless = len(said["nameless"])
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        code = f" {error.code}" if isinstance(error, urllib.error.HTTPError) else ""
        return EngineHolds(engine.url, fault=f"{type(error).__name__}{code}")
    erased = tuple(each for each in held if each not in exported)
    return EngineHolds(engine.url, tuple(held), erased, nameless)


def _asked(engine: EngineSource, what: str, method: str) -> Any:
    request = urllib.request.Request(  # noqa: S310 - the run file allows http and https alone
        f"{engine.url.rstrip('/')}/v1/sisa/{what}", method=method
    )
    if engine.token_file is not None:
        token = read_whole(engine.token_file, "an engine's token").decode().strip()
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        return json.loads(answer.read(MAX_ANSWER_BYTES))
