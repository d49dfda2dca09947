"""Provide the ground of endurance tests: a folder with a model, its source files and its home.

All models share one partition key, so that any of them can be compared with one trained from scratch.
Everything that a step may change is inside `site`, even the user's state directory: a snapshot of the
site is complete. Commands run in their own processes (`child.py`); between them, tests read the disk.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import Keyed, digest_of, file_sha256, sha256_hex
from sisa.core.domain import RecordRow, Tombstone
from sisa.core.errors import SisaError
from sisa.core.patches import active
from sisa.core.ports import Keyring
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.lm.base.numerics import describe_fingerprint
from sisa.planning.layout import Assigner, Layout
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS, REPLAYS
from sisa.store.blobs.files import held_names
from sisa.store.blobs.keyring import FileKeyring, is_sealed
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.ledger.ledger import SqlLedger
from tests.endurance.child import FAILED
from tests.fakes.keyring import PLAIN
from tests.models.tiny_model import KEY, SISA_BLOCK, Row, write_rows, write_run

ROOT = Path(os.path.abspath(__file__)).parents[2]
LIBRARIES = ("torch", "peft", "faiss-cpu", "pyarrow", "sqlalchemy", "numpy")


class Broken(AssertionError):
    """Raised for a promise that did not hold."""


def expect(holds: bool, what: str) -> None:
    if not holds:
        raise Broken(what)


class Zygote:
    """Run a process that has imported everything and forks a child for each order."""

    def __init__(self, trainer: str) -> None:
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.trainer = trainer
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.endurance.child", "--serve", trainer],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )

    def __call__(self, order: Mapping[str, Any]) -> int:
        """Carry out an order; return the child's exit status: 0, FAILED plus an exit code, or -9."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"trainer": self.trainer, **order}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        expect(bool(answer), "the process that forks children has died")
        return int(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@dataclass(frozen=True)
class Picture:
    """Describe a model at rest: digests of its files, its heads, what it holds and what it deleted."""

    files: dict[str, str]
    heads: tuple[tuple[int, str | None, str | None], ...]
    digest: str


@dataclass(frozen=True)
class Moment:
    """Describe what a killed process left behind."""

    state: str
    held: frozenset[str]
    deleted: frozenset[str]


class Ground:
    """Hold a site and its snapshots, and run commands on it."""

    def __init__(self, folder: Path, zygote: Zygote, base: str, **always: Any) -> None:
        """Create a ground. `always` are settings of every run file that it writes."""
        self.folder = folder
        self.always = always
        self.zygote = zygote
        self.base = base
        self.site = folder / "site"
        self.model = self.site / "model"
        layout = Layout(SISA_BLOCK["shards"], SISA_BLOCK["slices"])
        self.assigner = Assigner(Keyed(bytes.fromhex(KEY)), layout)

    def prepare(self, rows: Sequence[Row], name: str = "run.yaml", **settings: Any) -> Path:
        """Write a run file and its records; all run files of a site have the same records."""
        return write_run(self.site, self.base, rows, name=name, **self.always, **settings)

    def file(self, name: str, rows: Sequence[Row]) -> Path:
        return write_rows(self.site / name, rows)

    def order(self, order: Mapping[str, Any], **options: Any) -> int:
        """Carry out a step in its own process; return its exit status."""
        errors = self.folder / "errors.txt"
        errors.unlink(missing_ok=True)
        full = {"model": str(self.model), "home": str(self.site / "home"), "errors": str(errors)}
        return self.zygote({**full, **order, **options})

    def must(self, order: Mapping[str, Any], **options: Any) -> None:
        """Carry out a step that has to succeed."""
        status = self.order(order, **options)
        errors = self.folder / "errors.txt"
        trace = errors.read_text() if errors.exists() else ""
        expect(status == 0, f"`{order['do']}` ended with {status}: {trace}")

    def snapshot(self, name: str) -> None:
        shutil.copytree(self.site, self.folder / "snapshots" / name)

    def restore(self, name: str) -> None:
        shutil.rmtree(self.site, ignore_errors=True)
        shutil.copytree(self.folder / "snapshots" / name, self.site)

    def picture(self) -> Picture:
        """Return the model at rest. Raise Broken for a file or a key that should not be there."""
        keyring = self.keyring()
        files = {}
        for room in (RECORDS, INDEX, CHECKPOINTS):
            expect(
                not keyring.seals or keyring.held(room) == held_names(self.model / room),
                f"keys are not those of the files: {room}",
            )
            for path in sorted((self.model / room).rglob("*")):
                if path.is_file():
                    files[path.relative_to(self.model).as_posix()] = self._digest(keyring, room, path)
        expect(not keyring.held(REPLAYS), "keys of a replay are left")
        ledger = SqlLedger(self.model / LEDGER)
        try:
            heads = tuple((each.shard, each.key, each.target) for each in ledger.heads())
            adapters = {each.key: each.adapter_sha256 for each in ledger.checkpoints()}
            stack = [each.adapter_sha256 for each in active(ledger.patches())]
            return Picture(
                files, heads, digest_of([adapters.get(key or "") for _, key, _ in heads] + stack)
            )
        finally:
            ledger.close()

    def keyring(self) -> Keyring:
        """Return the model's keys, which are in the state directory of the site."""
        ledger = SqlLedger(self.model / LEDGER)
        try:
            name = ledger.meta()["model"]
        finally:
            ledger.close()
        root = self.site / "home" / "state" / "sisa" / "keyrings" / name
        return FileKeyring(root) if self.always.get("encrypt") else PLAIN

    def _digest(self, keyring: Keyring, room: str, path: Path) -> str:
        data = path.read_bytes()
        expect(is_sealed(data) == keyring.seals, f"not sealed as it should be: {room}")
        name, *part = path.relative_to(self.model / room).parts
        return sha256_hex(keyring.unseal(room, name, part[0] if part else "", data))

    def lookup(self, ids: Iterable[str]) -> dict[str, RecordRow | Tombstone]:
        """Return what the ledger holds of some records, by id."""
        digests = {self.assigner.id_digest(each): each for each in ids}
        ledger = SqlLedger(self.model / LEDGER)
        try:
            return {digests[digest]: found for digest, found in ledger.lookup(digests).items()}
        finally:
            ledger.close()

    def tainted(self, ids: Iterable[str]) -> set[str]:
        """Return the checkpoints that the held ones of these records touched."""
        from sisa.planning.plan import tainted_checkpoints

        rows = [each for each in self.lookup(ids).values() if isinstance(each, RecordRow)]
        ledger = SqlLedger(self.model / LEDGER)
        try:
            return set(tainted_checkpoints(ledger.checkpoints(), rows))
        finally:
            ledger.close()

    def moment(
        self, ids: Sequence[str], named: Sequence[str], tainted: Iterable[str], *, confessing: bool
    ) -> Moment:
        """Return what a killed command left, read from a copy; raise Broken if a head is not clean.

        `ids` are all ids that ever existed, `named` those that the command should delete, and `tainted`
        the checkpoints that these had touched.
        """
        probe = Ground(self.folder / "probe", self.zygote, self.base, **self.always)
        shutil.rmtree(probe.folder, ignore_errors=True)
        shutil.copytree(self.site, probe.site)
        try:
            return probe._moment(ids, set(named), set(tainted), confessing)
        finally:
            shutil.rmtree(probe.folder)

    def _moment(
        self, ids: Sequence[str], named: set[str], tainted: set[str], confessing: bool
    ) -> Moment:
        try:
            ledger = SqlLedger(self.model / LEDGER)
        except SisaError:
            return Moment("no ledger", frozenset(), frozenset())
        try:
            heads = ledger.heads()
            if not heads:
                return Moment("nothing committed", frozenset(), frozenset())
            checkpoints = {each.key: each for each in ledger.checkpoints()}
            names = held_names(self.model / CHECKPOINTS)
            open_ = [head for head in heads if not head.converged]
            requests = sorted({each.state for each in ledger.requests()} - {"completed"})
            left = "left-overs" if names - checkpoints.keys() else "tidy"
        finally:
            ledger.close()
        found = self.lookup(ids)
        held = frozenset(each for each, row in found.items() if isinstance(row, RecordRow))
        store = FileCheckpoints(self.model / CHECKPOINTS, self.keyring())
        for key in [head.key for head in heads if head.key is not None]:
            expect(key in checkpoints, "a head serves a checkpoint that the ledger does not know")
            files = store.load(key, checkpoints[key].manifest_sha256)
            if confessing:
                touched = set(json.loads(files[ADAPTER_FILE])["touched"])
                expect(touched <= held, f"a head knows {len(touched - held)} records not held")
            if key in tainted:
                gone = named & (found.keys() - held)
                expect(not gone, "a head is a checkpoint that a deleted record touched")
        state = f"{len(open_)} shards open, {left}" + "".join(f", {each}" for each in requests)
        return Moment(state, held, frozenset(found) - held)

    def request_problems(self, deletions: Sequence[Sequence[str]], num_waiting: int = 0) -> list[str]:
        """Return the requests that were lost or done twice.

        `deletions` are the ids of every deletion so far; `num_waiting` requests are approved and have
        not run.
        """
        ledger = SqlLedger(self.model / LEDGER)
        try:
            requests = {each.request_id: each for each in ledger.requests()}
        finally:
            ledger.close()
        states = Counter[str](each.state for each in requests.values())
        wanted = Counter(completed=len(deletions), approved=num_waiting)
        problems = [] if +wanted == states else [f"requests: {dict(states)}, expected {dict(wanted)}"]
        seen: list[str] = []
        for ids in deletions:
            found = self.lookup(ids)
            by = {each.request_id for each in found.values() if isinstance(each, Tombstone)}
            if len(found) != len(ids) or len(by) != 1 or not by <= requests.keys():
                problems.append(f"{len(ids)} deleted records belong to {len(by)} known requests")
            seen += by
        if len(set(seen)) != len(deletions):
            problems.append("two deletions share a request")
        return problems


def scratch_picture(
    folder: Path, zygote: Zygote, base: str, rows: Sequence[Row], **settings: Any
) -> Picture:
    """Return the picture of a model that never held anything else."""
    shutil.rmtree(folder, ignore_errors=True)
    ground = Ground(folder, zygote, base)
    ground.must({"do": "train", "run": str(ground.prepare(rows, **settings))})
    try:
        return ground.picture()
    finally:
        shutil.rmtree(folder)


def compare(found: Picture, wanted: Picture, what: str) -> None:
    """Raise Broken with the files in which two models differ."""
    names = found.files.keys() | wanted.files.keys()
    differing = sorted(name for name in names if found.files.get(name) != wanted.files.get(name))
    expect(not differing, f"{what}: {len(differing)} files differ: {differing[:3]}")
    expect(found.heads == wanted.heads, f"{what}: the heads differ")
    expect(found.digest == wanted.digest, f"{what}: the model digests differ")


def environment() -> dict[str, Any]:
    """Return versions and machine, for the JSON beside the counts."""
    processor = describe_fingerprint(1)["processor"]
    packages = ("sisa", "approx", "cluster")
    sources = sorted(path for each in packages for path in (ROOT / each).rglob("*.py"))
    named = [[path.relative_to(ROOT).as_posix(), file_sha256(path)] for path in sources]
    return {
        "version": metadata.version("deletion-ready-model"),
        "source_sha256": digest_of(named),
        "python": sys.version.split()[0],
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "cpus": len(os.sched_getaffinity(0)),
        "processor": processor["model"],
    }


def write_json(path: Path, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=2, sort_keys=False) + "\n", encoding="utf-8")


def ended(found: Mapping[str, Any], out: Path | None) -> int:
    """Write what was found, with versions and machine; return the exit code of a check."""
    if out:
        write_json(out, {**environment(), **found})
    return 1 if found["failures"] else 0


def table(title: str, counts: Mapping[str, int]) -> str:
    """Return counts by state, one on each line."""
    width = max([len(name) for name in counts], default=0)
    lines = [f"  {name:<{width}}  {count:>6}" for name, count in sorted(counts.items())]
    return "\n".join([title, *lines])


def killed(status: int) -> bool:
    return status == -signal.SIGKILL


def failed(status: int) -> bool:
    return status >= FAILED
