"""A base from scratch on real parts: the same bytes here and on Ray, exact deletions, its guard."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file

import sisa
from sisa.config.runfile import load_run_file
from sisa.core.errors import InvalidInput
from sisa.core.events import silent
from sisa.data.reader import read_records
from sisa.data.samples import make_corpus
from sisa.flows.wiring.scratch_base import prepare_base
from tests.models.tiny_model import change_run, ids_of, of_people, write_rows, write_run

pytestmark = pytest.mark.torch

SMALL = {
    "corpus": [{"path": "corpus.jsonl"}],
    "vocab_size": 600,
    "layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "heads": 2,
    "context_len": 128,
    "tokens": 8_000,
    "batch_size": 8,
}


def run_file(folder: Path) -> Path:
    """Write a run file with a corpus beside it."""
    path = write_run(folder, Path("none"), sequence_len=128)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_corpus(300)))
    return change_run(path, base_model={"scratch": SMALL})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model over a base that was trained in this process."""
    folder = tmp_path_factory.mktemp("made")
    sisa.train_model(run_file(folder), executor="serial", allow_deleted=True)
    return folder


def test_a_deletion_over_it_is_exact(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    model, taken = sisa.train_model(folder / "run.yaml", executor="serial")
    assert taken.record_epochs_trained == 0
    gone = ids_of(of_people("p002"))
    model.forget(gone)
    proof = model.verify(replay="all")
    assert proof.ok
    assert all(each.equal for each in proof.shards if each.head)
    assert model.status().base_model == "scratch"


def test_what_is_in_its_corpus_is_never_taken_in(made: Path, tmp_path: Path) -> None:
    model = sisa.open_model(made / "model", executor="serial")
    before = model.status().model_digest
    text = make_corpus(300)[7]["text"]
    rows = [
        {
            "id": "new1",
            "subject_id": "new",
            "text": "Nobody has said this before, here or anywhere else.",
        }
    ]
    rows.append({"id": "new2", "text": text})
    with pytest.raises(InvalidInput, match="share their text") as caught:
        model.add(write_rows(tmp_path / "more.jsonl", rows))
    assert [each.where for each in caught.value.problems] == ["more.jsonl, line 2"]
    assert model.status().model_digest == before
    assert model.add(write_rows(tmp_path / "more.jsonl", rows[:1])).added == 1


@pytest.mark.ray
def test_on_ray_it_comes_out_the_same(made: Path, tmp_path: Path) -> None:
    config = load_run_file(run_file(tmp_path))
    prepare_base(config, read_records(config.datasets), "ray", silent)
    for name in ("model.safetensors", "tokenizer.json", "corpus.runs", "scratch.json", "config.json"):
        assert (tmp_path / "model-base" / name).read_bytes() == (made / "model-base" / name).read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        *("corpus.jsonl", "model-base", "people.jsonl", "run.yaml", "shared.key")
    ]


@pytest.mark.ray
@pytest.mark.long
def test_two_workers_share_the_batch_and_take_the_steps_of_one(tmp_path: Path) -> None:
    """Data parallel: as many steps, each of as many rows, split; one worker saves."""
    path = change_run(run_file(tmp_path), base_model={"scratch": {**SMALL, "workers": 2}})
    events: list[str] = []
    config = load_run_file(path)
    records = read_records(config.datasets)
    interrupt = signal.getsignal(signal.SIGINT)
    prepare_base(config, records, "ray", lambda event: events.append(str(event)))
    assert signal.getsignal(signal.SIGINT) is interrupt  # Ray Train leaves its own
    steps = -(-int(str(SMALL["tokens"])) // 1024)  # of 8 rows of 128 tokens
    assert any(f"step {steps} of {steps}" in each for each in events)
    saved = load_file(tmp_path / "model-base" / "model.safetensors")
    assert all(bool(each.isfinite().all()) for each in saved.values())
    made = json.loads((tmp_path / "model-base" / "scratch.json").read_text())
    assert made["recipe"]["workers"] == 2
    model, taken = sisa.train_model(path, executor="serial", allow_deleted=True)
    assert taken.added > 0
    assert model.verify(replay="none").ok


def test_a_corpus_shorter_than_a_row_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    """Before anything is trained or Ray is started."""
    path = run_file(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "Too short."}\n')
    before = sorted(each.name for each in tmp_path.iterdir())
    with pytest.raises(InvalidInput, match="shorter than one row"):
        sisa.train_model(path, executor="ray")
    assert not ray.is_initialized()
    assert sorted(each.name for each in tmp_path.iterdir()) == before


def test_a_model_that_moves_to_it_is_guarded_whole(made: Path, tmp_path: Path, tiny_base: Path) -> None:
    text = make_corpus(300)[7]["text"]
    rows = [
        {"id": "r1", "subject_id": "new", "text": "Nobody has said this before, here or anywhere else."}
    ]
    path = write_run(tmp_path, tiny_base, [*rows, {"id": "r2", "text": text}], sequence_len=128)
    model, _ = sisa.train_model(path, executor="serial")
    shutil.copy(made / "corpus.jsonl", tmp_path)
    write_rows(tmp_path / "people.jsonl", rows)  # the source no longer has r2
    block = {**SMALL, "directory": str(made / "model-base")}
    change_run(path, base_model={"scratch": block})
    with pytest.raises(InvalidInput, match="1 of 2 records share their text"):
        sisa.train_model(path, executor="serial", accept_differences=True)
    assert sisa.open_model(model.directory).status().base_model == str(tiny_base)
    model.forget(["r2"])
    moved, _ = sisa.train_model(path, executor="serial", accept_differences=True)
    assert moved.status().base_model == "scratch"
    assert moved.verify(replay="all", apart=False).ok
