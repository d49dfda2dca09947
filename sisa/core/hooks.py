"""Hooks on a deletion: how it reaches what else is made from records, such as patches and certificates.

`flows/wiring/wiring.py` lists the hooks in order.

>>> Contribution().vaulted
{}
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from sisa.core.domain import RecordRow
from sisa.core.ports import Change
from sisa.core.requests import Request


@dataclass(frozen=True, slots=True)
class Removal:
    """What a deletion removes: approved requests, and the held records that each one names."""

    requests: Sequence[Request]
    named: Mapping[str, Sequence[RecordRow]]

    @property
    def rows(self) -> dict[str, RecordRow]:
        """Return all of its records, by keyed id."""
        return {row.id_digest: row for rows in self.named.values() for row in rows}


@dataclass(frozen=True, slots=True)
class Contribution:
    """A hook's part of a deletion.

    `change` joins the deletion's commit. `vaulted` names, by request, the vault's set that keeps what
    the request removes. `finish` runs when the deletion is done, after every hook's `complete`, and
    raises nothing.
    """

    change: Change = field(default_factory=Change)
    vaulted: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies that a hook keeps of records: their kind, their storage area, and their names there."""

    what: str
    where: str
    names: Collection[str]


_M = TypeVar("_M", contravariant=True)  # an open model


class DeletionHook(Protocol[_M]):
    """Effect of a deletion on something other than shards that is made from records, such as patches.

    Hooks are called in turn. A crash may occur between any two calls, and before `finish`. So whatever
    must not be lost belongs in the commit, and the next command's `reconcile` continues from there.
    """

    def copies(self, model: _M, rows: Sequence[RecordRow]) -> Sequence[Copies]:
        """Return what the hook keeps of records: their certificate states that it was erased.

        It is asked before any hook contributes. The hook's `reconcile` erases it, or raises an error.
        """

    def contribute(self, model: _M, removal: Removal) -> Contribution:
        """Return what to add to the commit, before the deletion is planned; an error stops it.

        It may write files that the commit refers to, and commit what must come first.
        """

    def reconcile(self, model: _M) -> None:
        """Bring what the hook keeps to what remains. Every reconciliation calls it before it trains."""

    def complete(self, model: _M) -> None:
        """Do what follows when heads have advanced; raise nothing. Every reconciliation calls it.

        It acts on the present state, so the next command completes what a crash or failure left undone.
        """

    def export(self, model: _M, name: str, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        """Return the files to export under a name, with those that the hook adds."""
