"""Ask a served model without a pause while people are deleted from it and its processes are killed.

    python -m tests.endurance.service --minutes 10 --deletions 100 --out tests/endurance/service.json

Sixteen clients ask `sisa serve` (two replicas, a tiny base) about people who are still held. Deletions
are submitted and approved over HTTP, and the service's runner carries them out. Every so often a replica
or the serving process itself is killed, the latter with its runner and its Ray, and started again as a
supervisor would. Then:

    nothing is lost     each question is answered in the end, and each request is completed exactly once
    nothing is tainted  a model shows itself by the log-probabilities of its answers. No answer that was
                        asked after a commit has the numbers that a shard with the deleted record gave
    nothing differs     all adapters have the bytes of a training from scratch on who remains

Shards have one slice, so that each head has seen all of its shard's records: numbers that were seen
before a deletion can't come back from a clean head. Clients ask again after an error.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import openai
import psutil
import requests

from cluster.serve.service import find_service
from sisa.data.samples import make_people
from sisa.flows.wiring.upper_houses import SERVICE
from tests.endurance.ground import Broken, expect
from tests.models.programs.job_cluster import free_port
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Row, ids_of, train_scratch, without

CLIENTS, SHARDS, SPARE, TOKENS = 16, 4, 12, 4
PATIENCE_S, START_S, SETTLE_S = 60.0, 180.0, 300.0
REPLICA, DRIVER = "replica", "driver"
SERVE_REPLICA = "ray::ServeReplica"  # how the title of a replica's process begins
OWN = "soak-"  # how the names of its requests begin
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Seen:
    """An answer: when it was asked for and there, by which shards, and what shows who gave it."""

    asked_at: float
    ended_at: float
    prompt: str
    shards: tuple[int, ...]
    numbers: Numbers


@dataclass(frozen=True)
class Deletion:
    """A person's deletion: their shard, when it was asked for, and when its commit was known."""

    shard: int
    asked_at: float
    known_at: float


@dataclass
class Service:
    """A served model whose processes are killed and started again; `url` never changes."""

    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None
    num_replicas: int = 2

    @property
    def directory(self) -> Path:
        return self.folder / "model"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        """Return the owner's token; each start makes another one."""
        try:
            return str(json.loads((self.directory / SERVICE).read_bytes())["token"])
        except (OSError, ValueError):
            return "none"

    def start(self) -> None:
        """Start the service and wait until it answers, as a supervisor does that tries again."""
        deadline = time.monotonic() + START_S
        command = [sys.executable, "-m", "sisa", "serve", "-m", str(self.directory)]
        command += ["--replicas", str(self.num_replicas)]
        while time.monotonic() < deadline:
            with (self.folder / "log").open("ab") as log:
                self.process = subprocess.Popen(
                    [*command, "--port", str(self.port)], stdout=log, stderr=log
                )
            while self.process.poll() is None and time.monotonic() < deadline:
                if (found := find_service(self.directory)) and found.pid == self.process.pid:
                    return
                time.sleep(0.2)
            time.sleep(1.0)  # the port or Ray of the killed one is not free yet
        raise Broken(f"the service did not start:\n{(self.folder / 'log').read_text()[-2000:]}")

    def kill(self, what: str) -> bool:
        """Kill a replica, or the driver with its runner; return whether there was one."""
        assert self.process is not None
        if what == DRIVER:
            self.process.kill()
            self.process.wait()
            self.start()
            return True
        found = self.replicas()
        if found:
            random.choice(found).kill()
        return bool(found)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes of its replicas."""
        assert self.process is not None
        return [each for each in psutil.process_iter(["cmdline"]) if _is_replica(each, self.process)]

    def stop(self) -> None:
        """End the service as Ctrl-C does, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(PATIENCE_S)


def _is_replica(process: psutil.Process, driver: subprocess.Popen[bytes]) -> bool:
    line = " ".join(process.info["cmdline"] or ())
    if not line.startswith(SERVE_REPLICA):
        return False
    try:
        return driver.pid in [each.pid for each in process.parents()]
    except psutil.Error:
        return False


def train(folder: Path, base: Path, rows: Sequence[Row], shards: int, **settings: Any) -> None:
    """Train a model whose shards have one slice, in `folder/model`."""
    outside = {name: str(folder / name) for name in ("witness", "keyring")}
    block = {"shards": shards, "slices": 1}
    train_scratch(folder, base, rows, sisa_block=block, **outside, **settings)


@dataclass
class Soak:
    """The clients, the deletions and the kills of one run, on a service that runs.

    `rows` are all on which its model was trained. Clients ask about the people in `held`, and these are
    deleted.
    """

    service: Service
    base: Path
    rows: Sequence[Row]
    shards: int
    held: list[str]
    seed: int
    num_clients: int = CLIENTS

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.random.shuffle(self.held)
        self.deleted: list[str] = []
        self.deletions: list[Deletion] = []
        self.seen: list[Seen] = []
        self.kills, self.trouble = Counter[str](), Counter[str]()
        self.lost: list[str] = []
        self.over = threading.Event()

    # Clients

    def ask_on(self, seed: int) -> None:
        """Ask about held people until the end."""
        own = random.Random(seed)
        url, token = f"{self.service.url}/v1", lambda: self.service.token
        client = openai.OpenAI(base_url=url, api_key=token, max_retries=0)
        while not self.over.is_set():
            of = own.choice(self.held)
            prompt = str(next(row["prompt"] for row in self.rows if row["subject_id"] == of))
            try:
                self.seen.append(self._again(partial(ask, client, prompt)))
            except Broken as error:
                self.lost.append(str(error))

    def _again(self, call: Callable[[], Any]) -> Any:
        """Return what a call gives in the end. Raise Broken if it never does."""
        deadline = time.monotonic() + PATIENCE_S + START_S
        while True:
            try:
                return call()
            except (openai.OpenAIError, requests.RequestException) as error:
                self.trouble[type(error).__name__] += 1
                if time.monotonic() > deadline:
                    raise Broken(f"no answer in the end: {type(error).__name__}") from error
                time.sleep(0.2)

    # Deletions

    def delete(self, who: str) -> None:
        """Have a person deleted over HTTP, and wait for the commit."""
        (shard,) = {self._shard(row["id"]) for row in self.rows if row["subject_id"] == who}
        name, asked_at = f"{OWN}{who}", time.monotonic()
        self._post("/requests", {"subject": who, "external_id": name})
        self._post(f"/requests/{name}/approve", {}, done=("approved",))
        self._post("/requests/run", {})
        deadline = time.monotonic() + SETTLE_S
        while not self._get(f"/requests/{name}")["committed_at"]:
            expect(time.monotonic() < deadline, f"{name} was not carried out")
            time.sleep(0.1)
        self.deletions.append(Deletion(shard, asked_at, time.monotonic()))
        self.held = [each for each in self.held if each != who]  # clients choose from it meanwhile
        self.deleted.append(who)

    def _shard(self, record: str) -> int:
        return int(self._get(f"/records/{record}/shards")["shard"])

    @property
    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.service.token}"}

    def _get(self, path: str) -> Any:
        def call() -> Any:
            answer = requests.get(self.service.url + path, timeout=PATIENCE_S, headers=self._bearer)
            answer.raise_for_status()
            return answer.json()

        return self._again(call)

    def _post(self, path: str, body: Any, done: Sequence[str] = ()) -> None:
        """Post until it is answered; one that was done before a kill is refused by its state."""

        def call() -> None:
            url, headers = self.service.url + path, self._bearer
            answer = requests.post(url, json=body, timeout=PATIENCE_S, headers=headers)
            if answer.status_code == 409 and done:
                return
            answer.raise_for_status()

        self._again(call)

    # The run

    def run(
        self,
        num_deletions: int,
        minutes: float,
        kill_every: int,
        kinds: Sequence[str] = (REPLICA, REPLICA, DRIVER),
    ) -> None:
        """Delete people one after another beside the clients, and kill something after some of them."""
        numbers = range(self.num_clients)
        clients = [threading.Thread(target=self.ask_on, args=(each,)) for each in numbers]
        for each in clients:
            each.start()
        began = time.monotonic()
        try:
            while len(self.seen) < self.num_clients:  # so that heads were seen before the first deletion
                expect(time.monotonic() < began + START_S, "nothing is answered")
                time.sleep(0.1)
            for number in range(num_deletions):
                wait = began + 60 * minutes * number / num_deletions - time.monotonic()
                time.sleep(max(0.0, wait))
                self.delete(self.held[self.random.randrange(len(self.held))])
                if number % kill_every == kill_every - 1:
                    what = self.random.choice(kinds)
                    self.kills[what] += self.service.kill(what)
            self._settle()
        finally:
            self.over.set()
            for each in clients:
                each.join()

    def _settle(self) -> None:
        """Wait until every request is completed."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            own = self._get("/requests")["requests"]
            states = Counter(e["state"] for e in own if (e["external_id"] or "").startswith(OWN))
            if set(states) == {"completed"}:
                break
            expect(time.monotonic() < deadline, f"requests did not complete: {dict(states)}")
            self._post("/requests/run", {})
            time.sleep(1.0)
        expect(states.total() == len(self.deleted), f"{states.total()} of {len(self.deleted)} requests")

    def tainted(self) -> list[Seen]:
        """Return answers asked after a commit, with the numbers of a head from before it."""
        return [
            each
            for deletion in self.deletions
            for before in [self._numbers_before(deletion)]
            for each in self._after(deletion)
            if each.numbers in before.get(each.prompt, ())
        ]

    def _numbers_before(self, deletion: Deletion) -> dict[str, set[Numbers]]:
        """Return the numbers that heads which had seen the record gave, by prompt."""
        found: dict[str, set[Numbers]] = {}
        for each in self.seen:
            if each.ended_at < deletion.asked_at and deletion.shard in each.shards:
                found.setdefault(each.prompt, set()).add(each.numbers)
        return found

    def _after(self, deletion: Deletion) -> list[Seen]:
        after = (each for each in self.seen if each.asked_at > deletion.known_at)
        return [each for each in after if deletion.shard in each.shards]

    def num_compared(self) -> int:
        """Return how many answers could have shown a taint, for how many deletions, in all."""
        return sum(
            each.prompt in before
            for deletion in self.deletions
            for before in [self._numbers_before(deletion)]
            for each in self._after(deletion)
        )

    def differences(self, folder: Path) -> list[str]:
        """Return what differs from a training from scratch, in a folder, on the records that remain."""
        from sisa.model import open_model

        model = open_model(self.service.directory)
        gone = [each.id for each in model.where(ids_of(self.rows)) if each.state == "deleted"]
        wanted = {row["id"] for row in self.rows if row["subject_id"] in self.deleted}
        train(folder, self.base, without(self.rows, gone), self.shards)
        mine, theirs = (
            {each.shard: each.adapter_sha256 for each in found.status().shards}
            for found in (model, open_model(folder / "model"))
        )
        held = [f"record {each} is held" for each in sorted(wanted.difference(gone))]
        return held + [f"shard {shard}" for shard in mine if mine[shard] != theirs[shard]]


def ask(client: openai.OpenAI, prompt: str) -> Seen:
    """Return a short answer."""
    asked_at = time.monotonic()
    found = client.completions.create(
        model="model", prompt=prompt, logprobs=0, max_tokens=TOKENS, temperature=0, timeout=PATIENCE_S
    )
    choice: Any = found.choices[0]
    numbers = tuple(round(each, 3) for each in choice.logprobs.token_logprobs or ())
    return Seen(asked_at, time.monotonic(), prompt, tuple(choice.shards), numbers)


def main(arguments: Sequence[str]) -> int:
    """Run the soak and write what it found."""
    parser = argparse.ArgumentParser(prog="tests.endurance.service")
    parser.add_argument("--deletions", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kill-every", type=int, default=10, help="deletions between kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    began, failures = time.monotonic(), []
    rows = make_people(chosen.deletions + SPARE, 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, service = make_tiny_base(folder / "base"), Service(folder)
        train(folder, base, rows, SHARDS)
        soak = Soak(
            service, base, rows, SHARDS, sorted({row["subject_id"] for row in rows}), chosen.seed
        )
        try:
            service.start()
            soak.run(chosen.deletions, chosen.minutes, chosen.kill_every)
            failures += soak.differences(folder / "scratch")
        except Broken as error:
            failures.append(str(error))
        finally:
            service.stop()
    failures += soak.lost
    tainted = soak.tainted()
    found = {
        "deletions": len(soak.deleted),
        "answers": len(soak.seen),
        "answers_by_shards": sum(bool(each.shards) for each in soak.seen),
        "comparisons": soak.num_compared(),
        "tainted": len(tainted),
        "kills": dict(soak.kills),
        "calls_repeated": dict(soak.trouble),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "seed": chosen.seed,
        "failures": failures,
    }
    print(json.dumps(found, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if failures or tainted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
