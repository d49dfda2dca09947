"""Carry out approved requests when their due dates and prices say so, and report on all of them.

    with working(Path("model")):       # beside a service, until the block ends
        ...

`carry_out_asked` is one turn, and `sisa run --watch` takes the same and reports as well, where no
`sisa serve` runs. Engines that load exports are asked to let go of what was erased. There is one worker
for a model; where another command writes at the moment, it tries again. `POST /requests/run` has it
carry out what is approved whatever the plan says.
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
from sisa.core.domain import Request
from sisa.core.errors import SisaError, internal_fault
from sisa.core.events import Report, silent

if TYPE_CHECKING:
    from sisa.model import Model

EVERY_S, LOOK_S = 60.0, 1.0  # between plans; between looks at what was asked or is to be reported
PATIENCE_S = 5.0

_log = logging.getLogger(__name__)


def carry_out_due(model: Model, *, now: bool = False) -> tuple[Request, ...]:
    """Report the queue, and carry requests out if the plan says so or with `now`; return them."""
    model.queue()
    if not now and model.plan_run().choice != "run now":
        return ()
    done = model.run()
    for each in engines_hold(model, sweep=True) if done else ():
        if not each.clean:  # an engine sweeps itself, too; `sisa engines` looks again
            _log.warning("%s holds %d erased adapters %s", each.url, len(each.erased), each.fault)
    model.queue()
    return done


def carry_out_asked(model: Model, *, plan: bool = True) -> tuple[Request, ...]:
    """Carry requests out if somebody asked for it or, with `plan`, if they are due; return them."""
    from cluster.serve.webhooks import ServiceState

    state = ServiceState(model.directory)
    asked = state.take_run()
    try:
        return carry_out_due(model, now=asked) if asked or plan else ()
    except SisaError:
        if asked:
            state.ask_to_run()
        raise


@contextlib.contextmanager
def working(directory: Path, report: Report = silent) -> Iterator[None]:
    """Run the worker and the courier of a model, each in a thread, until the block ends.

    On a running cluster the worker trains there, else in this process: Ray's own processors here are the
    replicas'. A deletion that is under way at the end is finished by the next command or worker. Raise
    InvalidInput for a webhook whose secret can't be used.
    """
    from sisa.model import open_model

    model = open_model(directory, report=report)
    model.executor = "ray" if model.config.cluster.address else "serial"
    last = float("-inf")

    def work() -> None:
        nonlocal last
        planned = time.monotonic() - last >= EVERY_S
        last = time.monotonic() if planned else last
        carry_out_asked(model, plan=planned)

    with reporting(directory), _thread("worker", work):
        yield


@contextlib.contextmanager
def reporting(directory: Path) -> Iterator[None]:
    """Report changes of requests in a thread until the block ends, if the run file says to whom.

    Raise InvalidInput for a webhook whose secret can't be used.
    """
    from cluster.serve.webhooks import Courier, check_receivers
    from sisa.model import open_model

    model = open_model(directory)
    settings = model.config.service
    check_receivers(settings)
    with contextlib.ExitStack() as stack:
        if settings.webhooks or settings.opendsr:
            stack.enter_context(_thread("courier", Courier(model).turn))
        yield


@contextlib.contextmanager
def _thread(name: str, turn: Callable[[], object]) -> Iterator[None]:
    """Take turns in a thread until the block ends."""
    ended = threading.Event()
    thread = threading.Thread(target=_repeat, args=(turn, ended), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE_S)


def _repeat(turn: Callable[[], object], ended: threading.Event) -> None:
    """Take turns until the end. An error is logged by its kind, once in a row, and ends no thread."""
    failed = ""
    while not ended.wait(LOOK_S):
        try:
            turn()
            failed = ""
        except Exception as error:
            fault = error if isinstance(error, SisaError) else internal_fault(error)
            if failed != (failed := type(fault).__name__):
                _log.warning("the %s waits: %s", threading.current_thread().name, failed)
