"""Replace everything that needs torch: real stores, ledger and index around a base that is only a name.

Training confesses (`tests.fakes.ports.FakeTrainer`): an adapter lists every record id that touched it.
Everything else is the product itself. Only code that would load torch or ask a hub is replaced, and only
within `with cheap_resources():`. Lengths in tokens and the adapter's modules are not covered.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sisa import model
from sisa.core.digest import digest_of
from sisa.core.domain import Record
from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.core.ports import Executor, Tick
from sisa.core.requests import Probed
from sisa.flows.context.resources import Named, Resources, check_digest
from sisa.flows.serial import SerialExecutor, Site
from sisa.flows.wiring.executors import find_executor, find_probe, open_stores
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder
from tests.fakes.ports import FakeTrainer


@dataclass(frozen=True)
class NamedBase:
    """Describe a base that nobody loads."""

    name: str
    directory: Path
    digest: str


class CheapResources(Resources):
    """Provide the resources of a model, with words as tokens and any name as a base."""

    @cached_property
    def base(self) -> Any:
        found = NamedBase(self.config.base, Path("no-base"), digest_of(self.config.base))
        known: Named | None = self._base
        if known is not None:
            check_digest("base model", known, found.digest)
        return found

    @cached_property
    def embedder(self) -> Any:
        if self.config.sisa.embedder != "hashing":
            raise InvalidInput("no such embedder here", where="sisa.embedder")
        found = HashingEmbedder()
        return NameEmbedder(found) if self.config.sisa.names else found

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        return [len(record.text.split()) + 1 for record in records]

    def check_base(self) -> None:
        """Accept any modules."""


class SlowTrainer:
    """Train as the confessing trainer, but slowly: half of the ticks, a pause, the rest."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self._pause_s = pause_s

    def train(self, job: Any, parent: Any, records: Any, progress: Any) -> dict[str, bytes]:
        progress(Tick(len(records) // 2, len(records)))
        time.sleep(self._pause_s)
        return FakeTrainer().train(job, parent, records, progress)


def open_cheap(site: Site, _options: Mapping[str, Any]) -> Executor:
    """Open the serial executor with the confessing trainer."""
    return SerialExecutor(SlowTrainer(), *open_stores(site))


def open_cheap_probe(*_: Any) -> Callable[[Sequence[Record]], Probed]:
    """Return a probe of a base that knows nothing."""
    return lambda records: Probed(len(records), len(records))


def _no_hub(*_: Any) -> Any:
    raise EnvironmentFault("the hub can't be reached", where="datasets")


@contextlib.contextmanager
def cheap_resources() -> Iterator[None]:
    """Let the whole product use a cheap base, tokens and executors; hub names find no network."""
    find = find_executor

    def find_cheap(executor: Any) -> Any:
        return open_cheap if executor in ("auto", "serial", "ray") else find(executor)

    swaps = {Resources: CheapResources, find: find_cheap, find_probe: lambda: open_cheap_probe}
    done: list[tuple[Any, str, Any]] = []
    rows = sys.modules.get("sisa.data.source_rows")
    for name, module in list(sys.modules.items()):
        if name.startswith("sisa.") and module is not None:
            for key, value in list(vars(module).items()):
                for old, new in swaps.items():
                    if value is old:
                        done.append((module, key, value))
                        setattr(module, key, new)
    if rows is not None and hasattr(rows, "export_rows"):
        done.append((rows, "export_rows", vars(rows)["export_rows"]))
        vars(rows)["export_rows"] = _no_hub
    # In a process of its own, a stage would be trained by the real trainer.
    done.append((model, "stages_apart", vars(model)["stages_apart"]))
    vars(model)["stages_apart"] = lambda *_: None
    try:
        yield
    finally:
        for module, key, value in done:
            setattr(module, key, value)
