"""Erase exports that hold what a deletion removed.

    deletion  its commit marks the exports that a removed record touched (`plan.marked`)
    erasing   mark what is still as it was written -> erase the files -> drop the rows

Rows go after their files, so that no crash leaves an export that nobody knows. A directory that was
moved or changed is left alone and its rows stay, marked: it is erased when it comes back, or given up
on a person's word. An export of several shards together has a row for each, and they go together.
Copies that somebody made of an export are not reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sisa.core.domain import Export
from sisa.core.errors import EnvironmentFault, all_tried
from sisa.core.ports import Change
from sisa.core.requests import event, with_exports_erased
from sisa.flows.wiring.context import Context, commit


def finish_written(context: Context) -> None:
    """Take over the exports that a killed process wrote whole, and give up those that it did not, with
    what it left of them. The caller holds the writer lock."""
    unfinished = [each for each in context.stores.ledger.exports() if each.state == "writing"]
    if not unfinished:
        return
    for path in dict.fromkeys(each.path for each in unfinished):
        context.stores.exports.abandon(path)
    whole = [each for each in unfinished if context.stores.exports.state(each) == "held"]
    absent = [each.name for each in unfinished if each not in whole]
    commit(context, Change(exports=[replace(each, state="clean") for each in whole], unexported=absent))


def erase_stale(context: Context) -> None:
    """Erase the exports that a deletion marked and that are still what was written. One that can't be
    read or erased keeps no other one: its error is raised when all were tried."""
    due: list[Export] = []
    with all_tried() as tried:
        for each in (each for each in context.stores.ledger.exports() if each.stale):
            with tried():
                if each.state == "erasing" or context.stores.exports.state(each) == "held":
                    due.append(replace(each, state="erasing"))
        with tried():
            _erase_marked(context, due)


def _erase_marked(context: Context, due: Sequence[Export]) -> None:
    if not due:
        return
    commit(context, Change(exports=due))  # from now on, what is gone was erased by us
    erased: list[Export] = []
    left: list[Export] = []
    with all_tried() as tried:
        for each in due:
            with tried():
                if context.stores.exports.erase(each):
                    erased.append(each)
                else:
                    left.append(replace(each, state="tainted"))
        counts = Counter(name for name, _ in {(each.request_id, each.path) for each in erased})
        counted = [
            with_exports_erased(request, counts[request.request_id])
            for request in context.stores.ledger.requests()
            if request.request_id in counts
        ]
        names = [each.name for each in erased]
        commit(context, Change(exports=left, unexported=names, requests=counted))


def export_standing(context: Context, export: Export) -> str:
    """Return "held", "gone" or "changed"; "unreadable" where the disk does not show it."""
    try:
        return context.stores.exports.state(export)
    except EnvironmentFault:
        return "unreadable"


def missing(context: Context) -> list[Export]:
    """Return the exports that a deletion marked and that are not found, or are not what was written."""
    return [each for each in context.stores.ledger.exports() if each.stale]


def give_up_lost(context: Context) -> tuple[str, ...]:
    """Drop the rows of stale exports that are not where they were written, on a person's word that no
    copy is left; note it with the requests that marked them, and return the exports' paths."""
    lost = [each for each in missing(context) if export_standing(context, each) == "gone"]
    counts = Counter(each.request_id for each in lost)
    events = [
        event(request, context.now(), f"{counts[request.request_id]} lost exports were given up")
        for request in context.stores.ledger.requests()
        if request.request_id in counts
    ]
    if lost:
        commit(context, Change(unexported=[each.name for each in lost], events=events))
    return tuple(dict.fromkeys(each.path for each in lost))
