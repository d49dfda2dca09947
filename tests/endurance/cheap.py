"""Replace everything that needs torch: real stores, ledger and index around a base that is only a name.

Training confesses (`tests.fakes.ports.FakeTrainer`): an adapter lists every record id that touched it.
Everything else is the product itself. Only code that would load torch or ask a hub is replaced, and only
within `with cheap_resources():`. Lengths in tokens and the adapter's modules are not covered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from sisa import model, train
from sisa.core.digest import digest_of
from sisa.core.domain import BaseFiles, Record
from sisa.core.errors import EnvironmentFault, InvalidInput
from sisa.core.ports import Executor, Tick
from sisa.core.requests import Probed
from sisa.data import source_rows
from sisa.flows.chains import SerialExecutor, Site
from sisa.flows.wiring import wiring
from sisa.flows.wiring.executors import find_executor, open_stores
from sisa.flows.wiring.resources import Resources, check_digest
from sisa.lm.routing.embedder import HashingEmbedder
from sisa.lm.routing.names import NameEmbedder
from tests.fakes.ports import FakeTrainer


def named_base(resources: Resources) -> BaseFiles:
    """Return a base for any name."""
    found = BaseFiles(Path("no-base"), digest_of(resources.config.base))
    if (known := resources._base) is not None:
        check_digest("base model", known, found.digest)
    return found


def hashing_embedder(resources: Resources) -> Any:
    """Return the one embedder that loads no model."""
    if resources.config.sisa.embedder != "hashing":
        raise InvalidInput("no such embedder here", where="sisa.embedder")
    found = HashingEmbedder()
    return NameEmbedder(found) if resources.config.sisa.names else found


def count_words(_: Resources, records: Sequence[Record]) -> list[int]:
    """Return lengths in words as those in tokens."""
    return [len(record.text.split()) + 1 for record in records]


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


def find_cheap(executor: Any) -> Any:
    """Open the confessing trainer under the name of any executor."""
    return open_cheap if executor in ("auto", "serial", "ray") else find_executor(executor)


SWAPS: tuple[tuple[Any, str, Any], ...] = (
    (Resources, "base", property(named_base)),
    (Resources, "embedder", property(hashing_embedder)),
    (Resources, "count_tokens", count_words),
    (Resources, "check_base", lambda _: None),
    (wiring, "find_executor", find_cheap),
    (wiring, "find_probe", lambda: open_cheap_probe),
    (train, "find_executor", find_cheap),
    (model, "stages_apart", lambda *_: None),  # they would be trained by the real trainer
    (source_rows, "export_rows", _no_hub),
)


@contextlib.contextmanager
def cheap_resources() -> Iterator[None]:
    """Let the whole product use a cheap base, tokens and executors; hub names find no network."""
    with contextlib.ExitStack() as stack:
        for owner, name, new in SWAPS:
            stack.enter_context(mock.patch.object(owner, name, new))
        yield
