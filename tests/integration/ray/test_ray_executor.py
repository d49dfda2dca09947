"""The Ray executor against the serial one, with a scripted trainer (`scripted.py`) instead of LoRA."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayError

from cluster.ray import session as ray_session
from cluster.ray.executor import RayExecutor, open_executor
from cluster.ray.session import Listener, Mailbox
from sisa.config.runfile import parse_run_file
from sisa.core.domain import BaseFiles, Chain
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput, SisaError
from sisa.core.events import Event, Notice, SliceProgress, SliceStarted, SliceTrained, silent
from sisa.flows.chains import Site
from sisa.lm.base.numerics import fingerprint
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import FileRecords
from tests.fakes.keyring import PLAIN
from tests.models.programs.clusters import num_alive, present_session
from tests.models.scripted import (
    NUM_SHARDS,
    NUM_SLICES,
    SECRET_TEXT,
    begun,
    bytes_of,
    make_chain,
    make_chains,
    make_site,
    open_scripted,
    script_of,
    scripted_proof,
    serial_bytes,
    trained_places,
)
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


@pytest.fixture
def chains(site: Site) -> list[Chain]:
    return make_chains(site)


def executor(site: Site, num_workers: int = 2, max_retries: int = 3) -> RayExecutor:
    return RayExecutor(site, None, num_workers, max_retries, open_scripted)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_same_bytes_as_serial(site: Site, chains: list[Chain], num_workers: int) -> None:
    expected = serial_bytes(site, chains)
    events: list[Event] = []
    executor(site, num_workers).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    trained = [event.job.key for event in events if isinstance(event, SliceTrained)]
    assert sorted(trained) == sorted(job.key for chain in chains for job in chain.jobs)


def test_one_worker_trains_the_longest_chain_first(site: Site, chains: list[Chain]) -> None:
    executor(site, num_workers=1).run(chains, silent)
    assert [place[0] for place in trained_places(site)] == ["2"] * 3 + ["1"] * 3 + ["0"] * 3


def test_a_killed_worker_costs_its_slice(site: Site, chains: list[Chain]) -> None:
    expected = serial_bytes(site, chains)
    (site.base.directory / "kill-1.1").touch()
    events: list[Event] = []
    executor(site).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    places = trained_places(site)
    assert places.count("1.1") == 2
    assert len(places) == NUM_SHARDS * NUM_SLICES + 1
    assert len([event for event in events if isinstance(event, SliceTrained)]) == 9
    assert ["shard 1" in event.text for event in events if isinstance(event, Notice)] == [True]


def test_a_worker_that_always_dies_is_given_up(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "kill-1.1").touch()
    (site.base.directory / "kill-always").touch()
    with pytest.raises(EnvironmentFault) as caught:
        executor(site, max_retries=1).run(chains, silent)
    assert caught.value.where == "shard 1"
    assert trained_places(site).count("1.1") == 2
    (site.base.directory / "kill-1.1").unlink()
    executor(site).run(chains, silent)
    assert bytes_of(site.checkpoints_at) == serial_bytes(site, chains)


def test_deaths_with_a_finished_slice_between_them_are_not_counted_together(
    site: Site, chains: list[Chain]
) -> None:
    script = site.base.directory
    (script / "kill-1.0").touch()
    for place in ("1.1", "1.2"):
        (script / f"wait-{place}").touch()

    def report(event: Event) -> None:
        if isinstance(event, SliceTrained) and event.job.shard == 1 and event.job.slice < 2:
            (
                script / f"kill-1.{event.job.slice + 1}"
            ).touch()  # its event arrived, so the next one may die
            (script / f"wait-1.{event.job.slice + 1}").unlink()

    executor(site, max_retries=1).run(chains, report)
    assert [trained_places(site).count(f"1.{each}") for each in range(NUM_SLICES)] == [2, 2, 2]
    assert bytes_of(site.checkpoints_at) == serial_bytes(site, chains)


def test_a_typed_error_arrives_as_itself(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "fail-0.1").touch()
    with pytest.raises(IntegrityError) as caught:
        executor(site).run(chains, silent)
    assert type(caught.value) is IntegrityError
    assert (caught.value.where, caught.value.next_step) == ("0.1", "run verify")


def test_another_error_arrives_without_its_message(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "break-0.1").touch()
    with pytest.raises(SisaError) as caught:
        executor(site).run(chains, silent)
    assert caught.value.exit_code == 1
    assert "ValueError" in caught.value.what
    assert "in _suffer" in caught.value.where
    assert SECRET_TEXT not in str(caught.value)


def test_a_full_disk_is_the_environments_fault(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "full-0.0").touch()
    with pytest.raises(EnvironmentFault) as caught:
        executor(site).run(chains, silent)
    assert caught.value.got == "No space left on device"


def test_events_come_while_others_train(site: Site, chains: list[Chain]) -> None:
    wait = site.base.directory / "wait-2.2"
    wait.touch()
    events: list[Event] = []
    threads: set[int] = set()

    def report(event: Event) -> None:
        events.append(event)
        threads.add(threading.get_ident())
        trained = [each for each in events if isinstance(each, SliceTrained)]
        if len(trained) == 8:  # all but the waiting slice
            wait.unlink(missing_ok=True)

    executor(site).run(chains, report)
    assert threads == {threading.get_ident()}
    assert len([each for each in events if isinstance(each, SliceStarted)]) == 9
    last = [each for each in events if isinstance(each, SliceProgress) and each.tokens == 2]
    assert len(last) == 9
    seconds = [each.seconds for each in events if isinstance(each, SliceTrained)]
    assert all(second > 0 for second in seconds)


@pytest.fixture
def foreign_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a user's own `cluster.py`."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cluster.py").write_text("raise ImportError('the foreign module')\n")
    monkeypatch.chdir(tmp_path / "mine")


@pytest.mark.usefixtures("own_ray", "foreign_cluster")
def test_nothing_is_lost_with_the_mailbox(site: Site, chains: list[Chain]) -> None:
    """Workers don't search the working directory either."""
    wait = site.base.directory / "wait-2.2"
    wait.touch()
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        session = present_session()
        if session is not None and wait.exists():
            ray.kill(session.mailbox)
            wait.unlink()

    executor(site).run(chains, report)
    assert len({each.job.key for each in events if isinstance(each, SliceTrained)}) == 9
    assert len([each for each in events if isinstance(each, SliceTrained)]) == 9


def test_an_error_in_the_driver_ends_the_workers(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "wait-2.0").touch()
    (site.base.directory / "wait-1.0").touch()
    started: list[Event] = []

    def report(event: Event) -> None:
        started.append(event)
        if len([each for each in started if isinstance(each, SliceStarted)]) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        executor(site).run(chains, report)
    (site.base.directory / "wait-2.0").unlink()
    (site.base.directory / "wait-1.0").unlink()
    pids = [pid for _, pid, _ in begun(site)]
    assert len(pids) == 2
    wait_for(lambda: not any(map(psutil.pid_exists, pids)), 2)
    assert bytes_of(site.checkpoints_at) == {}


def test_workers_are_kept_between_runs(site: Site, chains: list[Chain]) -> None:
    executor(site, num_workers=1).run(chains[:1], silent)
    session = present_session()
    time.sleep(1.5)  # Ray reaps idle workers after a second when it has too many
    executor(site, num_workers=1).run(chains[1:], silent)
    assert present_session() is session
    assert len({pid for _, pid, _ in begun(site)}) == 1


@pytest.mark.usefixtures("own_ray")
def test_no_text_in_rays_directory_and_no_directory_at_the_end(site: Site, chains: list[Chain]) -> None:
    (site.base.directory / "break-0.2").touch()
    with pytest.raises(SisaError):
        executor(site).run(chains, silent)
    session = present_session()
    assert session is not None
    assert session.private_dir is not None
    assert session.private_dir.stat().st_mode & 0o777 == 0o700
    logs = bytes_of(session.private_dir)
    assert logs
    assert not any(b"Quillfeather" in data or b"secret-0" in data for data in logs.values())
    ray_session.disconnect()
    assert not session.private_dir.exists()
    assert not ray.is_initialized()


@pytest.mark.usefixtures("own_ray")
def test_no_node_of_other_numerics_or_too_few_cpus_trains(
    site: Site, chains: list[Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the driver's own node: its Ray was started with settings that the driver lacks."""
    with monkeypatch.context() as patch:
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        other = replace(site, environment=(("ATEN_CPU_CAPABILITY", "default"),))
        for at, given in ((site, "MKL_CBWR=COMPATIBLE"), (other, "ATEN_CPU_CAPABILITY=default, MKL_")):
            with pytest.raises(EnvironmentFault, match="would train other bits") as caught:
                executor(at).run(chains, silent)
            assert caught.value.expected == f"fingerprint {fingerprint(1)}"
            assert f"with {given}" in caught.value.got
        assert begun(site) == []
        monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")  # what the driver has, jobs are made under
        executor(site).run(make_chains(site), silent)
        with pytest.raises(EnvironmentFault) as caught:
            executor(replace(site, threads=2)).run(make_chains(site), silent)
        assert caught.value.expected.startswith("2 CPUs")
        ray_session.disconnect()
        assert ray.is_initialized()  # it is the caller's
    finally:
        ray.shutdown()


@pytest.mark.usefixtures("own_ray")
def test_an_unreachable_address(site: Site, chains: list[Chain]) -> None:
    for address in ("127.0.0.1:9", "nowhere"):
        with pytest.raises(EnvironmentFault) as caught:
            RayExecutor(site, address, 1, 0, open_scripted).run(chains, silent)
        assert caught.value.where == address
        assert caught.value.next_step


NAMED_ID = "SECRET-alice@example.org"


def look_for_the_id(event: Event) -> None:
    """Look for the id of the driver's command line in what Ray keeps of the driver."""
    session = present_session()
    if isinstance(event, SliceTrained) and session is not None and session.private_dir is not None:
        jobs = repr(ray._private.state.jobs())
        assert "'Entrypoint': 'sisa'" in jobs, jobs
        assert NAMED_ID not in jobs
        kept = bytes_of(session.private_dir)
        assert not [name for name, data in kept.items() if NAMED_ID.encode() in data]


def test_a_process_prints_nothing_and_leaves_nothing(tmp_path: Path, scratch: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.integration.ray import test_ray_executor as t;"
        "site = t.make_site(Path(sys.argv[1]) / 'm');"
        "t.executor(site, 1).run(t.make_chains(site), t.look_for_the_id)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path), NAMED_ID],
        capture_output=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(scratch)},
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()
    assert done.stderr == b""
    assert len(bytes_of(tmp_path / "m" / "checkpoints")) == 27
    assert list(scratch.iterdir()) == []


def test_a_worker_that_outlives_its_driver_stores_nothing_after_the_next_sweep(
    tmp_path: Path, scratch: Path
) -> None:
    """Stop every process but the worker, as a cut network would, when the driver dies."""
    site = make_site(tmp_path / "m")
    checkpoints, first = FileCheckpoints(site.checkpoints_at, PLAIN), make_chains(site)[2].jobs[0].key
    (script_of(site) / "wait-2.1").touch()
    program = (
        "import sys; from pathlib import Path; from tests.integration.ray import test_ray_executor as t;"
        "site = t.make_site(Path(sys.argv[1]));"
        "t.executor(site, 1).run(t.make_chains(site), t.silent)"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "m")],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    started: list[psutil.Process] = []
    try:
        wait_for(lambda: "2.1" in trained_places(site), 120)
        wait_for(lambda: first in checkpoints.held(), 30)
        pid = begun(site)[-1][1]
        started = psutil.Process(driver.pid).children(recursive=True)
        for each in started:
            if each.pid != pid:
                each.suspend()
        driver.kill()
        driver.wait()
        checkpoints.erase(checkpoints.held())  # as the next command does before a deletion returns
        (script_of(site) / "wait-2.1").unlink()
        idle = psutil.Process(pid)
        wait_for(lambda: not idle.is_running() or idle.name() == "ray::IDLE", 30)
        assert bytes_of(site.checkpoints_at) == {}
    finally:
        driver.kill()
        driver.wait()
        for each in started:
            with contextlib.suppress(psutil.Error):
                each.kill()


@pytest.fixture
def two_nodes(tmp_path: Path, scratch: Path) -> Iterator[str]:
    """Start a head without CPUs and a node with one as an operator would; yield the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    head = ["--head", f"--port={address.rpartition(':')[2]}", "--num-cpus=0", f"--temp-dir={scratch}"]
    node = [f"--address={address}", "--num-cpus=1", "--node-ip-address=127.0.0.2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "SISA_CACHE": str(tmp_path / "cache"),
    }
    ray_command = str(Path(sys.executable).with_name("ray"))
    make_token = [ray_command, "get-auth-token", "--generate"]  # keeps one that is there
    subprocess.run(make_token, env=environment, check=True, capture_output=True)
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for arguments in ([*head, "--include-dashboard=false"], node):
            command = [ray_command, "start", "--block", *arguments]
            quiet = subprocess.DEVNULL
            nodes.append(subprocess.Popen(command, cwd="/", env=environment, stdout=quiet, stderr=quiet))
            wait_for(lambda: listens(address), 30)
        yield address
    finally:
        ray_session.disconnect()
        for process in reversed(nodes):
            process.terminate()
            process.wait(30)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@pytest.mark.usefixtures("own_ray")
def test_the_base_is_carried_to_a_node_that_lacks_it(
    site: Site, two_nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = FileRecords(site.records_at, PLAIN)
    chains = [make_chain(records, shard) for shard in range(NUM_SHARDS)]
    expected = serial_bytes(site, chains)
    (site.base.directory / "model.safetensors").write_bytes(b"w" * 5000)
    monkeypatch.chdir(site.base.directory)
    here = replace(
        site, base=BaseFiles(Path("/proc/self/cwd"), site.base.digest)
    )  # a directory that only this process has
    ray_session.connect(two_nodes, 1)
    wait_for(lambda: num_alive() == 2, 30)
    events: list[Event] = []
    RayExecutor(here, two_nodes, 1, 0, open_scripted, prove=scripted_proof).run(chains, events.append)
    assert bytes_of(site.checkpoints_at) == expected
    assert bytes_of(tmp_path / "cache" / "base" / "b1")["model.safetensors"] == b"w" * 5000
    assert len([event for event in events if isinstance(event, Notice)]) == 1


def test_an_answer_that_is_late_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox, dead = Mailbox(), "dead"
    mailbox.put("a", Notice("1"))
    late = [True, False, False]

    remote = SimpleNamespace(take=SimpleNamespace(remote=mailbox.take))  # its answer is what it has

    def got(answer: Any) -> Any:
        if answer == dead:
            raise RayError
        return answer

    def waited(asked: list[Any], **_: float) -> tuple[list[Any], list[Any]]:
        return ([], asked) if late.pop(0) else (asked, [])

    monkeypatch.setattr("ray.wait", waited)
    monkeypatch.setattr("ray.get", got)
    listener = Listener(remote, "a")
    assert listener.received(0) == []
    assert listener.received(0) == [Notice("1")]
    remote.take.remote = lambda _: dead
    assert listener.received(0) == []


def test_the_mailbox_keeps_runs_apart() -> None:
    mailbox = Mailbox()
    mailbox.put("a", Notice("1"))
    mailbox.put("b", Notice("2"))
    mailbox.put("a", Notice("3"))
    assert mailbox.take("a") == [Notice("1"), Notice("3")]
    assert mailbox.take("a") == []
    assert mailbox.take("b") == [Notice("2")]


def test_options_of_the_run_file(site: Site) -> None:
    with pytest.raises(InvalidInput, match="Ray Client") as caught:
        open_executor(site, {"address": "ray://h:1", "max_retries": 3})
    assert caught.value.where == "cluster.address"
    config = parse_run_file("{datasets: [{path: a/b}], output_dir: m}", "run.yaml")
    open_executor(site, config.cluster.model_dump())
