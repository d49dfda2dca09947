"""A real service: `sisa serve` with two replicas on Ray Serve, and real clients of OpenAI's API.

The model is tiny and real. Deletions run beside clients that ask without a pause: what is asked after a
commit never gets an answer of a model that the deletion tainted, and nobody is dropped, though a replica
is killed.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.cli import cli
from cluster.serve.service import Running, find_service
from sisa.flows.wiring.upper_houses import SERVICE, SERVICE_STATE
from sisa.model import open_model
from sisa.store.areas import RECORDS
from sisa.train import train_model
from tests.endurance.service import REPLICA, Service, Soak, train
from tests.fakes.tokens import certified
from tests.models.programs.job_cluster import free_port
from tests.models.tiny_model import PEOPLE, change_run, train_scratch
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_ray")]

STOP_S = 60.0
SHARDS, TOKENS = 3, 6
Ask = Callable[..., tuple[int, dict[str, Any], str]]
SHOWN: Any = {"max_tokens": TOKENS, "temperature": 0}


@dataclass
class Served:
    """A model and the command that serves it."""

    directory: Path
    process: subprocess.Popen[bytes]
    running: Running

    @property
    def url(self) -> str:
        return f"{self.running.url}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        """Return OpenAI's client, with the token of the directory's owner."""
        return openai.OpenAI(base_url=self.url, api_key=self.running.token, max_retries=0, **options)

    def session(self) -> Path:
        """Return the directory of its Ray's session."""
        started = " ".join(
            part
            for each in psutil.Process(self.process.pid).children(recursive=True)
            for part in each.cmdline()
        )
        (found,) = set(re.findall(r"/\S*/r/session_[0-9]\S*?(?=/)", started))
        return Path(found)


@contextlib.contextmanager
def serving(folder: Path, num_replicas: int) -> Iterator[Served]:
    """Serve the model in a folder; what the command says goes to `out` and `err` beside it."""
    directory = folder / "model"
    command = [sys.executable, "-m", "sisa", "serve", "-m", directory, "--json"]
    command += ["--replicas", num_replicas, "--port", free_port()]
    out, err = folder / "out", folder / "err"
    with (
        out.open("w") as out_file,
        err.open("w") as err_file,
        subprocess.Popen([*map(str, command)], stdout=out_file, stderr=err_file) as process,
    ):
        while "serving http" not in err.read_text():
            assert process.poll() is None, err.read_text() + out.read_text()
            time.sleep(0.1)
        running = find_service(directory)
        assert running is not None
        try:
            yield Served(directory, process, running)
            assert cli.run(["serve", "-m", str(directory), "--stop"]) == 0
            assert process.wait(timeout=STOP_S) == 0, err.read_text()
            assert " INFO " not in err.read_text()  # Ray's own words
            said = {"url": running.url, "pid": process.pid, "replicas": num_replicas}
            assert json.loads(out.read_text()) == said
            assert not (directory / SERVICE).exists()
            assert cli.run(["serve", "-m", str(directory), "--stop"]) == 0
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model that the tests of this file share; the last one stops it."""
    folder = tmp_path_factory.mktemp("served")
    train(folder, tiny_base, PEOPLE, SHARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "1")  # which no replica takes on
        with serving(folder, 2) as served:
            yield served


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Ask:
    """Run a command; return its exit code, its JSON and what it said on standard error."""

    def run(*arguments: Any) -> tuple[int, dict[str, Any], str]:
        code = cli.run([*map(str, arguments), "--json"])
        captured = capfd.readouterr()
        return code, json.loads(captured.out), captured.err

    return run


def prompt_of(row: Any) -> str:
    return str(row["prompt"])


def test_openais_client(served: Served) -> None:
    client = served.client()
    assert [each.id for each in client.models.list()] == ["model", "base"]
    asked: Any = [{"role": "user", "content": prompt_of(PEOPLE[0])}]
    whole = client.chat.completions.create(
        model="model", messages=asked, logprobs=True, top_logprobs=2, **SHOWN
    )
    (choice,) = whole.choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.content or []) == whole.usage.completion_tokens
    routed = open_model(served.directory).routes([asked])[0].shards
    assert tuple(choice.shards) == routed
    stream = client.chat.completions.create(
        model="model", messages=asked, stream=True, stream_options={"include_usage": True}, **SHOWN
    )
    chunks = list(stream)
    said = "".join(each.choices[0].delta.content or "" for each in chunks if each.choices)
    assert said == choice.message.content
    assert chunks[-1].usage == whole.usage
    prompts = [prompt_of(each) for each in PEOPLE[:6]]

    def drawn(seed: int) -> list[str]:
        sampled = SHOWN | {"temperature": 1, "seed": seed}
        found = client.completions.create(model="model", prompt=prompts, **sampled)
        return [each.text for each in found.choices]

    assert drawn(1) == drawn(1) != drawn(2)
    with pytest.raises(openai.BadRequestError, match="length"):  # refused by a replica
        client.completions.create(model="model", prompt="a", max_tokens=1000)


def test_lm_eval_asks_it_unchanged(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

    monkeypatch.setenv("OPENAI_API_KEY", served.running.token)
    model = LocalChatCompletion(base_url=f"{served.url}/chat/completions", model="model")
    turns: list[Any] = [[{"role": "user", "content": prompt_of(each)}] for each in PEOPLE[:2]]
    how = {"until": ["\n\n"], "max_gen_toks": TOKENS, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (model.apply_chat_template(each), dict(how)), number)
        for number, each in enumerate(turns)
    ]
    found = model.generate_until(requests, disable_tqdm=True)
    client = served.client()
    expected = [
        client.chat.completions.create(model="model", messages=each, **SHOWN).choices[0].message.content
        for each in turns
    ]
    assert found == expected


# --- what is logged --------------------------------------------------------------------------------

NOBODY, UNKNOWN = "Bepu Quagfubwick", "Quagfubwick-1"  # a person and a record that no model holds
UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}


@dataclass
class Caller:
    """Call the API with a token."""

    http: httpx2.Client
    token: str

    def __call__(self, expected: int, method: str, path: str, body: Any = None, **sent: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.token}", **sent.pop("headers", {})}
        if isinstance(body, bytes):
            sent["content"] = body
        elif body is not None:
            sent["json"] = body
        found = self.http.request(method, path, headers=headers, **sent)
        assert found.status_code == expected, found.text
        return found.json() if "json" in found.headers.get("Content-Type", "") else found.text


def written(served: Served) -> list[Path]:
    """Return what the service has written: all but the slices, which hold the records."""
    folder = served.directory.parent
    given = {folder / "people.jsonl", folder / "run.yaml"}
    there = [*folder.rglob("*"), *served.session().rglob("*")]
    slices = served.directory / RECORDS
    return [
        each for each in there if each.is_file() and each not in given and slices not in each.parents
    ]


def holding(paths: Collection[Path], strings: Collection[str]) -> list[tuple[Path, str]]:
    """Return which files hold which strings."""
    found = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            data = path.read_bytes()
            found += [(path, each) for each in strings if each.encode() in data]
    return found


@contextlib.contextmanager
def failing(served: Served, statement: str) -> Iterator[None]:
    """Have each use of an idempotency key run a statement in the service's database."""
    path = served.directory / SERVICE_STATE
    with contextlib.closing(sqlite3.connect(path)) as state:
        state.execute("PRAGMA secure_delete=ON").close()
        state.execute(f"CREATE TRIGGER fault AFTER INSERT ON used BEGIN {statement}; END")
        yield
        state.execute("DROP TRIGGER fault")


def is_refused(forged: Caller, reader: Caller, officer: Caller, ids: tuple[str, str], text: str) -> None:
    """Send what is refused, in every way that quotes a record."""
    asked = {"model": "model", "messages": [{"role": "user", "content": text}]}
    forged(401, "POST", "/v1/chat/completions", asked)
    forged(401, "GET", f"/records/{ids[0]}/shards")
    reader(403, "POST", "/requests", {"ids": ids})
    reader(422, "POST", "/v1/chat/completions", {**asked, "messages": text})
    reader(422, "POST", "/v1/chat/completions", {**asked, "tools": [text]})
    reader(404, "POST", "/v1/completions", {"model": text, "prompt": text})
    reader(404, "GET", f"/records/{UNKNOWN}/shards")
    reader(404, "GET", f"/{UNKNOWN}", params={"text": text})
    reader(403, "GET", f"/{UNKNOWN}", headers={**UPGRADE, "Sec-WebSocket-Key": "a" * 22 + "=="})
    json_type = {"Content-Type": "application/json"}
    officer(422, "POST", "/requests", f'{{"ids": ["{ids[0]}", "{text}"'.encode(), headers=json_type)
    officer(422, "POST", "/requests", {"ids": {ids[0]: text}})
    officer(404, "POST", "/requests", {"ids": [UNKNOWN]})
    officer(404, "POST", f"/requests/{UNKNOWN}/approve", {})


def test_no_token_no_id_and_no_text_is_logged(served: Served, ask: Ask) -> None:
    """Of a session that asks, is refused, meets faults of the service, and has a record deleted."""
    added = ("token", "add", "-m", served.directory)
    roles = ("reader", "officer", "operator")
    tokens = {each: str(ask(*added, each, "--role", each)[1]["token"]) for each in roles}
    tokens["nobody"] = tokens["officer"][:-8] + "Quagfubw"
    ids, row = (PEOPLE[-1]["id"], PEOPLE[-2]["id"]), PEOPLE[-1]
    text = f"{row['prompt']}{row['completion']} {NOBODY}"
    with httpx2.Client(base_url=served.running.url, timeout=STOP_S) as http:
        reader, officer, operator, forged = (Caller(http, each) for each in tokens.values())
        asked = {"model": "model", "prompt": text, "max_tokens": TOKENS}
        reader(200, "POST", "/v1/completions", asked)
        reader(200, "POST", "/find", {"text": text})
        head = {"Authorization": f"Bearer {reader.token}"}
        longer = {**asked, "max_tokens": 64, "stream": True}
        with http.stream("POST", "/v1/completions", json=longer, headers=head) as streamed:
            assert next(streamed.iter_lines()).startswith("data: ")  # and goes away
        is_refused(forged, reader, officer, ids, text)
        wanted = {"ids": ids[:1], "external_id": "T-1"}
        officer(201, "POST", "/requests", wanted, headers={"Idempotency-Key": ids[0]})
        for statement in ("DELETE FROM used", f"SELECT RAISE(ABORT, '{text}')"):
            with failing(served, statement):
                officer(500, "POST", "/requests", {"ids": ids[:1]}, headers={"Idempotency-Key": ids[1]})
        officer(200, "POST", "/rights/access", {"ids": ids})
        officer(200, "POST", "/requests/T-1/approve", {})
        operator(202, "POST", "/requests/run", {})
        wait_for(lambda: reader(200, "GET", "/requests/T-1")["state"] == "completed", STOP_S)
        assert reader(200, "GET", f"/records/{ids[0]}/shards")["state"] == "deleted"
    strings = [*tokens.values(), *ids, row["prompt"], row["completion"], "Quagfubw"]
    paths = written(served)
    assert holding(paths, strings) == []
    own = served.running.token
    assert holding(paths, [own]) == [(served.directory / SERVICE, own)]
    # All that was said is among what was read: the command's words, a replica's, and what is planted.
    (fault,) = {path for path, _ in holding(paths, ["internal fault: TypeError in state.py"])}
    assert fault.is_relative_to(served.session())
    assert holding(paths, ["serving http"]) == [(served.directory.parent / "err", "serving http")]
    planted = served.session() / "logs" / "planted.log"
    planted.write_text(f"refused {tokens['nobody']}\n")
    try:
        assert {path for path, _ in holding(written(served), strings)} == {planted}
    finally:
        planted.unlink()


def test_the_commands_ask_the_running_service(served: Served, ask: Ask, tmp_path: Path) -> None:
    rows = [{"prompt": prompt_of(PEOPLE[0])}, {"messages": [{"role": "user", "content": "Who?"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in [*rows, {"prompt": "And who else?"}]))
    asked = ("generate", "-m", served.directory, "--prompts", file, "--max-new-tokens", TOKENS)
    code, there, said = ask(*asked)
    assert (code, f"asking the service at {served.running.url}" in said) == (0, True)
    code, here, said = ask(*asked, "--no-service")
    assert (code, "asking the service" in said) == (0, False)
    assert there == here
    code, state, _ = ask("serve", "-m", served.directory, "--status")
    assert (code, state["running"], state["url"]) == (0, True, served.running.url)
    found = ask("doctor", "-m", served.directory)[1]["findings"]
    assert [each for each in found if "service" in each["where"]] == []


def answered(served: Served) -> dict[str, float]:
    """Return how many answers each replica has given so far."""
    bearer = {"Authorization": f"Bearer {served.running.token}"}
    asked = urllib.request.Request(f"{served.running.url}/metrics", headers=bearer)  # noqa: S310
    with urllib.request.urlopen(asked) as response:  # noqa: S310
        families = text_string_to_metric_families(response.read().decode())
    found: dict[str, float] = {}
    for each in (each for family in families for each in family.samples):
        if each.name == "sisa_answers_total":
            found[each.labels["replica"]] = found.get(each.labels["replica"], 0) + each.value
    return found


def test_each_replica_shows_what_all_have_answered(served: Served) -> None:
    before, client = answered(served), served.client()
    assert len(before) == 2
    for number in range(6):
        client.completions.create(model="model", prompt=prompt_of(PEOPLE[number]), **SHOWN)
    after = [answered(served) for _ in range(4)]  # whichever replica is asked
    assert all(each == after[0] for each in after)
    assert sum(after[0].values()) == sum(before.values()) + 6


def seen(client: openai.OpenAI, prompt: str) -> tuple[float, ...]:
    """Return what tells one model from another: the log-probabilities of an answer, rounded."""
    found = client.completions.create(model="model", prompt=prompt, logprobs=0, **SHOWN)
    held = found.choices[0].logprobs
    assert held is not None
    return tuple(round(each, 3) for each in held.token_logprobs or [])


def test_a_soak_with_a_killed_replica(served: Served, tiny_base: Path, tmp_path: Path) -> None:
    """Delete people beside clients, and kill a replica: a share of `tests.endurance.service`."""
    service = Service(served.directory.parent, urlsplit(served.running.url).port or 0, served.process)
    held = sorted({row["subject_id"] for row in PEOPLE[:16]})  # the other tests delete others
    soak = Soak(service, tiny_base, PEOPLE, SHARDS, held, seed=1, num_clients=6)
    soak.run(num_deletions=2, minutes=0, kill_every=2, kinds=[REPLICA])
    assert soak.lost == []
    assert soak.kills == {REPLICA: 1}
    assert soak.num_compared() > 0
    assert soak.tainted() == []
    assert soak.differences(tmp_path) == []
    wait_for(lambda: len(answered(served)) == 2, STOP_S, every_s=0.2)  # Ray Serve replaces it
    assert {each.nice() for each in service.replicas()} == {psutil.Process().nice()}
    client = served.client()
    assert len({seen(client, prompt_of(PEOPLE[0])) for _ in range(6)}) == 1


@contextlib.contextmanager
def run_file_says(served: Served, **block: Any) -> Iterator[None]:
    """Change the run file's `service` block while the model is served; change it back, and train."""
    run_file = served.directory.parent / "run.yaml"
    train_model(change_run(run_file, service=block), executor="serial")
    try:
        yield
    finally:
        train_model(change_run(run_file, service={}), executor="serial")


def test_a_deletion_ends_answers_where_the_run_file_says_so(served: Served) -> None:
    """A service follows the run file: `on_deletion: end` cuts whole answers off, too.

    Each state of the shard's head gives other probabilities, and shows itself by them. Deletions are
    repeated until a commit has met both a stream and a whole answer, which the first one nearly always
    does.
    """
    model, client = open_model(served.directory, executor="serial"), served.client()
    long: Any = {"prompt": prompt_of(PEOPLE[20]), "max_tokens": 300, "temperature": 2}
    over, asking = threading.Event(), [threading.Event() for _ in range(6)]
    errors: dict[bool, list[openai.APIError]] = {True: [], False: []}

    def ask_on(stream: bool, begun: threading.Event) -> None:
        while not over.is_set():
            try:
                found = client.completions.create(model="model", **long, stream=stream)
                for _ in found if stream else ():
                    begun.set()
            except openai.APIError as error:
                errors[stream].append(error)
            begun.set()

    with run_file_says(served, on_deletion="end"):
        clients = [
            threading.Thread(target=ask_on, args=(number % 2 == 0, each))
            for number, each in enumerate(asking)
        ]
        for each in clients:
            each.start()
        try:
            assert all(each.wait(STOP_S) for each in asking)
            assert not any(errors.values())
            for row in (PEOPLE[20], PEOPLE[18], PEOPLE[16]):
                long["prompt"] = prompt_of(row)
                tainted = seen(client, prompt_of(row))
                model.forget(subject=row["subject_id"], defer=True)
                rolled_back = {seen(client, prompt_of(row)) for _ in range(6)}
                assert len(rolled_back) == 1, "both replicas serve the same head at once"
                assert tainted not in rolled_back
                if all(errors.values()):
                    break
                train_model(served.directory.parent / "run.yaml", executor="serial")
        finally:
            over.set()
            for each in clients:
                each.join()
    assert {each.code for some in errors.values() for each in some} == {"Outdated"}
    assert all(errors.values()), "streams and whole answers were cut"
    assert {getattr(each, "status_code", None) for each in errors[False]} == {503}
    trained = {seen(client, prompt_of(row)) for _ in range(6)}
    assert len(trained) == 1
    assert trained.isdisjoint({tainted, *rolled_back})


# --- TLS -------------------------------------------------------------------------------------------


@pytest.mark.long  # a Ray of its own; the options for TLS are tested in tests/unit/serve/test_tokens.py
def test_https(tiny_base: Path, tmp_path: Path, ask: Ask) -> None:
    tls = certified(tmp_path)
    block = {"tls": {"cert": str(tls.cert), "key": str(tls.key)}}
    small = {"sisa_block": {"shards": 1, "slices": 1}, "num_epochs": 1, "service": block}
    train_scratch(tmp_path, tiny_base, PEOPLE[:4], **small)
    with serving(tmp_path, 1) as served:
        url = served.running.url
        assert url.startswith("https://127.0.0.1:")
        trusting = httpx2.Client(verify=ssl.create_default_context(cafile=str(tls.cert)))
        with served.client(http_client=trusting) as client:
            prompt = prompt_of(PEOPLE[0])
            answer = client.completions.create(model="model", prompt=prompt, **SHOWN).choices[0].text
            parts = client.completions.create(model="model", prompt=prompt, stream=True, **SHOWN)
            assert "".join(each.choices[0].text for each in parts if each.choices) == answer
        command = ("generate", "-m", served.directory, "--prompt", prompt, "--max-new-tokens", TOKENS)
        code, found, said = ask(*command)
        assert (code, f"asking the service at {url}" in said) == (0, True)
        assert found["answer"] == answer.strip()
        assert "loading the model here" not in said
        with pytest.raises(httpx2.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx2.get(f"{url}/healthz")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url.replace('https', 'http')}/healthz")
        assert ask("serve", "-m", served.directory, "--status")[1]["url"] == url
