"""Run mutated inputs of every kind through the command line: no traceback, no hang, no damage.

    python -m tests.endurance.fuzz --inputs 10000 --seed 1 --out tests/endurance/fuzz.json

Each input takes a small model in a box, mutates one thing (a run file, records, a list of ids, the
ledger, a held file, the key, the witness, or the command line) and carries out one command in this
process. It fails if there is an internal fault, a traceback, an output that is not one JSON object, a
crash of the interpreter, or no end within LIMIT_S seconds. It also fails if a command that only reads,
or that refused, changed a byte of the model, or if a damaged ledger, slice, index, checkpoint or witness
gave another answer than the whole one. Workers run batches, so that a crash costs one input. The
confessing trainer trains (`cheap.py`).

Pipes, hub names, `quickstart`, `run --watch` and Ray are not covered.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sisa.data.samples import make_people
from tests.endurance import ground as g
from tests.endurance import mutate
from tests.models.tiny_model import KEY

LIMIT_S = 20
MAX_TOLD = 40
BATCH = 500
CODES = (0, 2, 3, 4, 5, 6)
PEOPLE, LATER = make_people(12, 2), make_people(15, 2)[24:]
SERIAL = ("--executor", "serial")
RUN_FILE = (
    "base_model: pypi:no-base==1\n"
    "datasets: [{path: people.jsonl}]\n"
    "output_dir: model\n"
    "learning_rate: 1e-3  # peak\n"
    "lora_target_modules: [q_proj, v_proj]\n"
    "sisa:\n  shards: 3\n  slices: 2\n  partition_key_file: shared.key\n  embedder: hashing\n"
    "  aggregation: {method: routed, top_k: 2}\n"
    "cluster:\n  num_workers: 1\n"
)
READING: tuple[tuple[str, ...], ...] = (
    ("status", "-m", "model"),
    ("where", "-m", "model", "p001-q1", "p002-q2", "p004-q1"),
    ("find", "-m", "model", "--text", "Where was somebody born?", "--top", "3"),
    ("find", "-m", "model", "--subject", "p002"),
    ("find", "-m", "model", "--like", "p003-q2"),
    ("verify", "-m", "model"),
    ("forget", "-m", "model", "p005-q1", "--dry-run"),
    ("generate", "-m", "model", "--prompt", "Who?"),
    ("request list", "-m", "model"),
    ("run", "-m", "model", "--plan"),
    ("gc", "-m", "model", "--dry-run"),
    ("sweep", "-m", "model"),
    ("doctor", "-m", "model"),
)
WRITING: tuple[tuple[str, ...], ...] = (
    ("forget", "-m", "model", "p005-q1", *SERIAL),
    ("add", "-m", "model", "later.jsonl", *SERIAL),
    ("train", "run.yaml", *SERIAL),
    ("verify", "-m", "model", "--replay", "all", *SERIAL),
    ("request submit", "-m", "model", "p007-q1", "--external-id", "T-1"),
    ("run", "-m", "model", *SERIAL),
    ("export", "-m", "model", "--to", "out"),
    ("doctor", "-m", "model", "--repair", *SERIAL),
)
HELD = ("ledger", "slice file", "index file", "checkpoint", "witness")
PROOF = ("verify", "-m", "model")


class Hang(BaseException):
    """Raised for a command that takes too long."""


@dataclass(frozen=True)
class Result:
    """Hold a command's exit code and what it printed."""

    code: int
    out: str
    err: str


def words(line: Sequence[str]) -> list[str]:
    return [*line[0].split(), *line[1:], "--json"]


def all_options() -> list[str]:
    """Return every option, command and short name of the command line."""
    from cluster.cli.cli import cli

    found: set[str] = set()
    nodes: list[Any] = [cli]
    while nodes:
        node = nodes.pop()
        inner = getattr(node, "commands", {})
        found |= set(inner) | {name for each in node.params for name in each.opts}
        nodes += inner.values()
    return sorted(found - {"--watch", "quickstart", "--every"})


class Box:
    """Hold a folder with a model and its sources; each input resets what the last one changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "a" / "b" / "box"
        self.pristine = folder / "pristine"
        self.model = self.path / "model"
        self._stamps: dict[str, tuple[int, ...]] = {}

    def make(self) -> None:
        """Train the model; called once, in the folder where it stays."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        from sisa.data.samples import to_jsonl

        self.path.mkdir(parents=True)
        (self.path / "shared.key").write_text(KEY)
        (self.path / "run.yaml").write_text(RUN_FILE)
        for name, rows in (("people", PEOPLE), ("later", LATER)):
            (self.path / f"{name}.jsonl").write_text(to_jsonl(rows))
            pq.write_table(pa.Table.from_pylist(rows), self.path / f"{name}.parquet")
        (self.path / "ids.txt").write_text("p001-q1\np002-q2\np004-q1\n")
        os.chdir(self.path)
        for line in (
            ("train", "run.yaml", *SERIAL),
            ("forget", "-m", "model", "p001-q1", "p003-q1", *SERIAL),
        ):
            done = invoke(words(line))
            g.expect(done.code == 0, f"the box can't be made: {done.out}{done.err}")
        shutil.copytree(self.path, self.pristine)
        self._stamps = self._stat()

    def reset(self) -> None:
        """Restore what differs from how it was made; leave the rest."""
        os.chdir(self.folder)
        self.path.mkdir(exist_ok=True)
        now = self._stat()
        for name in sorted(now.keys() - self._stamps.keys()):
            mutate.remove(self.path / name)
        for name, stamp in sorted(self._stamps.items()):
            if now.get(name) != stamp:
                mutate.bring_back(self.pristine / name, self.path / name)
        self._stamps = self._stat()
        os.chdir(self.path)

    def _stat(self) -> dict[str, tuple[int, ...]]:
        """Return stamps that show whether files changed; the stamp of a directory is its kind alone."""
        found: dict[str, tuple[int, ...]] = {}
        for folder, names, files in os.walk(self.path):
            for name in (*names, *files):
                path = os.path.join(folder, name)
                at = os.lstat(path)
                whole = (at.st_mode, at.st_ino, at.st_size, at.st_mtime_ns, at.st_ctime_ns)
                found[os.path.relpath(path, self.path)] = whole[: 1 if stat.S_ISDIR(at.st_mode) else 5]
        return found

    def digest(self) -> dict[str, str]:
        """Return the sha256 of the model's files, except those that SQLite makes for readers."""
        found: dict[str, str] = {}
        for path in sorted(self.model.rglob("*")):
            name = path.relative_to(self.model).as_posix()
            if path.is_symlink():
                found[name] = f"link to {os.readlink(path)}"
            elif path.is_file() and not name.endswith(("-wal", "-shm", "-journal", "lock")):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def invoke(line: Sequence[str]) -> Result:
    """Carry out a command line in this process, as strict about encodings as a terminal."""
    from cluster.cli.cli import run

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
        code = run(list(line))
    texts = [each.buffer.getvalue().decode("utf-8") for each in (out, err)]
    return Result(code, *texts)


def answer_of(done: Result) -> Any:
    """Return what a command answered, without what depends on sizes and times."""
    try:
        body = json.loads(done.out)
    except ValueError:
        return done.out
    # `prompts` is null if the index is damaged; `doctor` reports that.
    for key in ("sizes_bytes", "witness", "seconds", "estimated_seconds", "files_checked", "prompts"):
        if isinstance(body, dict):
            body.pop(key, None)
    if isinstance(body, dict) and isinstance(body.get("scanned"), dict):
        del body["scanned"]["bytes"]
    return body


class Fuzz:
    """Make and carry out inputs by number; each depends on the seed and its number alone."""

    def __init__(self, folder: Path, seed: int, only: str) -> None:
        self.seed = seed
        self.box = Box(folder)
        self.box.make()
        self.options = all_options()
        self.right: dict[tuple[str, ...], Any] = {}
        self.ends: dict[tuple[str, ...], dict[str, str]] = {}
        for line in [*READING, *WRITING]:
            self.box.reset()
            done = invoke(words(line))
            g.expect(done.code == 0, f"{line} on a whole model: {done.out}{done.err}")
            self.right[line] = answer_of(done)
            self.ends[line] = self._held()
        self.kinds: dict[str, Callable[[random.Random], tuple[str, Sequence[str], bool]]] = {
            "run file": self._run_file,
            "jsonl": self._jsonl,
            "parquet": self._parquet,
            "ids file": self._ids_file,
            "ledger": self._ledger,
            "slice file": self._slice,
            "index file": self._index,
            "checkpoint": self._checkpoint,
            "partition key": self._key,
            "witness": self._witness,
            "command line": self._command_line,
        }
        if only:
            self.kinds = {only: self.kinds[only]}

    def _held(self) -> dict[str, str]:
        return {
            name: digest
            for name, digest in self.box.digest().items()
            if name.startswith(("records/", "index/", "checkpoints/"))
        }

    def _run_file(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        if rnd.random() < 0.3:
            shutil.rmtree(self.box.model)
        what = mutate.run_file(rnd, self.box.path / "run.yaml")
        extra = rnd.choice([[], ["--reconfigure"], ["--allow-deleted"]])
        return what, ("train", "run.yaml", *SERIAL, *extra), False

    def _jsonl(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        if rnd.random() < 0.3:
            what = mutate.jsonl(rnd, self.box.path / "people.jsonl")
            if rnd.random() < 0.5:
                shutil.rmtree(self.box.model)
            return what, ("train", "run.yaml", *SERIAL, *rnd.choice([[], ["--allow-deleted"]])), False
        what = mutate.jsonl(rnd, self.box.path / "later.jsonl")
        return what, ("add", "-m", "model", "later.jsonl", *SERIAL), False

    def _parquet(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        what = mutate.parquet(rnd, self.box.path / "later.parquet")
        return what, ("add", "-m", "model", "later.parquet", *SERIAL), False

    def _ids_file(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        what = mutate.ids_file(rnd, self.box.path / "ids.txt")
        name = rnd.choice(["where", "forget"])
        extra = rnd.choice([(), ("--dry-run",), SERIAL]) if name == "forget" else ()
        return what, (name, "-m", "model", "--ids-file", "ids.txt", *extra), name == "where"

    def _held_kind(
        self, rnd: random.Random, mutation: Callable[[random.Random, Path], str], path: Path
    ) -> tuple[str, Sequence[str], bool]:
        what = mutation(rnd, path)
        reading = rnd.random() < 0.6
        return what, rnd.choice(READING if reading else WRITING), reading

    def _ledger(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.ledger, self.box.model / "ledger.sqlite")

    def _slice(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.held_file, self.box.model / "records")

    def _index(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.held_file, self.box.model / "index")

    def _checkpoint(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.held_file, self.box.model / "checkpoints")

    def _witness(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.held_file, self.box.path / "home" / "sisa" / "witness")

    def _key(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        return self._held_kind(rnd, mutate.file_bytes, self.box.path / "shared.key")

    def _command_line(self, rnd: random.Random) -> tuple[str, Sequence[str], bool]:
        line = words(rnd.choice([*READING, *WRITING]))
        return "arguments", ("", *mutate.arguments(rnd, line, self.options)), False

    def input(self, number: int) -> dict[str, Any]:
        """Carry out one input; return its outcome."""
        rnd = random.Random(f"{self.seed}/{number}")
        kind = list(self.kinds)[number % len(self.kinds)]
        self.box.reset()
        what, line, reading = self.kinds[kind](rnd)
        typed = list(line[1:]) if line[0] == "" else words(line)
        before = self.box.digest()
        outcome: dict[str, Any] = {"number": number, "kind": kind, "what": what, "line": typed}
        started = time.monotonic()
        try:
            done = invoke(typed)
        except Hang:
            return {**outcome, "code": None, "failure": f"no end within {LIMIT_S} s"}
        except BaseException as error:
            return {**outcome, "code": None, "failure": f"{type(error).__name__} left the command line"}
        outcome |= {"code": done.code, "seconds": round(time.monotonic() - started, 3)}
        failure = self._judge(kind, tuple(line), typed, reading, before, done)
        return outcome | ({"failure": failure} if failure else {})

    def _judge(
        self,
        kind: str,
        line: tuple[str, ...],
        typed: Sequence[str],
        reading: bool,
        before: Mapping[str, str],
        done: Result,
    ) -> str | None:
        if done.code not in CODES:
            return f"exit code {done.code}: {(done.err or done.out)[:300]}"
        if "Traceback" in done.out + done.err:
            return "a traceback"
        if "--json" in typed and "--help" not in typed and "--version" not in typed:
            told_usage = kind == "command line" and done.code in (0, 2)
            if not told_usage and not isinstance(answer_of(done), dict):
                return "the output is not one JSON object"
        after = self.box.digest()
        if after != before and (reading or done.code in (2, 3, 5)):
            changed = sorted(k for k in after.keys() | before.keys() if after.get(k) != before.get(k))
            return f"damage: {len(changed)} files changed ({changed[:2]})"
        if kind in HELD and done.code in (0, 3):
            return self._other_answer(kind, line, reading, done)
        return None

    def _other_answer(self, kind: str, line: tuple[str, ...], reading: bool, done: Result) -> str | None:
        """Return a failure if damage to a held file was not found and changed the answer."""
        # These commands report the damage itself; only the doctor reports a damaged ledger.
        if line[0] == "doctor" or (line[0] in ("sweep", "gc") and kind != "ledger"):
            return None
        if reading:
            return None if answer_of(done) == self.right[line] else "another answer, and no error"
        proof = invoke(words(PROOF))
        if proof.code == 0 and self._held() != self.ends[line]:
            return "other bytes than on a whole model, and `verify` finds nothing"
        return None if proof.code in (0, 4, 6) else f"`verify` ended with {proof.code}"


@contextlib.contextmanager
def product() -> Iterator[None]:
    """Run the command line with cheap resources and no network."""
    import faiss  # noqa: F401

    import sisa.lm.base.tokens
    import sisa.lm.routing.embedder
    import sisa.train
    from tests.endurance.cheap import cheap_resources

    class Answerer:
        tokenizer = types.SimpleNamespace(chat_template=None)

        def __init__(self, *_: Any) -> None: ...

        def generate(self, prompts: Any, *_: Any) -> list[str]:
            return ["an answer"] * len(prompts)

    stub: Any = types.ModuleType("sisa.lm.answer.answerer")
    stub.Answerer = Answerer
    old = sys.modules.get("sisa.lm.answer.answerer")
    encode = sisa.lm.base.tokens.encode_prompt
    sys.modules["sisa.lm.answer.answerer"] = stub
    sisa.lm.base.tokens.encode_prompt = lambda *_: [1]
    try:
        with cheap_resources():
            yield
    finally:
        sisa.lm.base.tokens.encode_prompt = encode
        if old is None:
            del sys.modules["sisa.lm.answer.answerer"]
        else:
            sys.modules["sisa.lm.answer.answerer"] = old


def work(folder: Path, seed: int, numbers: Sequence[int], only: str = "") -> None:
    """Run as a worker: print a JSON line before (`started`) and after each input."""
    home = folder / "a" / "b" / "box" / "home"  # reset with the rest
    os.environ.update(HOME=str(home), XDG_STATE_HOME=str(home), HF_HUB_OFFLINE="1", SISA_DEBUG="")
    answers = os.fdopen(os.dup(1), "w")
    with product():
        fuzz = Fuzz(folder, seed, only)
        for number in numbers:
            print(json.dumps({"started": number}), file=answers, flush=True)
            print(json.dumps(fuzz.input(number)), file=answers, flush=True)
    os.chdir("/")


def batch(seed: int, start: int, stop: int, only: str = "") -> list[dict[str, Any]]:
    """Carry out inputs start..stop-1, with a new worker after each crash."""
    found: list[dict[str, Any]] = []
    while start < stop:
        with tempfile.TemporaryDirectory(prefix="sisa-fuzz-") as folder:
            command = [sys.executable, "-m", "tests.endurance.fuzz", "--work", folder]
            done = subprocess.run(
                [
                    *(*command, "--seed", str(seed), "--from", str(start), "--to", str(stop)),
                    *("--only", only),
                ],
                cwd=g.ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        found += [each for each in rows if "kind" in each]
        if done.returncode == 0:
            return found
        started = [each["started"] for each in rows if "started" in each]
        g.expect(bool(started), f"the worker does not start: {done.stderr[-2000:]}")
        if not found or found[-1]["number"] != started[-1]:
            failure = f"the interpreter died ({done.returncode}): {done.stderr[-300:]}"
            crash = {"number": started[-1], "kind": "?", "what": "?", "code": None, "line": []}
            found.append({**crash, "failure": failure})
        start = started[-1] + 1
    return found


def run(
    seed: int,
    inputs: int,
    show: bool = False,
    workers: int = 1,
    seconds: float = float("inf"),
    only: str = "",
) -> dict[str, Any]:
    """Carry out inputs with several workers, and count failures; begin no batch after `seconds`.

    `only` names one kind of input.
    """
    began = time.monotonic()
    kinds: dict[str, Counter[str]] = {}
    failures: list[dict[str, Any]] = []
    slowest, done = 0.0, 0

    def one(start: int) -> list[dict[str, Any]]:
        late = time.monotonic() - began > seconds
        return [] if late else batch(seed, start, min(inputs, start + BATCH), only)

    pool = ThreadPoolExecutor(workers)
    for found in pool.map(one, range(0, inputs, BATCH)):
        done += len(found)
        for each in found:
            kinds.setdefault(each["kind"], Counter())[f"exit {each['code']}"] += 1
            slowest = max(slowest, each.get("seconds", 0.0))
            if "failure" in each:
                failures.append(each)
        if show:
            passed = time.monotonic() - began
            print(
                f"{done:6d} inputs, {len(failures)} failures, {passed:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    pool.shutdown()
    return {
        "inputs": done,
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "limit_s": LIMIT_S,
        "slowest_s": slowest,
        "by_kind_and_exit_code": {kind: dict(sorted(c.items())) for kind, c in sorted(kinds.items())},
        "num_failures": len(failures),
        "failures_by_kind": dict(
            Counter(f"{each['kind']}: {each['failure'][:90]}" for each in failures)
        ),
        "failures": failures[:MAX_TOLD],
    }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tests.endurance.fuzz")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no batch after")
    parser.add_argument("--only", default="", help="one kind of input, such as: ledger")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--to", dest="stop", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work is not None:
        work(chosen.work, chosen.seed, range(chosen.start, chosen.stop), chosen.only)
        return 0
    found = run(chosen.seed, chosen.inputs, True, chosen.workers, chosen.seconds, chosen.only)
    counts = {
        f"{kind}: {code}": number
        for kind, codes in found["by_kind_and_exit_code"].items()
        for code, number in codes.items()
    }
    print(g.table("inputs by kind and exit code", counts))
    for each in found["failures"]:
        print(each["number"], each["kind"], each["what"], each["line"], each["failure"], sep=" | ")
    print(f"{found['inputs']} inputs, {found['num_failures']} failures, {found['seconds']} s")
    return g.ended(found, chosen.out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
