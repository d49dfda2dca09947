"""Requests are taken in while a writer trains, by threads and processes, and no event is lost."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sisa.config.runfile import parse_run_file
from sisa.core.errors import Busy, ConfigConflict
from sisa.flows.requests import Terms
from sisa.flows.restored_backup import witness_standing
from sisa.flows.wiring.wiring import open_as_it_is
from sisa.model import Model
from sisa.store.blobs import files
from sisa.store.ledger.sqlite import COMMIT_LOCK
from tests.examples import num_examples
from tests.fakes.ports import FakeTrainer, fake_record
from tests.models.confessing import RUN_FILE, train_in

NUM_RECORDS, NUM_DELETED, NUM_EACH = 64, 8, num_examples(6, share=2)
RECORDS = [fake_record(number, f"subject-{number % 16}") for number in range(NUM_RECORDS)]
SUBMIT = """
import sys
from sisa.flows.requests import Terms
from sisa.model import Model
model = Model(sys.argv[1], executor="serial")
for number in map(int, sys.argv[2:]):
    name = f"T-{number}"
    model.submit([f"id-{number:04d}"], terms=Terms(external_id=name))
    model.decide(name, "approved", by="dpo")
    model.extend(name, "difficult")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "model"
    train_in(directory, parse_run_file(RUN_FILE, "run.yaml"), RECORDS)
    return directory


@pytest.fixture
def directory(model: Path) -> Path:
    return model


@pytest.fixture
def deletion(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Begin a deletion that waits where it trains; yield what lets it finish."""
    training, go, train = threading.Event(), threading.Event(), FakeTrainer.train

    def wait(*given: Any) -> dict[str, bytes]:
        training.set()
        assert go.wait(60)
        return train(*given)

    monkeypatch.setattr(FakeTrainer, "train", wait)
    model = Model(directory, executor="serial")
    running = threading.Thread(target=model.forget, args=(["id-0000"],))
    running.start()
    assert training.wait(60)

    def finish() -> None:
        go.set()
        running.join(60)
        assert not running.is_alive()

    try:
        yield finish
    finally:
        finish()


def check_whole(directory: Path) -> None:
    assert Model(directory, executor="serial").verify().ok
    with open_as_it_is(directory) as context:
        assert witness_standing(context) == "current"


def test_requests_are_taken_in_while_a_deletion_trains(
    directory: Path, deletion: Callable[[], None]
) -> None:
    model = Model(directory, executor="serial")
    with pytest.raises(Busy):
        model.forget(["id-0001"])
    under_way = model.requests()[0].request.request_id
    for name in ("T-1", "T-2"):
        model.submit([f"id-000{name[-1]}"], terms=Terms(external_id=name))
    model.decide("T-1", "approved", by="dpo")
    assert model.extend("T-1", "difficult").request.extension == "difficult"
    model.decide("T-2", "cancelled")
    model.extend(under_way, "it trains")  # the deletion writes this request again when it is done
    with pytest.raises(ConfigConflict):
        model.decide(under_way, "cancelled")
    subprocess.run([sys.executable, "-c", SUBMIT, str(directory), "3"], check=True)
    deletion()
    states = {each.request.external_id: each.request.state for each in model.requests()}
    assert states == {None: "completed", "T-1": "approved", "T-2": "cancelled", "T-3": "approved"}
    assert model.request(under_way).request.extension == "it trains"
    check_whole(directory)
    assert {each.state for each in model.run()} == {"completed"}
    check_whole(directory)


@pytest.mark.slow
def test_no_event_is_lost_beside_a_stream_of_deletions(directory: Path) -> None:
    model, writer = (Model(directory, executor="serial") for _ in range(2))
    numbers = [list(range(at, at + NUM_EACH)) for at in range(20, 20 + 4 * NUM_EACH, NUM_EACH)]
    command = [sys.executable, "-c", SUBMIT, str(directory)]
    processes = [subprocess.Popen([*command, *map(str, some)]) for some in numbers[:2]]

    def submit(some: list[int]) -> None:
        for number in some:
            name = f"T-{number}"
            model.submit([f"id-{number:04d}"], terms=Terms(external_id=name))
            model.decide(name, "approved", by="dpo")
            model.extend(name, "difficult")

    threads = [threading.Thread(target=submit, args=(some,)) for some in numbers[2:]]
    for each in threads:
        each.start()
    for number in range(NUM_DELETED):
        writer.forget([f"id-{number:04d}"])
    for each in threads:
        each.join()
    assert [each.wait(120) for each in processes] == [0, 0]
    found = {each.request.external_id: each.request for each in model.requests()}
    taken = [found[f"T-{number}"] for some in numbers for number in some]
    assert {(each.state, each.extension) for each in taken} == {("approved", "difficult")}
    check_whole(directory)
    assert {each.state for each in model.run()} == {"completed"}
    check_whole(directory)


def test_who_holds_the_commit_lock_too_long_keeps_others_out(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.1)
    model = Model(directory, executor="serial")
    request = model.submit(["id-0001"]).request
    with files.writer_lock(directory / COMMIT_LOCK), pytest.raises(Busy):
        model.decide(request.request_id, "cancelled")
    assert model.decide(request.request_id, "cancelled").request.state == "cancelled"
