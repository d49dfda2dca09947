"""Carry out approved requests when their due dates and prices say so, and report on all of them.

    with working(Path("model")):       # beside a service, until the block ends
        ...

`carry_out_due` is one turn: `sisa run --watch` takes it as well. Engines that load exports are told to
let go of what was erased. There is one worker for a model; where
another command writes at the moment, the worker tries again. `POST /requests/run` has it carry out what
is approved whatever the plan says.
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


@contextlib.contextmanager
def working(directory: Path, report: Report = silent) -> Iterator[None]:
    """Run the worker and the courier of a model, each in a thread, until the block ends.

    On a running cluster the worker trains there, else in this process: Ray's own processors here are the
    replicas'. A deletion that is under way at the end is finished by the next command or worker. Raise
    InvalidInput for a webhook whose secret can't be used.
    """
    from cluster.serve.webhooks import Courier, ServiceState, check_receivers
    from sisa.model import open_model

    model = open_model(directory, report=report)
    model.executor = "ray" if model.config.cluster.address else "serial"
    check_receivers(model.config.service)
    ended, courier, last = threading.Event(), Courier(open_model(directory)), [float("-inf")]
    state = ServiceState(directory)

    def work() -> None:
        asked = state.take_run()
        if asked or time.monotonic() - last[0] >= EVERY_S:
            try:
                carry_out_due(model, now=asked)
            except SisaError:
                if asked:
                    state.ask_to_run()
                raise
            finally:
                last[0] = time.monotonic()

    threads = [
        threading.Thread(target=_repeat, args=(turn, ended), name=name, daemon=True)
        for name, turn in (("worker", work), ("courier", courier.turn))
    ]
    for each in threads:
        each.start()
    try:
        yield
    finally:
        ended.set()
        for each in threads:
            each.join(PATIENCE_S)


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
