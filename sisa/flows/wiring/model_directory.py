"""Open a model's directory: adopt what other processes committed, and hold the locks of its writers.

with model.context() as context:     to read
with model.snapshot() as context:    to read one state of the ledger
with model.writing() as context:     to write, as the only writer
with model.deciding() as context:    to decide about requests, beside a writer that trains
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Concatenate, ParamSpec, Self, TypeVar

from sisa.core.digest import Keyed, digest_of
from sisa.core.errors import (
    Busy,
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    Outdated,
    SisaError,
)
from sisa.core.events import Notice, Report, silent
from sisa.core.run import running
from sisa.flows.context.commit import is_behind
from sisa.flows.context.context import Context
from sisa.flows.context.group import GroupLedger
from sisa.flows.context.served import held_state
from sisa.flows.export import finish_exports
from sisa.flows.restored_backup import catch_up
from sisa.flows.wiring import moving, wiring
from sisa.flows.wiring.description import describe, read_description
from sisa.flows.wiring.executors import OpenExecutor, check_executor
from sisa.flows.wiring.keys import keep_key
from sisa.flows.wiring.ledger_place import check_model, model_lock, open_ledger
from sisa.flows.wiring.resources import Resources
from sisa.store.areas import REPLAYS, open_areas
from sisa.store.blobs.temporary_directories import erase_abandoned
from sisa.store.ledger.ledger import SqlLedger

_D = TypeVar("_D", bound="ModelDirectory")
_P = ParamSpec("_P")
_T = TypeVar("_T")

WAITS_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # before each attempt of a read


def retry_read(read: Callable[Concatenate[_D, _P], _T]) -> Callable[Concatenate[_D, _P], _T]:
    """Repeat a read if a writer disturbed it.

    A writer erases what its commit replaced, so a read can meet damage or an outdated adapter. The read
    is repeated if the ledger has changed meanwhile. Raise IntegrityError for damage that stays, Busy if
    the ledger keeps changing.
    """

    @functools.wraps(read)
    def retrying(model: _D, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        for wait_s in WAITS_S:
            time.sleep(wait_s)
            seq = model.seq()
            try:
                return read(model, *args, **kwargs)
            except (IntegrityError, Outdated):
                if model.seq() == seq:
                    raise
        raise model.busy()

    return retrying


@dataclass(frozen=True)
class _Group:
    """The shards that may be read, and the rule by which records are assigned to them."""

    shards: frozenset[int]
    partition: str


class ModelDirectory:
    """A model's directory: its settings, keys and names, and its contents while it is open.

    To open it first adopts what other processes have committed, and lets the ledger catch up with its
    witness.
    """

    def __init__(
        self, directory: Path | str, *, executor: str | OpenExecutor = "auto", report: Report = silent
    ) -> None:
        """Open an existing model. Raise InvalidInput if there is none, IntegrityError if damaged."""
        self.directory = Path(directory)
        check_model(self.directory)
        self.executor = executor
        self.report = report
        self._group: _Group | None = None
        self.reload()

    @property
    def partition(self) -> str:
        """Return the name of the rule that assigns records to shards.

        Under another rule, a shard of the same number holds other people's records.
        """
        return digest_of([self._meta.get("key"), self.config.sisa.shards, self.config.sisa.group_by])

    def within(self, shards: Collection[int], partition: str) -> Self:
        """Return the model for a caller who may read only these shards.

        Records, requests and adapters of other shards are as if they did not exist, and no file of them
        is opened. What concerns the whole model raises ConfigConflict, and so does every call once the
        records are assigned by another rule than `partition`.
        """
        self._refresh()
        found = copy.copy(self)
        found._group = _Group(frozenset(shards), partition)
        return found

    def _ledger(self) -> AbstractContextManager[SqlLedger]:
        return open_ledger(self.directory)

    def held_state(self) -> str:
        """Return what the model holds and serves, as a digest; empty if the ledger can't be read."""
        with contextlib.suppress(SisaError), self._ledger() as ledger:
            return held_state(ledger)
        return ""

    def seq(self) -> int:
        """Return the number of the ledger's last commit, or 0 if the ledger can't be read."""
        with contextlib.suppress(SisaError), self._ledger() as ledger:
            return ledger.seq()
        return 0

    def busy(self) -> Busy:
        """Return the error to raise while another process writes."""
        return Busy(
            "another process is writing to this model, so it can't be checked now",
            where=str(self.directory),
            next_step="wait until it has finished, then run the same command again",
        )

    def reload(self) -> None:
        """Read the model's settings, keys and names from its directory."""
        found = describe(self.directory)
        self._meta = found.meta
        self.id, self.config, self.keyring = found.id, found.config, found.keyring
        self.base, self.embedder, self.secret = found.base, found.embedder, found.secret
        self.resources = Resources(self.config, self.base, self.embedder)

    def _refresh(self) -> None:
        """Adopt what another process has since committed. Raise ConfigConflict for another model."""
        meta = read_description(self.directory)
        if meta == self._meta:
            return
        if any(meta.get(name) != self._meta.get(name) for name in ("model", "key")):
            raise ConfigConflict(
                "this directory now holds another model than the one that was opened",
                where=str(self.directory),
                next_step="open the directory again",
            )
        self.reload()
        self.report(Notice("the model was reconfigured meanwhile; using its present run file"))

    @contextlib.contextmanager
    def context(
        self, *, locked: bool = False, as_it_is: bool = False, outdated: bool = False
    ) -> Iterator[Context]:
        """Open the model as the ledger describes it now, after it has caught up with its witness.

        `locked`: the caller holds the writer lock. `as_it_is`: do not catch up. `outdated`: accept a
        read-only copy that is behind its witness, for which EnvironmentFault is raised otherwise.
        """
        if outdated or as_it_is:
            self._check_whole()
        self._refresh()
        with wiring.open_context(
            self.directory, self.resources, Keyed(self.secret), self.id, self.executor, self.report
        ) as context:
            if locked:
                catch_up(context)
            elif not as_it_is and is_behind(context):
                if not context.stores.ledger.read_only:
                    with model_lock(self.directory):
                        catch_up(context)
                elif not outdated:
                    raise EnvironmentFault(
                        "this copy of the model still holds what was deleted since it was made, and it "
                        "can't be written to delete it again",
                        where=str(self.directory),
                        next_step="copy it to a writable disk; `sisa status` and `sisa verify` can read "
                        "it here",
                    )
            yield self._within_group(context)
        if self._group is not None:
            self._check_current()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Context]:
        """Open the model to read one state of its ledger, whatever is committed meanwhile."""
        with self.context() as context, context.stores.ledger.snapshot():
            yield context

    def _check_current(self) -> None:
        if read_description(self.directory) != self._meta:
            raise Outdated("the model was reconfigured meanwhile", next_step="ask again")

    def _check_whole(self) -> None:
        """Raise ConfigConflict if only some shards may be read here."""
        if self._group is not None:
            raise ConfigConflict(
                "this concerns the whole model, of which only some shards may be read here",
                next_step="ask who may read all shards",
            )

    def _within_group(self, context: Context) -> Context:
        """Return a context that reads only the group's shards; the same one without a group.

        Raise ConfigConflict if records are now assigned to shards by another rule.
        """
        if self._group is None:
            return context
        if self._group.partition != self.partition:
            raise ConfigConflict(
                "the records were assigned to shards anew since these shards were named",
                next_step="name the shards again: `sisa token add --shards`",
            )
        ledger = GroupLedger(context.stores.ledger, self._group.shards)
        return replace(context, stores=replace(context.stores, ledger=ledger))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the writer lock over the present model, of which all shards may be read. Raise Busy."""
        self._check_whole()
        check_executor(self.executor)  # refuses an unknown one before anything is written
        with running(), model_lock(self.directory):
            if moving.is_unfinished(self.directory):
                moving.erase_left(self.directory)
            self._refresh()
            keep_key(self.directory, self.config, self.id, self.secret)
            self._erase_replays()
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[Context]:
        """Open the model to write, under the writer lock. Raise Busy."""
        with self.locked(), self.context(locked=True) as context:
            finish_exports(context)
            yield context

    @contextlib.contextmanager
    def deciding(self, *, whole: bool = False) -> Iterator[Context]:
        """Open the model to decide about requests: keep other commits out, but not a writer that trains.

        `whole`: the decision concerns the whole model. Raise Busy.
        """
        if whole:
            self._check_whole()
        self._refresh()
        whole_model = copy.copy(self)
        whole_model._group = None
        with running(), whole_model.context() as context, context.stores.ledger.exclusive():
            self._check_current()
            catch_up(context)  # a process may have been killed before it wrote to the witness
            yield self._within_group(context)

    def _erase_replays(self) -> None:
        """Erase what a replay stored, its keys first, and the temporary texts of killed processes."""
        erase_abandoned()
        self.keyring.destroy(REPLAYS, self.keyring.held(REPLAYS))
        open_areas(self.directory, self.config.storage, self.id)[REPLAYS].clear()
