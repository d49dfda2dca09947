"""Ask the frozen base alone what it knows of the records that a deletion removes.

Deleting shards can't reach what the base knew before any record arrived. So once the served model is
clean, and before the text is erased, the base is asked whether it produces that text. The answer,
numbers alone, is kept with the request.

A probe that fails must not keep the text: the kind of error is kept in its place, and the deletion goes
on. A deletion that is cut short before its probe is finished without one, since the text is erased
first. A text that was put into the vault by consent leaves it when all of it was asked and the base
knows none of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sisa.core.domain import Probed, RecordRow, SliceFile
from sisa.core.events import Notice
from sisa.core.ports import Change, Probe
from sisa.core.requests import probed, unvaulted
from sisa.flows.wiring.context import Context, commit, stored_in


def probe_removed(
    context: Context, named: Mapping[str, Sequence[RecordRow]], held: Sequence[SliceFile]
) -> None:
    """Probe the base for the records that each request removed, and keep the outcome with it.

    `held` are the slice files that hold them, from before the commit.
    """
    if context.compute.probe is None or not any(named.values()):
        return
    context.report(Notice("asking the base alone what it knows of the deleted text"))
    outcomes = {
        request_id: _probed(context, context.compute.probe, rows, held)
        for request_id, rows in named.items()
        if rows
    }
    asked = [
        probed(request, outcomes[request.request_id])
        for request in context.stores.ledger.requests()
        if request.request_id in outcomes
    ]
    unknown = [each.vaulted for each in asked if each.vaulted and _is_unknown(outcomes[each.request_id])]
    changed = [unvaulted(each) if each.vaulted in unknown else each for each in asked]
    commit(context, Change(requests=changed, unvaulted=unknown))


def _is_unknown(outcome: Probed) -> bool:
    """Return whether all of it was asked, and the base knows none of it: no patch is needed."""
    return not outcome.failure and outcome.num_known == 0 and outcome.num_probed == outcome.num_records


def _probed(
    context: Context, probe: Probe, rows: Sequence[RecordRow], held: Sequence[SliceFile]
) -> Probed:
    try:
        return probe([stored.record for stored in stored_in(context, held, rows)])
    except Exception as error:  # whatever it is: the text must go
        return Probed(len(rows), failure=type(error).__name__)
