"""Submitting, following and stopping jobs: the flows and the commands, over a cluster in memory."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.cli import jobs as job_commands
from cluster.jobs import job_flow
from cluster.jobs.job_flow import LOST_S, follow
from cluster.jobs.jobs import Job, Submission, check_name, model_digest
from sisa.core.errors import EnvironmentFault, InvalidInput
from tests.fakes.jobs import FakeJobs, Play
from tests.unit.commands import Ask, Sisa

ADDRESS = ("--address", "http://127.0.0.1:8265")
LAST_WORD = "auto"  # of the command that trains
RUN_FILE = (
    "datasets: [{path: /shared/people.jsonl}]\n"
    "output_dir: /shared/model\nwitness: /shared/witness\nsisa: {embedder: hashing}\n"
)


@pytest.fixture
def play() -> Play:
    return Play()


@pytest.fixture
def jobs(play: Play, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeJobs:
    fake = FakeJobs({LAST_WORD: play})
    monkeypatch.setattr(job_commands, "_open_jobs", lambda _address: fake)
    monkeypatch.setattr(job_flow, "AGAIN_S", 0.0)
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def cluster(ask: Ask) -> Ask:
    """Run a command of `sisa cluster`; return its JSON."""
    return lambda *arguments, code=0: ask("cluster", *arguments, *ADDRESS, code=code)


@pytest.mark.usefixtures("jobs")
def test_a_job_is_followed_to_its_end(play: Play, sisa: Sisa) -> None:
    play.pieces = ["slices 1/6\n", "slices \x1b[31m2/6\n"]
    _, out, err = sisa("cluster", "submit", "run.yaml", *ADDRESS, "--job", "a", "--json")
    found = json.loads(out)
    assert (found["job"], found["state"], found["exit_code"]) == ("a", "SUCCEEDED", 0)
    assert err == "job a submitted\nslices 1/6\nslices [31m2/6\n"


def test_what_is_sent_is_the_code_and_the_run_file_alone(
    jobs: FakeJobs, cluster: Ask, tmp_path: Path
) -> None:
    (tmp_path / "people.jsonl").write_text('{"id": "p1", "text": "Ada Quillfeather"}\n')
    (tmp_path / "partition.key").write_text("0" * 64)
    cluster("submit", "run.yaml", "--job", "a", "--reconfigure")
    sent = jobs.sent["a"]
    tops = {name.partition("/")[0] for name in sent}
    assert tops == {"sisa", "approx", "cluster", "run.yaml"}
    assert sent["run.yaml"].decode() == RUN_FILE
    assert {Path(name).suffix for name in sent if "/" in name} == {".py", ".yaml"}
    for name in ("sisa/lm/train/trainer.py", "approx/methods/preference/npo.py", "sisa/__main__.py"):
        assert sent[name] == (Path(__file__).parents[3] / name).read_bytes()
    assert jobs.words["a"] == (
        *("python", "-m", "sisa", "train", "run.yaml", "--address", "auto"),
        "--reconfigure",
    )
    assert jobs.get("a").metadata == {"sisa_model": model_digest(Path("/shared/model"))}


def test_the_package_finds_its_own_parts(jobs: FakeJobs, cluster: Ask, tmp_path: Path) -> None:
    cluster("submit", "run.yaml", "--job", "a")
    folder = tmp_path / "there"
    for name, data in jobs.sent["a"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    code = (
        "from sisa.flows.wiring.upper_houses import COMMAND, load; load(COMMAND);"
        "import cluster, sisa; print(cluster.__file__); print(sisa.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        str(folder / name / "__init__.py") for name in ("cluster", "sisa")
    ]


@pytest.mark.usefixtures("jobs")
@pytest.mark.parametrize(
    ("ends", "code", "message"),
    [
        (Play(exit_code=5), 5, "exit code 5"),
        (Play(exit_code=-9), 6, "ended by signal 9: submit the run file again"),
        (Play(exit_code=None, fault="JOB_SUPERVISOR_ACTOR_DIED"), 6, "(JOB_SUPERVISOR_ACTOR_DIED)"),
    ],
)
def test_following_ends_as_the_job_does(
    play: Play, ends: Play, code: int, message: str, sisa: Sisa
) -> None:
    play.exit_code, play.fault = ends.exit_code, ends.fault
    done, out, _ = sisa("cluster", "submit", "run.yaml", *ADDRESS, "--job", "a")
    assert (done, message in out) == (code, True)
    assert sisa("cluster", "logs", "a", "--follow", *ADDRESS)[0] == code
    assert sisa("cluster", "logs", "a", *ADDRESS)[0] == 0


def test_an_interruption_detaches(jobs: FakeJobs, play: Play, sisa: Sisa) -> None:
    play.pieces = ["first\n", KeyboardInterrupt(), "second\n"]
    code, out, _ = sisa("cluster", "submit", "run.yaml", *ADDRESS, "--job", "a")
    assert code == 130
    assert "detached from job a, which continues" in out
    assert "sisa cluster logs a --follow --address http://127.0.0.1:8265" in out
    assert jobs.get("a").state == "RUNNING"
    code, _, err = sisa("cluster", "logs", "a", "--follow", *ADDRESS)
    assert (code, err) == (0, "first\nsecond\n")


def test_detached_then_listed_then_stopped(jobs: FakeJobs, play: Play, cluster: Ask) -> None:
    play.endless = True
    submitted = cluster("submit", "run.yaml", "--detach")
    assert submitted["detached"]
    name = submitted["job"]
    assert name.startswith("sisa-")
    jobs.submit(Submission("foreign", Path(), ("true",)))  # not one of this program
    listed = cluster("status")["jobs"]
    assert [(each["job"], each["state"]) for each in listed] == [(name, "RUNNING")]
    stopped = cluster("stop", name)
    assert (stopped["state"], stopped["was_running"]) == ("STOPPED", True)
    cluster("logs", name, "--follow", code=130)
    assert cluster("status", name)["state"] == "STOPPED"


def test_a_model_in_training_is_not_submitted_again(
    jobs: FakeJobs, play: Play, cluster: Ask, tmp_path: Path
) -> None:
    play.endless = True
    cluster("submit", "run.yaml", "--detach", "--job", "a")
    error = cluster("submit", "run.yaml", "--detach", "--job", "b", code=5)["error"]
    assert (error["type"], error["where"]) == ("Busy", "a")
    (tmp_path / "other.yaml").write_text(RUN_FILE.replace("/shared/model", "/shared/other"))
    cluster("submit", "other.yaml", "--detach", "--job", "b")
    jobs.stop("a")
    cluster("submit", "run.yaml", "--detach", "--job", "c")


def test_paths_of_this_machine_are_refused_before_anything_is_sent(
    jobs: FakeJobs, cluster: Ask, tmp_path: Path
) -> None:
    (tmp_path / "people").mkdir()
    (tmp_path / "run.yaml").write_text(
        "datasets: [{path: people}, {path: ./more.jsonl}, {path: owner/name}]\n"
        "output_dir: model\nencrypt: true\nbase_model: ~/base\n"
        "lora_rank: 3\nsisa: {partition_key_file: a.key, embedder: /shared/minilm}\n"
    )
    error = cluster("submit", "run.yaml", code=2)["error"]
    found = {each["where"]: each["what"] for each in error["problems"]}
    assert set(found) == {
        *("line 1: datasets[0].path", "line 1: datasets[1].path", "line 2: output_dir"),
        *("line 4: base_model", "line 5: lora_rank", "line 6: sisa.partition_key_file"),
        *("line 1: witness", "line 1: keyring"),
    }
    assert "a hub name there" in found["line 1: datasets[0].path"]
    assert jobs.all() == []


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/../b", "a" * 101, "ä"])
def test_bad_names_of_jobs(name: str) -> None:
    with pytest.raises(InvalidInput):
        check_name(name)


def lost() -> EnvironmentFault:
    return EnvironmentFault("no Ray cluster can be reached")


class Ticking:
    """A clock that only waiting advances, in place of the module `time`."""

    passed = 0.0

    def monotonic(self) -> float:
        return self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += max(seconds, 1.0)


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_flow, "time", Ticking())


def followed(play: Play) -> tuple[Job, str]:
    jobs = FakeJobs({"w": play})
    jobs.submit(Submission("a", Path("/nowhere"), ("w",)))
    shown: list[str] = []
    return follow(jobs, "a", shown.append), "".join(shown)


@pytest.mark.usefixtures("_ticking")
def test_a_lost_connection_is_taken_up_and_nothing_is_shown_twice() -> None:
    job, shown = followed(Play(pieces=["one ", "two ", lost(), "three ", lost(), lost(), "four"]))
    assert job.state == "SUCCEEDED"
    assert shown == "one two three four"


@pytest.mark.usefixtures("_ticking")
def test_a_cluster_that_stays_away_is_given_up() -> None:
    away: list[str | BaseException] = [lost() for _ in range(int(LOST_S) + 3)]
    with pytest.raises(EnvironmentFault, match="no Ray cluster"):
        followed(Play(pieces=away))


@pytest.mark.usefixtures("_ticking")
def test_a_job_that_does_not_stop_is_reported(
    jobs: FakeJobs, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play.endless = True
    jobs.submit(Submission("a", Path("/nowhere"), (LAST_WORD,)))
    monkeypatch.setattr(jobs, "stop", lambda _job: True)
    with pytest.raises(EnvironmentFault, match="has not ended"):
        job_flow.stop(jobs, "a")


def test_an_address_is_needed(sisa: Sisa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    code, _, err = sisa("cluster", "status")
    assert (code, "--address" in err) == (2, True)


def readme_commands() -> list[list[str]]:
    readme = (Path(__file__).parents[3] / "cluster" / "README.md").read_text(encoding="utf-8")
    lines = [line for line in readme.splitlines() if line.startswith("sisa cluster ")]
    return [shlex.split(line)[2:] for line in lines]


@pytest.mark.parametrize("line", readme_commands(), ids=" ".join)
def test_the_commands_of_the_readme_are_known(line: list[str]) -> None:
    command = job_commands.group.commands[line[0]]
    assert command.make_context(line[0], list(line[1:])).params


class Interrupted:
    """A job's log that is interrupted by Ctrl-C while it is read."""

    async def __anext__(self) -> str:
        raise KeyboardInterrupt

    async def aclose(self) -> None:
        raise RuntimeError("aclose(): asynchronous generator is already running")


def test_ctrl_c_while_a_log_is_awaited_is_no_fault_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cluster.jobs.ray_jobs import RayJobs

    jobs = RayJobs.__new__(RayJobs)  # no cluster is asked
    monkeypatch.setattr(jobs, "get", lambda _job: None)
    client = SimpleNamespace(tail_job_logs=lambda _job: Interrupted())
    monkeypatch.setattr(jobs, "_client", client, raising=False)
    monkeypatch.setattr(jobs, "_address", "http://127.0.0.1:1", raising=False)
    with pytest.raises(KeyboardInterrupt):
        next(jobs.follow("first"))
