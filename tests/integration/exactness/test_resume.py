"""Interrupted training, and run files and bases that changed under a model.

A killed training continues at the last stored slice and ends with the same bytes. A changed run file
ends in the model of the new file. A base that differs from the record stops every command that uses it.
`tests/property` has crashes at every effect, and `unit/flows/test_training.py` what `train` counts and
refuses.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import sisa
from tests.crash import Crash
from tests.models.programs.forked import run_forked
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    all_files,
    change_run,
    command,
    cut_short,
    held_files,
    identities,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

NUM_STAGES = 6
KILLED = (
    "import os, signal, sys, sisa\n"
    "from sisa.core.events import SliceProgress\n"
    "places = []\n"
    "def report(event):\n"
    "    if isinstance(event, SliceProgress):\n"
    "        places.append((event.shard, event.slice))\n"
    "        if len(set(places)) == 3 and event.tokens < event.total_tokens:\n"
    "            os.kill(os.getpid(), signal.SIGKILL)\n"
    "sisa.train_model(sys.argv[1], executor='serial', report=report)\n"
)


def scratch_of(tmp_path: Path, base: Path, **options: Any) -> dict[str, str]:
    return held_files(train_scratch(tmp_path / "scratch", base, PEOPLE, **options).directory)


# --- cut short -----------------------------------------------------------------------------------


def test_a_first_training_goes_on_after_sigkill_in_the_middle_of_a_slice(
    tmp_path: Path, tiny_base: Path, tiny: Tiny
) -> None:
    killed = Tiny(tmp_path / "killed", tiny_base)
    run_file = write_run(killed.folder, tiny_base)
    assert run_forked(KILLED, run_file) == -signal.SIGKILL
    assert len(os.listdir(killed.directory / "checkpoints")) == 2
    assert killed.train().slices_trained == NUM_STAGES - 2
    assert held_files(killed.directory) == held_files(tiny.directory)


# --- again ---------------------------------------------------------------------------------------


def test_training_again_trains_nothing_and_rewrites_nothing(tiny: Tiny) -> None:
    before = identities(tiny.directory / "checkpoints"), all_files(tiny.directory)
    taken = tiny.train()
    assert (taken.slices_trained, taken.record_epochs_trained, taken.added) == (0, 0, 0)
    assert (identities(tiny.directory / "checkpoints"), all_files(tiny.directory)) == before


# --- a changed run file --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_epochs": 1, "lora_dropout": 0.0, "weight_decay": 0.1},
        {"sisa__shards": 4, "sisa__slices": 3, "learning_rate": 0.02},
    ],
    ids=lambda change: "+".join(change),
)
def test_reconfigure_moves_to_the_model_of_the_new_run_file(
    tmp_path: Path, tiny_base: Path, tiny: Tiny, change: dict[str, Any]
) -> None:
    tiny.open().forget(["p007-q1"])
    change_run(tiny.run_file, **change)
    taken = tiny.train(accept_differences=True)
    assert taken.slices_trained > 0
    assert (taken.deleted_not_taken, taken.records) == (1, len(PEOPLE) - 1)

    scratch = Tiny(tmp_path / "scratch", tiny_base)
    change_run(write_run(scratch.folder, tiny_base, without(PEOPLE, ["p007-q1"])), **change)
    scratch.train()
    assert held_files(tiny.directory) == held_files(scratch.directory)
    assert tiny.train().slices_trained == 0
    assert tiny.open().verify().ok


def test_a_reconfiguration_that_was_cut_goes_on(tmp_path: Path, tiny_base: Path, tiny: Tiny) -> None:
    change_run(tiny.run_file, learning_rate=0.02)
    with pytest.raises(Crash):
        tiny.train(cut_short(2), accept_differences=True)
    assert all(each.head for each in tiny.open().status().shards)  # older heads serve meanwhile
    assert tiny.train().slices_trained == NUM_STAGES - 2
    assert held_files(tiny.directory) == scratch_of(tmp_path, tiny_base, learning_rate=0.02)


def test_a_change_that_reaches_no_bit_needs_no_leave(tiny: Tiny) -> None:
    before = identities(tiny.directory / "checkpoints")
    change_run(tiny.run_file, cluster__num_workers=2, sisa__aggregation="mean_prob")
    assert tiny.train().slices_trained == 0
    assert identities(tiny.directory / "checkpoints") == before
    assert tiny.open().config.sisa.aggregation.method == "mean_prob"


def test_a_refused_reconfiguration_changes_nothing(tiny: Tiny) -> None:
    """The held records no longer fit: neither the index nor the stored run file may move before that."""
    change_run(tiny.run_file, sequence_len=16, sisa__embedder=str(tiny.base))
    before = all_files(tiny.directory)
    with pytest.raises(sisa.InvalidInput):
        tiny.train(accept_differences=True)
    assert all_files(tiny.directory) == before


# --- a changed base ------------------------------------------------------------------------------


@pytest.fixture
def rebased(tmp_path: Path, tiny_base: Path) -> Tiny:
    """Return a model whose base directory has other weights by now."""
    from safetensors.torch import load_file, save_file

    base = tmp_path / "own-base"
    shutil.copytree(tiny_base, base)
    model = Tiny(tmp_path / "rebased", base)
    write_run(model.folder, base)
    model.train()
    weights = base / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, base / "new", metadata={"format": "pt"})
    os.replace(base / "new", weights)
    return model


def test_a_changed_base_stops_every_command(rebased: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = [{**row, "id": f"{row['id']}-new"} for row in of_people("p002")]
    source = rebased.file("new.jsonl", fresh)
    at, serial = ["-m", rebased.directory], ["--executor", "serial"]
    arguments: dict[str, list[Any]] = {
        "train": [rebased.run_file, *serial],
        "add": [*at, source, *serial],
        "forget": [*at, "p001-q1", *serial],
        "verify": [*at, "--replay", "all", *serial],
        "generate": [*at, "--prompt", "Where?"],
    }
    before = all_files(rebased.directory)
    for what, given in arguments.items():
        done = command(capsys, what, *given)
        assert (done.code, done.error["type"]) == (4, "IntegrityError"), what
        assert done.error["expected"] != done.error["got"]
        assert "--reconfigure" in done.error["next_step"]
        assert all_files(rebased.directory) == before
        assert not (rebased.directory / "scratch").exists()


def test_a_restored_base_goes_on(rebased: Tiny, tiny_base: Path) -> None:
    shutil.copy(tiny_base / "model.safetensors", rebased.base / "restored")
    os.replace(rebased.base / "restored", rebased.base / "model.safetensors")
    assert rebased.train().slices_trained == 0
    assert rebased.open().verify(replay="all", apart=False).ok


def test_reconfigure_moves_to_the_changed_base(rebased: Tiny, tmp_path: Path) -> None:
    """As the message of a changed base advises."""
    rebased.train(accept_differences=True)
    scratch = train_scratch(tmp_path / "scratch", rebased.base, PEOPLE)
    assert held_files(rebased.directory) == held_files(scratch.directory)
    assert rebased.open().verify().ok
