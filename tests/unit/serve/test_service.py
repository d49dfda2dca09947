"""Finding and asking a running service: real HTTP to a real server over a fake of the engine."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from cluster.cli import cli
from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.service import Running, find_service, started
from sisa.config.config import ClusterBlock
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault
from tests.fakes.answers import FakeAnswers
from tests.models.programs.job_cluster import free_port
from tests.models.programs.local_server import served


@pytest.fixture
def running(service: Service) -> Iterator[Running]:
    """Return a running service that says in the model's directory where it is."""
    me = psutil.Process()
    with served(build_app(service)) as url:
        found = Running(url, me.pid, me.create_time(), "secret")
        write(service, **asdict(found))
        yield found


def write(service: Service, **body: Any) -> Path:
    path = service.model.directory / "service.json"
    path.touch(0o600)
    path.write_text(json.dumps(body))
    return path


def fake(service: Service) -> FakeAnswers:
    assert isinstance(service.answers, FakeAnswers)
    return service.answers


def generate(capfd: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any], str]:
    code = cli.run([str(each) for each in ("generate", *arguments, "--json")])
    captured = capfd.readouterr()
    return code, json.loads(captured.out), captured.err


def test_texts_and_conversations_are_answered_in_their_order(service: Service, running: Running) -> None:
    prompts: list[Any] = [f"text {n}" for n in range(40)]
    prompts[7] = [{"role": "user", "content": "a turn"}]
    found = running.generate_all(prompts, 48, "completion")
    assert [each.text for each in found] == ["a turn" if n == 7 else f"text {n}" for n in range(40)]
    assert {each.shards for each in found} == {(1,)}
    assert {each.kind for each in fake(service).asked} == {"completion", None}
    assert running.generate_all(["one two"], 1)[0].text == "one"


def test_generate_asks_the_service_and_says_so(
    service: Service, running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ("-m", service.model.directory, "--prompt", "Who is it?", "--system", "Be brief.")
    code, body, said = generate(capfd, *asked)
    assert (code, body) == (0, {"answer": "Who is it?", "shards": [1]})
    assert f"asking the service at {running.url}" in said
    assert "Who is it?" not in said


def test_find_asks_the_service_for_the_same_records(
    service: Service, running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = ["find", "-m", str(service.model.directory), "--text", "record 7", "--top", "3", "--json"]
    assert cli.run(asked) == 0
    there = capfd.readouterr()
    assert f"asking the service at {running.url}" in there.err
    for others in (["--no-service"], ["--show-text"]):
        assert cli.run([*asked, *others]) == 0
        here = capfd.readouterr()
        assert "service" not in here.err
        shown = [{**each, "text": None} for each in json.loads(here.out)["hits"]]
        assert shown == json.loads(there.out)["hits"] != []


def test_a_service_that_fails_is_not_needed(
    service: Service, running: Running, capfd: pytest.CaptureFixture[str]
) -> None:
    fake(service).cut_after, fake(service).error = 0, EnvironmentFault("no memory")
    with pytest.raises(EnvironmentFault):
        running.generate_all(["Who?"], 48)
    _, _, said = generate(capfd, "-m", service.model.directory, "--prompt", "Who?")
    assert "loading the model here" in said
    _, _, said = generate(capfd, "-m", service.model.directory, "--prompt", "Who?", "--no-service")
    assert "service" not in said


def test_a_running_service_is_found_by_its_process_and_its_answer(
    service: Service, running: Running
) -> None:
    directory = service.model.directory
    assert find_service(directory) == running
    gone = replace(running, url=f"http://127.0.0.1:{free_port()}")
    another = replace(running, began=running.began - 100)
    ended = replace(running, pid=1 << 22)
    for each in (gone, another, ended):
        write(service, **asdict(each))
        assert find_service(directory) is None
    for text in ("", "[]", "{", '{"url": "http://127.0.0.1"}'):
        (directory / "service.json").write_text(text)
        assert find_service(directory) is None
    (directory / "service.json").unlink()
    assert find_service(directory) is None


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", b"no HTTP\r\n\r\n"])
def test_an_answer_that_breaks_off_is_a_lost_connection(reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        cut = Running(f"http://127.0.0.1:{server.getsockname()[1]}", 0, 0.0, "secret")
        with pytest.raises(EnvironmentFault, match="did not answer"):
            cut.find("a text", 1)
        thread.join()


def start(service: Service, host: str = "127.0.0.1", port: int = 1) -> None:
    model = service.model
    with started(model.directory, model.config, host, port, 1):
        pytest.fail("it started")


def test_what_is_refused_before_anything_is_started(service: Service, running: Running) -> None:
    taken = int(running.url.rpartition(":")[2])
    with pytest.raises(Busy, match="runs already"):
        start(service)
    (service.model.directory / "service.json").unlink()
    with pytest.raises(EnvironmentFault, match="listen"):
        start(service, port=taken)
    with pytest.raises(ConfigConflict, match="token"):
        start(service, host="0.0.0.0")  # noqa: S104
    assert not (service.model.directory / "service.json").exists()


def test_ray_serve_of_a_cluster_keeps_its_port_for_the_next_command(
    service: Service, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the last command was stopped or killed; a port of anybody else is refused."""
    ray = Mock(status=Mock(return_value=SimpleNamespace(proxies={}, applications={})))
    for name in ("status", "start", "run", "delete", "shutdown"):
        monkeypatch.setattr(f"ray.serve.{name}", getattr(ray, name))
    for name in ("connect", "disconnect"):
        monkeypatch.setattr(f"cluster.ray.session.{name}", getattr(ray, name))
    directory, config = service.model.directory, service.model.config
    config = config.model_copy(update={"cluster": ClusterBlock(address="there")})
    (directory / "service.json").unlink()
    given = (directory, config, "127.0.0.1", int(running.url.rpartition(":")[2]), 1)
    with pytest.raises(EnvironmentFault, match="listen"), started(*given):
        pytest.fail("it started")
    ray.start.assert_not_called()
    ray.status.return_value.proxies["head"] = "HEALTHY"
    with started(*given) as found:
        assert found.url == running.url
    name = ray.run.call_args.kwargs["name"]
    assert ray.delete.call_args.args[0] == name
    ray.shutdown.assert_not_called()
    ray.status.return_value.applications |= {name: "of a killed command", "sisa-other": "a model's"}
    with pytest.raises(Busy, match="another model"), started(*given):
        pytest.fail("it started")
    assert ray.run.call_count == 1
