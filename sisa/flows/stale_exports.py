"""Erase exports that contain what a deletion removed.

    deletion  its commit marks the exports that a removed record touched (`plan.marked`)
    erasing   mark the unchanged ones -> erase the files -> drop the rows

Rows are dropped after their files are erased, so that no crash leaves an unknown export. A directory
that was moved or changed is left alone, and its rows stay marked. It is erased when it returns, or given
up if the user vouches for it. An export of several shards has a row for each, and they are dropped
together. Copies that somebody made of an export are not reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from sisa.core.domain import Export
from sisa.core.errors import EnvironmentFault, all_tried
from sisa.core.ports import Change
from sisa.core.requests import event
from sisa.flows.wiring.context import Context, commit


def finish_written(context: Context) -> None:
    """Adopt the exports that a killed process wrote completely, and abandon and erase the others.

    The caller holds the writer lock.
    """
    unfinished = [each for each in context.stores.ledger.exports() if each.state == "writing"]
    if not unfinished:
        return
    for path in dict.fromkeys(each.path for each in unfinished):
        context.stores.exports.abandon(path)
    whole = [each for each in unfinished if context.stores.exports.state(each) == "held"]
    absent = [each.name for each in unfinished if each not in whole]
    commit(context, Change(exports=[replace(each, state="clean") for each in whole], unexported=absent))


def erase_stale(context: Context) -> None:
    """Erase the exports that a deletion marked and that are unchanged.

    An export that can't be read or erased does not stop the others; its error is raised at the end.
    """
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
    commit(context, Change(exports=due))  # from here on, a missing export was erased by this program
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
            replace(request, exports_erased=request.exports_erased + counts[request.request_id])
            for request in context.stores.ledger.requests()
            if request.request_id in counts
        ]
        names = [each.name for each in erased]
        commit(context, Change(exports=left, unexported=names, requests=counted))


def export_standing(context: Context, export: Export) -> str:
    """Return "held", "gone", "changed", or "unreadable" if the disk does not say."""
    try:
        return context.stores.exports.state(export)
    except EnvironmentFault:
        return "unreadable"


def missing(context: Context) -> list[Export]:
    """Return the exports that a deletion marked and that are missing or changed."""
    return [each for each in context.stores.ledger.exports() if each.stale]


def give_up_lost(context: Context) -> tuple[str, ...]:
    """Drop the rows of stale exports that are gone; the user vouches that no copy is left.

    Record it with the requests that marked them, and return the exports' paths.
    """
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
