"""Run a seeded handful of mutated inputs of every kind, and the mutations that once broke something.

The full run is `python -m tests.endurance.fuzz --inputs 10000 --out tests/endurance/fuzz.json`.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sisa.config.runfile import load_run_file
from sisa.core.errors import InvalidInput, Problem
from tests.endurance import fuzz, mutate
from tests.endurance.fuzz import Box, invoke, words

SEED, NUM_INPUTS, NUM_RUN_FILES = 3, 110, 400
MAX_RUN_FILE_S = 5.0


@pytest.mark.slow
def test_mutated_inputs_bring_no_traceback_no_hang_and_no_damage(
    results_of: Callable[..., dict[str, Any]],
) -> None:
    found = results_of(fuzz.main, inputs=NUM_INPUTS, seed=SEED)
    assert len(found["by_kind_and_exit_code"]) == 11
    assert sum(sum(each.values()) for each in found["by_kind_and_exit_code"].values()) == NUM_INPUTS


def run_file_problems(path: Path) -> Sequence[Problem]:
    try:
        load_run_file(path)
    except InvalidInput as error:
        return error.as_problems(where="")  # the error itself, where it lists none
    return ()


def test_mutated_run_files_are_read_or_refused_with_a_place(tmp_path: Path) -> None:
    """Many more than above, since reading a run file alone takes milliseconds."""
    path, whole = tmp_path / "run.yaml", tmp_path / "whole.yaml"
    (tmp_path / "people.jsonl").write_text("{}")
    whole.write_text(fuzz.RUN_FILE.replace("shared.key", "people.jsonl"))
    load_run_file(whole)
    for number in range(NUM_RUN_FILES):
        mutate.remove(path)
        shutil.copy(whole, path)
        rnd = random.Random(f"{SEED}/{number}")
        what = mutate.run_file(rnd, path)
        started = time.process_time()
        problems = run_file_problems(path)
        assert time.process_time() - started < MAX_RUN_FILE_S, (number, what)
        assert all(each.where and each.what for each in problems), (number, what)


def test_a_reading_command_leaves_an_empty_ledger_as_it_is(box: Box) -> None:
    ledger = box.model / "ledger.sqlite"
    ledger.write_bytes(b"")
    assert invoke(words(("status", "-m", "model"))).code == 4
    assert ledger.read_bytes() == b""


TRAIN = ("train", "run.yaml", "--executor", "serial")
LOST = [  # of each command one; `contract/ledger/test_damage.py` has every column and every lost row
    ("DELETE FROM records", TRAIN),
    ("UPDATE meta SET value = '0.5' WHERE key = 'base'", ("status", "-m", "model")),
    ("UPDATE records SET id_digest = 'x' || id_digest", ("where", "-m", "model", "p005-q1")),
    ("DELETE FROM slices", ("find", "-m", "model", "--subject", "p002")),
    ("DELETE FROM tombstones", ("add", "-m", "model", "people.jsonl", "--executor", "serial")),
    ("DELETE FROM requests", ("forget", "-m", "model", "p005-q1", "--executor", "serial")),
    ("DELETE FROM events WHERE position = 3", ("request list", "-m", "model")),
]


@pytest.mark.parametrize(("statement", "line"), LOST)
def test_a_ledger_that_contradicts_itself_is_an_integrity_error(
    box: Box, statement: str, line: tuple[str, ...]
) -> None:
    connection = sqlite3.connect(box.model / "ledger.sqlite")
    with connection:
        connection.execute(statement)
    connection.close()
    before = box.digest()
    done = invoke(words(line))
    assert done.code == 4, done.out + done.err
    assert box.digest() == before
