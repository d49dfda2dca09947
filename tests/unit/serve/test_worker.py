"""The worker carries out what is due or asked for, whatever fails in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta

import pytest

from cluster.cli import cli
from cluster.serve import service as service_module
from cluster.serve import worker
from cluster.serve.app import Service
from cluster.serve.webhooks import ServiceState
from cluster.serve.worker import carry_out_due, working
from sisa.core.errors import Busy
from sisa.flows.deletion import Terms
from sisa.model import Model


@pytest.fixture
def model(service: Service, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(worker, "LOOK_S", 0.01)
    return service.model


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(model: Model, name: str) -> str:
    return model.request(name).request.state


def test_what_is_due_is_carried_out_and_what_waits_waits(model: Model) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    model.submit(["id-0003"], terms=Terms(external_id="due", due=tomorrow, approver="dpo"))
    model.submit(["id-0004"], terms=Terms(external_id="undecided", due=tomorrow))
    with working(model.directory):
        until(lambda: state(model, "due") == "completed")
    assert state(model, "undecided") == "received"
    assert carry_out_due(model) == ()


def test_what_was_asked_for_is_carried_out_although_another_writes_first(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failed = Model.run, list[bool]()

    def busy_once(self: Model) -> object:
        if not failed:
            failed.append(True)
            raise Busy("another process is writing to this model")
        return run(self)

    monkeypatch.setattr(Model, "run", busy_once)
    monkeypatch.setattr(Model, "plan_run", lambda _: pytest.fail("the plan was asked"))
    monkeypatch.setattr(worker, "EVERY_S", 3_600.0)
    model.submit(["id-0003"], terms=Terms(external_id="T-1", approver="dpo"))
    ServiceState(model.directory).ask_to_run()
    with working(model.directory):
        until(lambda: state(model, "T-1") == "completed")
    assert failed
    assert not ServiceState(model.directory).take_run()


def test_a_service_has_a_worker(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.submit(["id-0003"], terms=Terms(external_id="T-1", approver="dpo"))
    ServiceState(model.directory).ask_to_run()
    here = service_module.Running("http://127.0.0.1:8808", 1, 0.0, "t")
    monkeypatch.setattr(service_module, "started", lambda *_: nullcontext(here))

    def end() -> None:
        until(lambda: state(model, "T-1") == "completed")

    monkeypatch.setattr(service_module, "wait_until_ended", end)
    assert cli.run(["serve", "-m", str(model.directory)]) == 0
