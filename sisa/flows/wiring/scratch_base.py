"""Train a base from scratch, once, on a corpus without deletable records.

    corpus + recipe -> tokenizer, weights -> DIR (a base as any other) with
        scratch.json   its origin: recipe, digests of corpus and runs, numerics fingerprint
        corpus.runs    hashes of the corpus's runs of words, for the guard

Then everything personal is in adapters, and a deletion leaves nothing behind in the base. The guard
refuses records that share their wording with the corpus, before the base is trained and at every later
`add` (`overlap.py`). A directory that holds the base of the same recipe is used as it is, wherever it
was made, since its digest identifies a base. An interrupted training starts from the beginning.

    prepare_base(config, records, "ray", report)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.config.config import PATH_FIELDS, RunConfig
from sisa.core.digest import canonical_json, digest_of, sha256_hex
from sisa.core.domain import Record
from sisa.core.errors import Busy, ConfigConflict, IntegrityError, InvalidInput
from sisa.core.events import Notice, Report
from sisa.data.overlap import check_overlap, runs_of
from sisa.data.reader import read_texts
from sisa.flows.wiring import upper_houses
from sisa.flows.wiring.executors import OnCluster, OpenExecutor
from sisa.lm.base.numerics import fingerprint
from sisa.store.blobs import files

if TYPE_CHECKING:
    from sisa.data.overlap import WordRuns

RECIPE_FILE, RUNS_FILE = "scratch.json", "corpus.runs"
BASE_MODE = 0o644  # a base holds nothing deletable, and users may share it


@dataclass(frozen=True)
class BaseJob:
    """Describe a base to train: its recipe, the file of its rows, the directory with its tokenizer."""

    recipe: Mapping[str, Any]
    rows: Path
    target: Path


TrainBase = Callable[[BaseJob, Mapping[str, Any], Report], None]  # with the run file's `cluster:`


def prepare_base(
    config: RunConfig, records: Sequence[Record], executor: str | OpenExecutor, report: Report
) -> None:
    """Train a run file's base if it is missing. Raise InvalidInput, ConfigConflict, IntegrityError."""
    if isinstance(config.base_model, str):
        return
    scratch, directory = config.base_model.scratch, Path(config.base)
    texts = read_texts(scratch.corpus, config.limits)
    block = scratch.model_dump(mode="json", exclude=set(PATH_FIELDS))
    recipe = {**block, "corpus": digest_of(list(texts))}  # all that its bits depend on but the numerics
    if (directory / RECIPE_FILE).is_file():
        held = _read_description(directory)
        _check_same_recipe(held["recipe"], recipe, directory)
        check_overlap(records, _read_runs(directory, held))
        return
    if directory.exists():
        raise ConfigConflict(
            "the directory for the base holds something else",
            where=str(directory),
            expected=f"no such directory, or one with {RECIPE_FILE}",
            next_step="name another by `base_model.scratch.directory`",
        )
    runs = runs_of(*texts)
    check_overlap(records, runs)
    report(Notice(f"training the base on {len(texts)} texts, {scratch.tokens:,} tokens"))
    _train_base(config, recipe, texts, runs, directory, executor, report)


def guard(config: RunConfig, records: Sequence[Record]) -> None:
    """Raise InvalidInput for records that share their text with the corpus of the base."""
    if not isinstance(config.base_model, str):
        directory = Path(config.base)
        check_overlap(records, _read_runs(directory, _read_description(directory)))


def _train_base(
    config: RunConfig,
    recipe: Mapping[str, Any],
    texts: Sequence[str],
    runs: WordRuns,
    directory: Path,
    executor: str | OpenExecutor,
    report: Report,
) -> None:
    train = find_base_trainer(executor)
    with _alone(directory) as unfinished:
        if directory.exists():
            what = "another process has just made this base"
            raise Busy(what, where=str(directory), next_step="try again")
        target = unfinished / "base"
        job = BaseJob(recipe, unfinished / "rows.npy", target)
        with files.disk_errors(directory):
            target.mkdir(parents=True)
            _write_rows(job, texts, report)
        train(job, config.cluster.model_dump(mode="json"), report)
        data = runs.astype("<u8").tobytes()
        made = {"recipe": recipe, "runs": sha256_hex(data)}
        made["fingerprint"] = fingerprint(recipe["threads"])
        with files.disk_errors(directory):
            files.write_atomic(target / RUNS_FILE, data, BASE_MODE)
            files.write_atomic(target / RECIPE_FILE, canonical_json(made), BASE_MODE)
            os.replace(target, directory)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """Hold a lock and a directory for unfinished work; remove both at the end. Raise Busy."""
    lock = directory.with_name(f".{directory.name}.lock")
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    with files.disk_errors(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with files.writer_lock(lock):
        try:
            shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
            yield unfinished
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
            lock.unlink(missing_ok=True)


def find_base_trainer(executor: str | OpenExecutor) -> TrainBase:
    """Return what trains a base where an executor trains shards. Raise InvalidInput if unknown."""
    if isinstance(executor, OnCluster):
        train, there = find_base_trainer(executor.name), {"address": executor.address}
        return lambda job, cluster, report: train(job, {**cluster, **there}, report)
    if executor == "serial" or not isinstance(executor, str):
        return train_here
    if executor not in upper_houses.BASE_TRAINERS:
        raise InvalidInput(
            "no executor of this name trains a base",
            expected=" or ".join(["serial", *upper_houses.BASE_TRAINERS]),
            got=executor,
            next_step="name another executor",
        )
    found: TrainBase = upper_houses.load(upper_houses.BASE_TRAINERS[executor])
    return found


def _write_rows(job: BaseJob, texts: Sequence[str], report: Report) -> None:
    from sisa.lm.base.scratch_base import write_rows

    write_rows(job.recipe, texts, job.target, job.rows, lambda text: report(Notice(text)))


def train_here(job: BaseJob, _cluster: Mapping[str, Any], report: Report) -> None:
    from sisa.lm.base.scratch_base import train_base

    if job.recipe["workers"] != 1:
        raise InvalidInput(
            "the serial executor trains a base with one worker",
            where="base_model.scratch.workers",
            expected="1 with `--executor serial`",
            got=str(job.recipe["workers"]),
            next_step="train with `--executor ray`",
        )
    train_base(job.recipe, job.rows, job.target, lambda text: report(Notice(text)))


def _read_description(directory: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((directory / RECIPE_FILE).read_bytes())
        if isinstance(found["recipe"], dict) and isinstance(found["runs"], str):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise IntegrityError(
        "the description of the base can't be read",
        where=str(directory / RECIPE_FILE),
        next_step="restore the base's directory from a backup",
    )


def _read_runs(directory: Path, held: Mapping[str, Any]) -> WordRuns:
    import numpy as np

    path, what = directory / RUNS_FILE, "runs of the corpus"
    data = files.verified(files.read_whole(path, what), held["runs"], what, str(path))
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def _check_same_recipe(held: Mapping[str, Any], wanted: Mapping[str, Any], directory: Path) -> None:
    changed = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    if changed:
        raise ConfigConflict(
            "the base in this directory was made from another corpus or with other settings",
            where=str(directory),
            expected="the same corpus and settings",
            got=f"other: {', '.join(changed)}",
            next_step="restore them, or name another `base_model.scratch.directory` for another base",
        )
