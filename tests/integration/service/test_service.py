"""A real service: `sisa serve` with two replicas on Ray Serve, and real clients of OpenAI's API.

The model is tiny and real. A deletion runs beside clients that ask without a pause: what is asked after
its commit never gets an answer of a model that the deletion tainted, and nobody is dropped.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.cli import cli
from cluster.serve.service import Running, find_service
from sisa.model import Model, open_model
from tests.models.job_cluster import free_port
from tests.models.tiny_model import PEOPLE, train_scratch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_ray")]

STOP_S = 60.0
TOKENS = 6
Ask = Callable[..., tuple[int, dict[str, Any], str]]
SHOWN: Any = {"max_tokens": TOKENS, "temperature": 0}


@dataclass
class Served:
    """A model and the command that serves it."""

    directory: Path
    process: subprocess.Popen[str]
    running: Running

    @property
    def url(self) -> str:
        return f"{self.running.url}/v1"

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none is asked for", max_retries=0)


@pytest.fixture(scope="module")
def served(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Serve a model that the tests of this file share; the last one stops it."""
    folder = tmp_path_factory.mktemp("served")
    outside = {name: str(folder / name) for name in ("witness", "keyring")}
    train_scratch(folder, tiny_base, PEOPLE, **outside)
    directory = folder / "model"
    command = [sys.executable, "-m", "sisa", "serve", "-m", directory, "--replicas", "2", "--json"]
    with subprocess.Popen(
        [*map(str, command), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        heard = []
        for line in process.stderr:
            heard.append(line)
            if "serving http" in line:
                break
        else:
            pytest.fail("".join(heard) + process.communicate()[0])
        running = find_service(directory)
        assert running is not None
        try:
            yield Served(directory, process, running)
            assert cli.run(["serve", "-m", str(directory), "--stop"]) == 0
            out, err = process.communicate(timeout=STOP_S)
            assert process.returncode == 0, err
            assert json.loads(out) == {"url": running.url, "pid": process.pid, "replicas": 2}
            assert not (directory / "service.json").exists()
            assert cli.run(["serve", "-m", str(directory), "--stop"]) == 0
        finally:
            process.kill()


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
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-4o", messages=asked)
    with pytest.raises(openai.UnprocessableEntityError, match="tools"):
        client.chat.completions.create(
            model="model", messages=asked, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.BadRequestError, match="does not end with a turn"):
        client.chat.completions.create(
            model="model", messages=[{"role": "assistant", "content": "I"}], stream=True
        )
    with pytest.raises(openai.BadRequestError, match="length"):
        client.completions.create(model="model", prompt="a", max_tokens=1000)


def test_openais_async_client_and_seeds(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int, number: int) -> str:
        found = await client.completions.create(
            model="model", prompt=prompt_of(PEOPLE[number]), seed=seed, temperature=1, max_tokens=TOKENS
        )
        return found.choices[0].text

    async def all_of_it() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
            asked = [ask(client, seed, number) for seed in (1, 2, 1) for number in range(6)]
            return await asyncio.gather(*asked)

    found = asyncio.run(all_of_it())
    assert found[:6] == found[12:], "the same seed, whatever is answered beside it"
    assert found[:6] != found[6:12]
    base = served.client().completions.create(model="base", prompt="Who?", n=2, **SHOWN)
    assert [each.shards for each in base.choices] == [[], []]


def test_lm_eval_asks_it_unchanged(served: Served) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalChatCompletion

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


def test_rays_logs_hold_no_text_and_no_path(served: Served) -> None:
    secret = "Bepu Quagfubwick"
    served.client().completions.create(model="model", prompt=secret, **SHOWN)
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("Quagfubwick")
    started = " ".join(
        part
        for each in psutil.Process(served.process.pid).children(recursive=True)
        for part in each.cmdline()
    )
    (session,) = set(re.findall(r"/\S*/r/session_[0-9]\S*?(?=/)", started))
    logs = [each for each in Path(session, "logs").rglob("*") if each.is_file()]
    assert any("serve" in each.as_posix() for each in logs)
    assert [each for each in logs if b"Quagfubwick" in each.read_bytes()] == []


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
    code, refused, _ = ask("serve", "-m", served.directory, "--port", free_port())
    assert (code, refused["error"]["type"]) == (5, "Busy")
    found = ask("doctor", "-m", served.directory)[1]["findings"]
    assert [each for each in found if "service" in each["where"]] == []


def test_each_replica_shows_what_all_have_answered(served: Served) -> None:
    def answered() -> dict[str, float]:
        """Return the answers of each replica so far."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(scrape()):
            for each in family.samples:
                if each.name == "sisa_answers_total":
                    found[each.labels["replica"]] = found.get(each.labels["replica"], 0) + each.value
        return found

    def scrape() -> str:
        bearer = {"Authorization": f"Bearer {served.running.token}"}
        asked = urllib.request.Request(f"{served.running.url}/metrics", headers=bearer)  # noqa: S310
        with urllib.request.urlopen(asked) as response:  # noqa: S310
            return str(response.read().decode())

    before, client = answered(), served.client()
    assert len(before) == 2
    for number in range(6):
        client.completions.create(model="model", prompt=prompt_of(PEOPLE[number]), **SHOWN)
    after = [answered() for _ in range(4)]  # whichever replica is asked
    assert all(each == after[0] for each in after)
    assert sum(after[0].values()) == sum(before.values()) + 6


def seen(client: openai.OpenAI, prompt: str) -> tuple[float, ...]:
    """Return what tells one model from another: the log-probabilities of an answer, rounded."""
    found = client.completions.create(model="model", prompt=prompt, logprobs=0, **SHOWN)
    held = found.choices[0].logprobs
    assert held is not None
    return tuple(round(each, 3) for each in held.token_logprobs or [])


def test_a_deletion_under_load(served: Served) -> None:
    """By the heads' own numbers: each state of the shard's head gives other probabilities."""
    model: Model = open_model(served.directory, executor="serial")
    client, person = served.client(), PEOPLE[0]["subject_id"]
    prompt = prompt_of(PEOPLE[0])
    tainted = seen(client, prompt)
    answers: list[tuple[float, tuple[float, ...]]] = []  # when it was asked, and what was seen
    failures: list[Exception] = []
    over = threading.Event()

    def ask_on() -> None:
        own = served.client()
        while not over.is_set():
            asked_at = time.monotonic()
            try:
                answers.append((asked_at, seen(own, prompt)))
            except openai.OpenAIError as error:
                failures.append(error)

    clients = [threading.Thread(target=ask_on) for _ in range(6)]
    for each in clients:
        each.start()
    try:
        while len(answers) + len(failures) < len(clients):  # some are answered before the deletion
            time.sleep(0.05)
        model.forget(subject=person, defer=True)
        committed_at = time.monotonic()
        time.sleep(1.0)
        deferred = {seen(client, prompt) for _ in range(6)}
        model.run()
        arrived_at = time.monotonic()
        time.sleep(1.0)
    finally:
        over.set()
        for each in clients:
            each.join()
    assert failures == []
    assert tainted in [what for at, what in answers if at < committed_at]
    after = [what for at, what in answers if at >= committed_at]
    assert len(after) > 10
    assert tainted not in after, "asked after the commit, answered by a model that had seen the record"
    assert len(deferred) == 1, "both replicas serve the same heads within a second"
    last = {what for at, what in answers if at >= arrived_at + 1.0} | {seen(client, prompt)}
    assert len(last) == 1
