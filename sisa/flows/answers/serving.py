"""Load the models that are served now, and keep them at what the model serves.

Active patches lie beneath every answering model, the base alone included. Adapters and patches are
checked against the ledger before they are parsed. An answerer refuses to answer once it is outdated. A
service keeps its constituents loaded (`Serving`): it compares the heads that it has with those that are
served now, and replaces only what has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sisa.core.errors import IntegrityError, Outdated
from sisa.core.patches import Patch, active
from sisa.core.ports import Ledger
from sisa.flows.context.context import Context, patch_files
from sisa.flows.context.served import servable, served_keys

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.continuous import Key


@dataclass(frozen=True)
class ServedHeads:
    """What is served at one moment: the heads by shard, the patches beneath, and the settings."""

    seq: int  # of the ledger's last commit
    heads: Mapping[int, str]  # keys of checkpoints
    manifests: Mapping[str, str]  # of all checkpoints that may be served, by key
    stack: tuple[Patch, ...]
    settings: tuple[str, ...]  # the run file and the base

    @classmethod
    def read(cls, ledger: Ledger) -> ServedHeads:
        """Return what a ledger says is served now."""
        with ledger.snapshot():
            may = servable(ledger)
            return cls(
                ledger.seq(),
                served_keys(ledger),
                {each.key: each.manifest_sha256 for each in ledger.checkpoints() if each.key in may},
                tuple(active(ledger.patches())),
                tuple(ledger.meta().get(name, "") for name in ("config", "base")),
            )


OpenLedger = Callable[[], AbstractContextManager[Ledger]]


def open_answerer(
    context: Context,
    shards: Collection[int] | None = None,
    stack: Sequence[Patch] | None = None,
    how: str | None = None,
    open_ledger: OpenLedger | None = None,
    now: ServedHeads | None = None,
) -> Answerer:
    """Open the models of some shards, or of all shards that serve one. Raise IntegrityError.

    They lie over the patches of `stack` (default: the active ones), and are combined as `how` says
    (default: as the run file does). With `open_ledger` they refuse to answer once outdated; without, the
    caller keeps writers out. `now` is what is served, if the caller has read it.
    """
    from sisa.lm.answer.answerer import Answerer

    now = now or ServedHeads.read(context.stores.ledger)
    stack = now.stack if stack is None else stack
    asked = sorted(now.heads if shards is None else shards)
    adapters = _load(context, now, asked)
    patches = patch_files(context.stores.patches, stack)
    config = context.settings.config
    answerer = Answerer(
        context.compute.base(),
        adapters,
        config.sisa.threads_per_shard,
        patches,
        how or config.sisa.aggregation.method,
        config.precision,
    )
    if open_ledger is not None:
        loaded = replace(now, heads={shard: now.heads[shard] for shard in asked}, stack=tuple(stack))
        answerer.check_current = _check_still_served(open_ledger, loaded)
    return answerer


def _load(context: Context, now: ServedHeads, shards: Collection[int]) -> dict[int, dict[str, bytes]]:
    """Return the files of some shards' heads. Raise IntegrityError."""
    if any(now.heads.get(shard) not in now.manifests for shard in shards):
        raise IntegrityError(
            "a shard should answer, but its checkpoint is not held",
            next_step="run `sisa verify`; restore the model directory from a backup",
        )
    keys = {shard: now.heads[shard] for shard in shards}
    load = context.stores.checkpoints.load
    return {shard: load(key, now.manifests[key]) for shard, key in keys.items()}


def _check_still_served(open_ledger: OpenLedger, loaded: ServedHeads) -> Callable[[], None]:
    """Return a check that raises Outdated once an adapter may not be served or the patches change."""
    seq, patches = loaded.seq, [each.key for each in loaded.stack]

    def check() -> None:
        nonlocal seq
        with open_ledger() as ledger:
            if ledger.seq() == seq:
                return
            now = ServedHeads.read(ledger)
        held = set(loaded.heads.values()) <= now.manifests.keys()
        if not held or [each.key for each in now.stack] != patches:
            raise Outdated(
                "the model has changed since its adapters were loaded: they may contain records that "
                "are deleted or restricted by now",
                next_step="load them again by `answerer()` or `as_transformers()`, or run the command "
                "again",
            )
        seq = now.seq

    return check


class Serving:
    """A batch whose constituents are kept at what the model serves."""

    def __init__(self, context: Context, **limits: int) -> None:
        """Load all constituents; `limits` are those of ContinuousBatching. Raise IntegrityError."""
        from sisa.lm.answer.continuous import ContinuousBatching

        self.served = ServedHeads.read(context.stores.ledger)
        self.batch = ContinuousBatching(open_answerer(context, now=self.served), **limits)
        self._former: list[tuple[int, str]] = []  # heads that requests may still run on
        self._cut: list[Key] = []

    def adopt(self, context: Context) -> list[Key]:
        """Replace what is no longer served; return the keys of requests cut short.

        Tainted models are dropped first, so that they answer nothing even if this raises IntegrityError;
        the next call then loads what is missing, and returns all keys.
        """
        now = ServedHeads.read(context.stores.ledger)
        tainted = {shard for shard, key in self.served.heads.items() if key not in now.manifests}
        tainted_former = {shard for shard, key in self._former if key not in now.manifests}
        self._cut += self.batch.switch(dict.fromkeys(tainted), tainted | tainted_former)
        heads = {shard: key for shard, key in self.served.heads.items() if shard not in tainted}
        before = self.served = replace(self.served, heads=heads)
        if (before.stack, before.settings) != (now.stack, now.settings):
            self._cut += self.batch.switch(open_answerer(context, now=now))
            self._former = []
        else:
            shards = before.heads.keys() | now.heads.keys()
            changed = {shard for shard in shards if before.heads.get(shard) != now.heads.get(shard)}
            adapters: dict[int, dict[str, bytes] | None] = dict.fromkeys(changed)
            adapters |= _load(context, now, changed & now.heads.keys())
            self._cut += self.batch.switch(adapters)
            self._former += [(shard, key) for shard, key in heads.items() if shard in changed]
        self._former = [(shard, key) for shard, key in self._former if key in now.manifests]
        self.served = now
        cut, self._cut = self._cut, []
        return cut
