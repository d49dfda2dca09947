"""Erase the exports that contain what a deletion removed, and tell what became of the others.

A deletion's commit marks the exports that a removed record touched (`tainted_exports`). Their rows are
dropped after their files are erased, so that no crash leaves an unknown export. A directory that was
moved or changed is left alone and stays marked: it is erased when it returns, or given up if the user
vouches for it. An export of several shards has a row for each; they are dropped together. Copies that
somebody made of an export are not reached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from sisa.core.domain import Export
from sisa.core.errors import EnvironmentFault, all_tried
from sisa.core.ports import Change
from sisa.core.requests import event
from sisa.flows.context.commit import commit
from sisa.flows.context.context import Context


def stale_exports(context: Context) -> list[Export]:
    """Return the exports that a deletion marked and that are not erased, a row for each shard in one."""
    return [each for each in context.stores.ledger.exports() if each.stale]


def stale_paths(context: Context) -> list[str]:
    """Return the paths of stale exports."""
    return list(dict.fromkeys(each.path for each in stale_exports(context)))


def by_directory(exports: Iterable[Export]) -> list[tuple[list[Export], tuple[int, ...]]]:
    """Return the rows and the shards of each directory, by path; a merged export has several shards."""
    found: dict[tuple[str, str], list[Export]] = {}
    for each in sorted(exports, key=lambda each: (each.directory, each.shard)):
        found.setdefault(each.directory, []).append(each)
    return [(rows, tuple(dict.fromkeys(each.shard for each in rows))) for rows in found.values()]


def export_standing(context: Context, export: Export) -> str:
    """Return "held", "gone", "changed", or "unreadable" if the disk does not say."""
    try:
        return context.stores.exports.standing(export)
    except EnvironmentFault:
        return "unreadable"


def erase_stale_exports(context: Context) -> None:
    """Erase unchanged exports that a deletion marked; raise their errors at the end."""
    due: list[Export] = []
    erased: list[Export] = []
    left: list[Export] = []
    with all_tried() as tried:
        for each in stale_exports(context):
            with tried():
                if each.state == "erasing" or context.stores.exports.standing(each) == "held":
                    due.append(replace(each, state="erasing"))
        if not due:
            return
        commit(context, Change(exports=due))  # from now on, this program erased a missing export
        for each in due:
            with tried():
                if context.stores.exports.erase(each):
                    erased.append(each)
                else:
                    left.append(replace(each, state="tainted"))
        counts = count_by_request(erased)
        names = [each.name for each in erased]
        with context.stores.ledger.exclusive():
            counted = [
                replace(request, exports_erased=request.exports_erased + counts[request.request_id])
                for request in context.stores.ledger.requests()
                if request.request_id in counts
            ]
            commit(context, Change(exports=left, unexported=names, requests=counted))


def give_up_lost(context: Context) -> tuple[str, ...]:
    """Drop the rows of stale exports that are gone, and return their paths: the user vouches for it."""
    lost = [each for each in stale_exports(context) if export_standing(context, each) == "gone"]
    counts = count_by_request(lost)
    with context.stores.ledger.exclusive():
        events = [
            event(request, context.now(), f"{counts[request.request_id]} lost exports were given up")
            for request in context.stores.ledger.requests()
            if request.request_id in counts
        ]
        if lost:
            commit(context, Change(unexported=[each.name for each in lost], events=events))
    return tuple(dict.fromkeys(each.path for each in lost))


def count_by_request(exports: Iterable[Export]) -> Counter[str]:
    """Return the number of stale exports of each request; several shards in one export count once."""
    return Counter(request_id for request_id, _ in {(each.request_id, each.path) for each in exports})
