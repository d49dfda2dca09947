"""Open a model's directory: what its ledger and its key say of it, its world, its lock.

Nothing is read of a directory without a committed model, and nothing under another key. Readers get the
world after it has caught up with its witness; writers hold the directory's lock from before that on, and
a second writer gets `Busy`. An object of this class may live long: each time it opens its world, it
compares the ledger's description of the model with the one that it took, and takes a changed one over.

What a caller can do with a model is in `model.py`; its parts are in `wiring.py` and `resources.py`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from sisa.core.digest import Keyed
from sisa.core.errors import (
    Busy,
    ConfigConflict,
    EnvironmentFault,
    IntegrityError,
    InvalidInput,
    Outdated,
    SisaError,
)
from sisa.core.events import Event, Notice, Report
from sisa.data.temporary_files import erase_abandoned
from sisa.flows.stale_exports import finish_written
from sisa.flows.wiring import wiring
from sisa.flows.wiring.context import Context
from sisa.flows.wiring.resources import Resources
from sisa.flows.wiring.run_context import running
from sisa.flows.wiring.wiring import LEDGER, LOCK, SCRATCH, OpenExecutor
from sisa.flows.wiring.witness import catch_up, is_behind
from sisa.store.blobs import files
from sisa.store.blobs.storage_areas import open_areas
from sisa.store.ledger.database import is_read_only
from sisa.store.ledger.ledger import SqlLedger

DESCRIPTION = ("config", "base", "embedder", "key", "model")  # of the ledger's `meta`
WAITS_S = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # before a question is asked again

_P = ParamSpec("_P")
_M = TypeVar("_M", bound="OpenedModel")
_T = TypeVar("_T")


def silent(_event: Event) -> None:
    """The report of callers who asked for none."""


def asked_again(question: Callable[Concatenate[_M, _P], _T]) -> Callable[Concatenate[_M, _P], _T]:
    """Ask a question of a model again where it meets damage, or what is served no more, and the ledger
    has moved meanwhile: a writer erases what its commit replaced. Raises IntegrityError for damage that
    stays, Busy where the ledger does not come to rest."""

    @functools.wraps(question)
    def asking(model: _M, /, *given: _P.args, **named: _P.kwargs) -> _T:
        for wait_s in WAITS_S:
            time.sleep(wait_s)
            seq = model._seq()
            try:
                return question(model, *given, **named)
            except (IntegrityError, Outdated):
                if model._seq() == seq:
                    raise
        raise model._busy()

    return asking


class OpenedModel:
    """A model in a directory, and the ways to its world."""

    def __init__(
        self,
        directory: Path | str,
        *,
        executor: str | OpenExecutor = "ray",
        report: Report = silent,
    ) -> None:
        """Open an existing model. Raises InvalidInput where there is none, IntegrityError for damage."""
        self.directory = Path(directory)
        if not (self.directory / LEDGER).is_file():
            raise InvalidInput(
                "there is no model in this directory",
                where=str(self.directory),
                expected=f"a directory with {LEDGER}",
                next_step="train one with `sisa train RUN.yaml`",
            )
        self.executor = executor
        self.report = report
        self._take(self._described())

    def _ledger(self) -> AbstractContextManager[SqlLedger]:
        return contextlib.closing(SqlLedger(self.directory / LEDGER))

    def _described(self) -> dict[str, str]:
        """What the ledger says of the model now."""
        with self._ledger() as ledger:
            meta = ledger.meta()
        if "config" not in meta:
            raise InvalidInput(
                "the model in this directory was never committed",
                where=str(self.directory),
                next_step="run `sisa train RUN.yaml` again",
            )
        return {name: meta[name] for name in DESCRIPTION if name in meta}

    def _seq(self) -> int:
        """The number of the ledger's last commit; 0 of one that can't be read."""
        with (
            contextlib.suppress(SisaError),
            contextlib.closing(SqlLedger(self.directory / LEDGER)) as it,
        ):
            return it.seq()
        return 0

    def _busy(self) -> Busy:
        return Busy(
            "another process is writing to this model: what it writes can't be judged now",
            where=str(self.directory),
            next_step="wait until it has finished, then run the same command again",
        )

    def _take(self, meta: dict[str, str]) -> None:
        self.id = wiring.model_id(meta)
        self.config = wiring.stored_config(meta)
        self.keyring = wiring.open_keyring(self.config, self.id)
        self.base = wiring.named(meta, "base")
        self.embedder = wiring.named(meta, "embedder")
        self.resources = Resources(self.config, self.base, self.embedder)
        self.secret = wiring.stored_secret(self.directory, self.config, self.id)
        if Keyed(self.secret).name != meta.get("key"):
            raise IntegrityError(
                "the partition key is not this model's",
                where=str(wiring.key_path(self.directory, self.config, self.id)),
                next_step="restore the key from a backup: without it no record can be found",
            )
        self._taken = meta

    def _catch_up(self) -> None:
        """Take over what another process made of the model since it was opened: its run file, its base,
        its embedder, its encryption. Raises ConfigConflict where another model lies here now."""
        meta = self._described()
        if meta == self._taken:
            return
        if any(meta.get(name) != self._taken.get(name) for name in ("model", "key")):
            raise ConfigConflict(
                "another model lies in this directory than the one that was opened",
                where=str(self.directory),
                next_step="open the directory again",
            )
        self._take(meta)
        self.report(Notice("the model was reconfigured meanwhile; going on with its present run file"))

    @contextlib.contextmanager
    def _context(
        self, *, locked: bool = False, as_it_is: bool = False, outdated: bool = False
    ) -> Iterator[Context]:
        """The model's parts as the ledger describes them now, after it has caught up with its witness,
        unless it is opened `as_it_is`. `locked`: the caller holds the writer lock; `outdated`: so is a
        copy that is behind its witness and can't be written."""
        self._catch_up()
        context = wiring.open_context(
            self.directory,
            self.resources,
            Keyed(self.secret),
            self.executor,
            self.report,
            base_digest=self.base.digest,
            model=self.id,
            keyring=self.keyring,
        )
        try:
            if locked:
                catch_up(context)
            elif not as_it_is and is_behind(context):
                self._replay(context, outdated=outdated)
            yield context
        finally:
            wiring.close(context)

    def _replay(self, context: Context, *, outdated: bool) -> None:
        """Delete again what was deleted since this copy was made. Raises EnvironmentFault where it can't
        be written, unless it may be `outdated`."""
        if is_read_only(self.directory / LEDGER):
            if outdated:
                return
            raise EnvironmentFault(
                "this copy of the model still holds what was deleted since it was made, and it can't be "
                "written to delete it again",
                where=str(self.directory),
                next_step="copy it to where it can be written; `sisa status` and `sisa verify` read it",
            )
        with files.writer_lock(self.directory / LOCK):
            catch_up(context)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the writer lock over the model as it is now. Raises Busy."""
        wiring.check_executor(self.executor)  # an unknown one is refused before anything is written
        with running(), files.writer_lock(self.directory / LOCK):
            self._catch_up()
            wiring.keep_key(self.directory, self.config, self.id, self.secret)
            self._clear_scratch()
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Context]:
        with self._locked(), self._context(locked=True) as context:
            finish_written(context)
            yield context

    def _clear_scratch(self) -> None:
        """What a replay stored goes, its keys first: it can't be read any more, wherever it is. So do
        texts that a process left in temporary directories, killed while it read a data set."""
        erase_abandoned()
        self.keyring.destroy(SCRATCH, self.keyring.held(SCRATCH))
        open_areas(self.directory, self.config.storage, self.id)[SCRATCH].clear()
