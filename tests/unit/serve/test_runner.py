"""The runner carries out what is due or asked for, whatever fails in between."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.cli import cli
from cluster.serve import runner
from cluster.serve import service as service_module
from cluster.serve.domain import Service
from cluster.serve.runner import carry_out_requests, delivering, service_runner
from cluster.serve.state import ServiceState
from cluster.serve.webhooks import Courier
from sisa.config.runfile import parse_run_file
from sisa.core.errors import Busy
from sisa.flows.requests import Terms
from sisa.model import Model, open_model
from tests.fakes.ports import fake_record
from tests.models.confessing import RUN_FILE, train_in, use_fake_resources
from tests.waiting import wait_for


@pytest.fixture
def model(service: Service, monkeypatch: pytest.MonkeyPatch) -> Model:
    monkeypatch.setattr(runner, "TURN_S", 0.01)
    return service.model


def state(model: Model, name: str) -> str:
    return model.request(name).request.state


def test_what_is_due_is_carried_out_and_what_waits_waits(model: Model) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date().isoformat()
    model.submit(["id-0003"], terms=Terms(external_id="due", due=tomorrow, approver="dpo"))
    model.submit(["id-0004"], terms=Terms(external_id="undecided", due=tomorrow))
    with service_runner(model.directory):
        wait_for(lambda: state(model, "due") == "completed")
    assert state(model, "undecided") == "received"
    assert carry_out_requests(model) == ()


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
    monkeypatch.setattr(runner, "EVERY_S", 3_600.0)
    model.submit(["id-0003"], terms=Terms(external_id="T-1", approver="dpo"))
    ServiceState(model.directory).ask_to_run()
    with service_runner(model.directory):
        wait_for(lambda: state(model, "T-1") == "completed")
    assert failed
    wait_for(lambda: not ServiceState(model.directory).asked_to_run())


def test_what_was_asked_for_outlives_an_interrupted_runner(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, run = ServiceState(model.directory), Model.run

    def interrupted(_: Model) -> object:
        raise KeyboardInterrupt

    def asked_again(self: Model) -> object:
        state.ask_to_run()
        return run(self)

    state.ask_to_run()
    monkeypatch.setattr(Model, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        carry_out_requests(model, plan=False)
    assert state.asked_to_run()
    monkeypatch.setattr(Model, "run", asked_again)
    carry_out_requests(model, plan=False)
    assert state.asked_to_run()  # by the call that came meanwhile
    monkeypatch.setattr(Model, "run", run)
    carry_out_requests(model, plan=False)
    assert not state.asked_to_run()


def test_a_service_has_a_runner(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.submit(["id-0003"], terms=Terms(external_id="T-1", approver="dpo"))
    ServiceState(model.directory).ask_to_run()
    here = service_module.Running("http://127.0.0.1:8808", 1, 0.0, "t")
    monkeypatch.setattr(service_module, "started", lambda *_: nullcontext(here))

    def end() -> None:
        wait_for(lambda: state(model, "T-1") == "completed")

    monkeypatch.setattr(service_module, "wait_until_ended", end)
    assert cli.run(["serve", "-m", str(model.directory)]) == 0


def test_watching_reports_as_a_service_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)
    monkeypatch.setattr(runner, "TURN_S", 0.01)
    secret = tmp_path / "hook.secret"
    secret.write_text("whsec_c2VjcmV0IG9mIGEgdGVzdA==")
    secret.chmod(0o600)
    hooks = f"service: {{webhooks: [{{url: 'http://127.0.0.1:9/', secret_file: {secret}}}]}}\n"
    config = parse_run_file(RUN_FILE + hooks, "run.yaml")
    train_in(tmp_path / "model", config, [fake_record(number) for number in range(6)])
    got: list[str] = []

    def take(_url: str, body: bytes, _headers: object) -> int:
        got.append(json.loads(body)["data"]["state"])
        return 200

    monkeypatch.setattr(Courier.__init__, "__defaults__", (take, time.time))
    with delivering(tmp_path / "model"):
        wait_for(lambda: ServiceState(tmp_path / "model").seen() is not None)
        open_model(tmp_path / "model").submit(["id-0003"])
        wait_for(lambda: got == ["received"])
