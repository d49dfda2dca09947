"""Carry out approved requests when the plan says so, and report changes of requests.

    with service_runner(Path("model")):       # beside a service, until the block ends
        ...

The runner is a thread beside `sisa serve`, and tries again after any error. Without a service,
`sisa run --watch` calls `carry_out_requests` in a loop, within `delivering`. Run one of the two for a
model. After a deletion, engines that load exports are made to drop what was erased. `POST /requests/run`
has approved requests carried out whatever the plan says.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.serve.engines import engines_hold
from cluster.serve.state import ServiceState
from sisa.core.errors import SisaError, internal_fault
from sisa.core.events import Report, silent
from sisa.core.requests import Request

if TYPE_CHECKING:
    from sisa.model import Model

EVERY_S = 60.0  # between two plans
TURN_S = 1.0  # between two turns
PATIENCE_S = 5.0  # with a turn that runs when the block ends

_log = logging.getLogger(__name__)


def carry_out_requests(model: Model, *, plan: bool = True) -> tuple[Request, ...]:
    """Carry requests out if somebody asked for it or, with `plan`, if they are due; return them."""
    state = ServiceState(model.directory)
    asked = state.asked_to_run()
    if not (asked or plan):
        return ()
    model.queue()  # reports how many wait
    if not asked and model.plan_run().choice != "run now":
        return ()
    done = model.run()
    if asked:  # if this process ends before, the next runner carries them out
        state.has_run(asked)
    for each in engines_hold(model, sweep=True) if done else ():
        if not each.clean:  # its own next sweep may succeed; `sisa engines` shows it
            _log.warning("%s holds %d erased adapters %s", each.url, len(each.erased), each.fault)
    model.queue()
    return done


@contextlib.contextmanager
def service_runner(directory: Path, report: Report = silent) -> Iterator[None]:
    """Start the runner and the courier of a model, each in a thread, until the block ends.

    The runner trains on a running cluster, else in this process, since the replicas use the local Ray.
    The next command or runner finishes a deletion that is under way at the end. Raise InvalidInput for a
    webhook whose secret can't be used.
    """
    from sisa.model import open_model

    model = open_model(directory, report=report)
    model.executor = "ray" if model.config.cluster.address else "serial"
    next_plan = time.monotonic()

    def turn() -> None:
        nonlocal next_plan
        plan = time.monotonic() >= next_plan
        if plan:
            next_plan = time.monotonic() + EVERY_S
        carry_out_requests(model, plan=plan)

    with delivering(directory), _thread("runner", turn):
        yield


@contextlib.contextmanager
def delivering(directory: Path) -> Iterator[None]:
    """Deliver messages about requests in a thread until the block ends, if the run file names receivers.

    Raise InvalidInput for a webhook whose secret can't be used.
    """
    from cluster.serve.webhooks import Courier, secrets_of
    from sisa.model import open_model

    model = open_model(directory)
    settings = model.config.service
    for each in settings.webhooks:
        secrets_of(each)
    has_receivers = settings.webhooks or settings.opendsr
    with _thread("courier", Courier(model).turn) if has_receivers else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _thread(name: str, turn: Callable[[], object]) -> Iterator[None]:
    """Call `turn` again and again in a thread, until the block ends."""
    ended = threading.Event()
    thread = threading.Thread(target=_repeat, args=(turn, ended), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE_S)


def _repeat(turn: Callable[[], object], ended: threading.Event) -> None:
    """Call `turn` until the end. Log an error by its type, once in a row, and go on."""
    logged = ""
    while not ended.wait(TURN_S):
        try:
            turn()
            logged = ""
        except Exception as error:
            fault = error if isinstance(error, SisaError) else internal_fault(error)
            name = type(fault).__name__
            if name != logged:
                _log.warning("the %s waits: %s", threading.current_thread().name, name)
            logged = name
