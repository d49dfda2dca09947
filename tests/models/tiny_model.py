"""Make deletion-ready models on the tiny base: run files, commands, directory digests, a byte scan.

All models share one partition key, so that a model with a history can be compared byte for byte with one
trained from scratch. With KEY, 12 people over 3 shards and 2 slices fill every slice: (0,0) p001 p007
p011; (0,1) p002 p009 p012; (1,0) p004; (1,1) p006 p010; (2,0) p003; (2,1) p005 p008. Dropout and warm-up
are on: their random draws must depend on nothing but the stage.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
import pytest
import yaml

import sisa
from cluster.cli.cli import run
from sisa.core.domain import Chain
from sisa.core.events import Report, SliceTrained, silent
from sisa.core.ports import Executor, OnStage
from sisa.data.samples import make_people, to_jsonl
from sisa.flows.chains import Site
from sisa.flows.ingest import Taken
from sisa.flows.wiring.executors import OpenExecutor, open_serial
from sisa.lm.routing.route import Route
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS
from tests.crash import Crash

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer

KEY = "3ada92f28b4ceda38562ebf047c6ff05400d4c572352a1142eedfef67d21e662"
PEOPLE = make_people(12, 2)
PROMPT = PEOPLE[0]["prompt"]
SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "warmup_ratio": 0.2,
    "learning_rate": 0.01,
    "sequence_len": 128,
}
Row = Mapping[str, Any]


def next_token_probabilities(answerer: Answerer, ids: Sequence[int], route: Route) -> Any:
    """Return the distribution of the token after a prompt, [V]."""
    return answerer.answer_probabilities_KV(ids, [0], route)[0]  # whichever token comes


def of_people(*names: str) -> list[dict[str, str]]:
    """Return the records of some people."""
    return [row for row in PEOPLE if row["subject_id"] in names]


def without(rows: Iterable[Row], ids: Iterable[str]) -> list[Row]:
    gone = set(ids)
    return [row for row in rows if row["id"] not in gone]


def ids_of(rows: Iterable[Row]) -> list[str]:
    return [str(row["id"]) for row in rows]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text(to_jsonl(rows), encoding="utf-8")
    return path


SISA_BLOCK: dict[str, Any] = {
    "shards": 3,
    "slices": 2,
    "partition_key_file": "shared.key",
    "embedder": "hashing",
}


def write_run(
    folder: Path,
    base: Path | str,
    rows: Sequence[Row] = PEOPLE,
    *,
    name: str = "run.yaml",
    sisa_block: Mapping[str, Any] | None = None,
    cluster: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Write a folder with data, partition key and run file; the model will be in `folder/model`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "people.jsonl", rows)
    (folder / "shared.key").write_text(KEY)
    block = {**SISA_BLOCK, **(sisa_block or {})}
    content = {
        "base_model": str(base),
        "datasets": [{"path": "people.jsonl"}],
        "output_dir": "model",
        **SETTINGS,
        **settings,
        "sisa": {key: value for key, value in block.items() if value is not None},
        "cluster": dict(cluster or {}),
    }
    path = folder / name
    path.write_text(yaml.safe_dump(content))
    return path


def change_run(path: Path, **settings: Any) -> Path:
    """Change settings in a run file; those of the `sisa:` block are named `sisa__key`."""
    content = yaml.safe_load(path.read_text())
    for key, value in settings.items():
        block, _, inner = key.rpartition("__")
        (content[block] if block else content)[inner] = value
    path.write_text(yaml.safe_dump(content))
    return path


def train_scratch(folder: Path, base: Path, rows: Sequence[Row], **options: Any) -> sisa.Model:
    """Train a model that never held anything else."""
    model, _ = sisa.train_model(
        write_run(folder, base, rows, **options), executor="serial", allow_deleted=True
    )
    return model


@dataclass
class Tiny:
    """Hold a trained model and its run file."""

    folder: Path
    base: Path

    @property
    def directory(self) -> Path:
        return self.folder / "model"

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"

    def open(self, executor: str | OpenExecutor = "serial") -> sisa.Model:
        return sisa.open_model(self.directory, executor=executor)

    def train(self, executor: str | OpenExecutor = "serial", **options: Any) -> Taken:
        """Train the model. All models share one key, so records that another one deleted are allowed."""
        options = {"allow_deleted": True, **options}
        return sisa.train_model(self.run_file, executor=executor, **options)[1]

    def file(self, name: str, rows: Sequence[Row]) -> Path:
        return write_rows(self.folder / name, rows)


# --- what a directory holds ----------------------------------------------------------------------


def held_files(directory: Path) -> dict[str, str]:
    """Return the sha256 of every slice, index and checkpoint file; equal for equal models."""
    return {
        name: digest
        for name, digest in all_files(directory).items()
        if name.split("/")[0] in (RECORDS, INDEX, CHECKPOINTS)
    }


def all_files(directory: Path) -> dict[str, str]:
    """Return the sha256 of every file below a directory, except those that SQLite makes for readers."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm"))
    }


def adapters(directory: Path) -> list[str]:
    """Return the sha256 of every adapter file, in the order of their stages' names."""
    files = sorted((directory / CHECKPOINTS).glob("*/adapter_model.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]


def identities(directory: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of every file; both change when a file is rewritten."""
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def residue(directory: Path, needles: Iterable[str]) -> list[tuple[str, str]]:
    """Return (file, needle) for every needle found in a file's name, bytes or decoded Parquet.

    Case is ignored, and text in UTF-16 is found as well.
    """
    wanted = [each for each in needles if each]
    assert wanted, "a scan for nothing finds nothing"
    found = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        hay = name.encode().lower()
        if path.is_file():
            data = path.read_bytes()
            hay += b"\n" + data.lower()
            if data.startswith(b"PAR1"):
                rows = pq.read_table(io.BytesIO(data)).to_pylist()
                hay += b"\n" + json.dumps(rows, ensure_ascii=False).lower().encode()
        for each in wanted:
            escaped = json.dumps(each, ensure_ascii=False)[1:-1]
            forms = [each.lower().encode(), escaped.lower().encode(), each.lower().encode("utf-16-le")]
            if any(form in hay for form in forms):
                found.append((name, each))
    return found


# --- commands and executors ----------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """Hold a command's exit code, its JSON object, and what it wrote to standard error."""

    code: int
    json: dict[str, Any]
    err: str
    out: str = field(repr=False)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found

    @property
    def problems(self) -> list[tuple[str, str]]:
        return [(each["where"], each["what"]) for each in self.error["problems"]]


def command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Done:
    """Carry out `sisa ARGUMENTS --json` in this process; its output must be one JSON object."""
    capsys.readouterr()
    code = run([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    body = json.loads(out)
    assert isinstance(body, dict)
    assert ("error" in body) or code in (0, 4, 6, 7)  # a finding, out of time, still known
    return Done(code, body, err, out)


def cut_short(num_slices: int) -> OpenExecutor:
    """Return a serial executor that dies once `num_slices` slices are stored and in the ledger."""

    def open_executor(site: Site, options: Mapping[str, Any]) -> Executor:
        inner = open_serial(site, options)

        class Cutting:
            def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
                done = 0

                def until_cut(stage: SliceTrained) -> None:
                    nonlocal done
                    done += 1
                    on_stage(stage)
                    if done == num_slices:
                        raise Crash

                inner.run(chains, report, until_cut)

        return Cutting()

    return open_executor


def looking(look: Callable[[], None]) -> OpenExecutor:
    """Return a serial executor that calls `look` before it trains anything."""

    def open_executor(site: Site, options: Mapping[str, Any]) -> Executor:
        inner = open_serial(site, options)

        class Looking:
            def run(self, chains: Sequence[Chain], report: Report, on_stage: OnStage = silent) -> None:
                look()
                inner.run(chains, report, on_stage)

        return Looking()

    return open_executor
