"""A model's directory, opened: what its ledger and its key say of it, its world, its lock.

Rules: nothing is read of a directory without a committed model, and nothing under another key. Whoever
reads gets the world after it has caught up with its witness; whoever writes holds the directory's lock
from before that on, and a second writer gets `Busy`.

Not covered: what a caller can do with a model (`api.py`); its parts (`opening.py`, `parts.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sisa import opening
from sisa.digest import Keyed
from sisa.errors import IntegrityError, InvalidInput
from sisa.events import Event, Report
from sisa.opening import KEY, LEDGER, LOCK, SCRATCH, OpenExecutor
from sisa.parts import Parts
from sisa.running import running
from sisa.store import files
from sisa.store.ledger import SqlLedger
from sisa.store.places import rooms
from sisa.witness import is_behind, settle
from sisa.world import World


def silent(_event: Event) -> None:
    """The report of callers who asked for none."""


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
        ledger = SqlLedger(self.directory / LEDGER)
        meta = ledger.meta()
        ledger.close()
        if "config" not in meta:
            raise InvalidInput(
                "the model in this directory was never committed",
                where=str(self.directory),
                next_step="run `sisa train RUN.yaml` again",
            )
        self.id = opening.model_id(meta)
        self.config = opening.stored_config(meta)
        self.keyring = opening.open_keyring(self.config, self.id)
        self.base = opening.named(meta, "base")
        self.embedder = opening.named(meta, "embedder")
        self.executor = executor
        self.report = report
        self.parts = Parts(self.config, self.base, self.embedder)
        self.secret = opening.stored_secret(self.directory, self.config)
        if Keyed(self.secret).name != meta.get("key"):
            raise IntegrityError(
                "the partition key is not this model's",
                where=str(self.directory / KEY),
                next_step="restore the key from a backup: without it no record can be found",
            )

    @contextlib.contextmanager
    def _world(self, *, locked: bool = False, as_it_is: bool = False) -> Iterator[World]:
        """The model's parts, after it has caught up with its witness, unless it is opened `as_it_is`.
        `locked`: the caller holds the writer lock."""
        world = opening.open_world(
            self.directory,
            self.parts,
            Keyed(self.secret),
            self.executor,
            self.report,
            base_digest=self.base.digest,
            model=self.id,
            keyring=self.keyring,
        )
        try:
            if locked:
                world = settle(world)
            elif not as_it_is and is_behind(world):
                with files.writer_lock(self.directory / LOCK):
                    world = settle(world)
            yield world
        finally:
            opening.close(world)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[World]:
        opening.check_executor(self.executor)  # an unknown one is refused before anything is written
        with running(), files.writer_lock(self.directory / LOCK):
            self._clear_scratch()
            with self._world(locked=True) as world:
                yield world

    def _clear_scratch(self) -> None:
        """What a replay stored goes, its keys first: it can't be read any more, wherever it is."""
        self.keyring.destroy(SCRATCH, self.keyring.held(SCRATCH))
        rooms(self.directory, self.config.storage, self.id)[SCRATCH].clear()
