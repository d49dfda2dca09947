"""Training as a job on a real head and worker node: submitted, followed, detached, stopped, lost.

All tests of this module share one cluster. An interrupted training and an undisturbed one end with the
same bytes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.cli import run
from cluster.jobs.job_flow import COMMAND
from cluster.jobs.ray_jobs import RayJobs
from sisa.core.errors import EnvironmentFault
from tests.contract.job_promises import PROMISES, Ground, submit_three
from tests.models.programs.job_cluster import JobCluster, job_cluster
from tests.models.tiny_model import (
    KEY,
    PEOPLE,
    change_run,
    held_files,
    ids_of,
    train_scratch,
    write_run,
)

pytestmark = [
    pytest.mark.ray,
    pytest.mark.torch,
    pytest.mark.long,
    pytest.mark.usefixtures("own_ray"),
]

NUM_STAGES = 6
EPOCHS = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobCluster]:
    with job_cluster(tmp_path_factory.mktemp("cache")) as found:
        yield found


@pytest.fixture(scope="module")
def ground(cluster: JobCluster, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return submit_three(RayJobs(cluster.address), tmp_path_factory.mktemp("job") / "folder")


@pytest.mark.parametrize("promise", PROMISES)
def test_a_real_cluster_keeps_the_promises(promise: Callable[[Ground], None], ground: Ground) -> None:
    promise(ground)


def test_what_the_surroundings_name_is_not_used(
    cluster: JobCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert RayJobs(f"{cluster.address}/").all() is not None
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"
    assert "RAY_AUTH_MODE" not in os.environ
    with pytest.raises(EnvironmentFault, match="no Ray cluster can be reached"):
        RayJobs("http://127.0.0.1:9")
    (tmp_path / "token").write_text("0" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(EnvironmentFault, match="does not accept the token"):
        RayJobs(cluster.address)


def make_run_file(folder: Path, base: Path) -> Path:
    """Write a run file whose paths are on a volume that all nodes share."""
    path = write_run(folder, base, num_epochs=EPOCHS)
    return change_run(
        path,
        output_dir=str(folder / "model"),
        witness=str(folder / "witness"),
        datasets=[{"path": str(folder / "people.jsonl")}],
        sisa__partition_key_file=str(folder / "shared.key"),
    )


def test_a_cluster_without_tokens_is_taken_when_the_user_says_so(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the client, and by the job inside."""
    run_file = change_run(make_run_file(tmp_path / "there", tiny_base), num_epochs=1)
    with job_cluster(tmp_path / "cache", wants_token=False) as without:
        command = ["cluster", "submit", str(run_file), "--address", without.address, "--json"]
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
        assert run(command) == 6
        error = json.loads(capsys.readouterr().out)["error"]
        assert error["message"] == "there is no token to send"
        assert "RAY_AUTH_MODE=disabled" in error["next_step"]
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
        assert run(command) == 0, capsys.readouterr().err
        assert json.loads(capsys.readouterr().out)["state"] == "SUCCEEDED"


def num_stored(model: Path) -> int:
    return len(list(model.glob("checkpoints/*/manifest.json")))


def interrupt_when(ready: Callable[[], bool], over: threading.Event) -> threading.Thread:
    """Send Ctrl-C as soon as a condition holds."""

    def watch() -> None:
        while not over.wait(0.05):
            if ready():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_lost_driver_costs_nothing_but_its_slice(
    cluster: JobCluster, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    submit = ["cluster", "submit", str(make_run_file(there, tiny_base)), "--address", cluster.address]

    def done(arguments: list[str], code: int) -> tuple[Any, str]:
        assert run([*arguments, "--json"]) == code, capsys.readouterr().err
        output = capsys.readouterr()
        return json.loads(output.out), output.err

    over = threading.Event()
    thread = interrupt_when(lambda: num_stored(there / "model") > 0, over)
    try:
        detached, _ = done([*submit, "--job", "first"], 130)
    finally:
        over.set()
        thread.join()
    assert detached == {"job": "first", "detached": True}
    assert done(["cluster", "status", "first", "--address", cluster.address], 0)[0]["state"] == "RUNNING"
    assert done([*submit, "--job", "second"], 5)[0]["error"]["where"] == "first"

    (driver,) = cluster.drivers()
    assert "working_dir_files" in driver.cwd()  # what was sent, not this source tree
    assert tuple(driver.cmdline()[1:]) == COMMAND[1:]
    driver.kill()
    lost, log = done(["cluster", "logs", "first", "--follow", "--address", cluster.address], 6)
    assert (lost["state"], lost["exit_code"]) == ("FAILED", -signal.SIGKILL)
    assert "Running entrypoint for job first" in log  # re-attached: from its beginning
    stored = num_stored(there / "model")
    assert 0 < stored < NUM_STAGES

    ended, log = done([*submit, "--job", "third"], 0)
    assert (ended["state"], ended["exit_code"]) == ("SUCCEEDED", 0)
    trained = re.search(r"^(\d+) slices? trained", log, re.M)
    assert trained is not None
    assert 0 < int(trained[1]) <= NUM_STAGES - stored
    assert not [each for each in (*ids_of(PEOPLE), KEY) if each in log]
    train_scratch(tmp_path / "here", tiny_base, PEOPLE, num_epochs=EPOCHS)
    assert held_files(there / "model") == held_files(tmp_path / "here" / "model")
