"""A model that stays open while other processes reconfigure it follows the ledger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sisa import train as training
from sisa.config.config import RunConfig, ScratchBase
from sisa.config.runfile import parse_run_file
from sisa.core.digest import Keyed
from sisa.core.errors import ConfigConflict
from sisa.core.events import Event, Notice
from sisa.core.ports import Change
from sisa.model import Model
from sisa.store.blobs.keyring import is_sealed
from sisa.train import train_model
from tests.fakes.ports import fake_record
from tests.models.confessing import RUN_FILE, content, use_fake_resources

NUM_RECORDS = 24


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    rows = [
        {
            "id": f"id-{number:04d}",
            "subject_id": f"subject-{number}",
            "prompt": f"question {number}",
            "completion": f"answer {number}",
        }
        for number in range(NUM_RECORDS)
    ]
    data = tmp_path / "people.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    text = RUN_FILE.replace("owner/people", str(data)).replace(
        "output_dir: model", f"output_dir: {tmp_path}/model"
    )
    return parse_run_file(text, "run.yaml")


def changed(config: RunConfig, **values: Any) -> RunConfig:
    return config.model_copy(update=values)


def moved(config: RunConfig, **values: Any) -> None:
    """Do what `sisa train RUN.yaml --reconfigure` does in another process."""
    train_model(changed(config, **values), executor="serial", accept_differences=True)


def is_whole(config: RunConfig) -> bool:
    """Return whether a newly opened model is as the ledger's run file says."""
    model = Model(config.output_dir, executor="serial")
    converged = all(shard.converged for shard in model.status().shards)
    return converged and model.config == config and model.verify().ok


def is_announced(events: list[Event]) -> bool:
    return any(isinstance(each, Notice) and "reconfigured" in each.text for each in events)


@pytest.mark.parametrize("values", [{"learning_rate": 0.5}, {"seed": 7}], ids=str)
def test_a_deletion_of_a_model_that_stayed_open_trains_by_the_present_run_file(
    config: RunConfig, values: dict[str, Any]
) -> None:
    events: list[Event] = []
    model, _ = train_model(config, executor="serial", report=events.append)
    moved(config, **values)
    outcome = model.forget(["id-0003"])
    assert outcome.request is not None
    assert outcome.request.state == "completed"
    assert is_whole(changed(config, **values))
    assert is_announced(events)


def test_a_model_that_stayed_open_follows_another_partition(config: RunConfig) -> None:
    model, _ = train_model(config, executor="serial")
    block = config.sisa.model_copy(update={"shards": 3, "slices": 2, "names": False})
    moved(config, sisa=block)
    assert model.find(text="question 5\nanswer 5")[0].id == "id-0005"
    model.forget(["id-0005"])
    model.add([fake_record(99)])
    assert is_whole(changed(config, sisa=block))


def test_a_model_that_stayed_open_writes_nothing_plain_once_it_is_encrypted(config: RunConfig) -> None:
    model, _ = train_model(config, executor="serial")
    moved(config, encrypt=True)
    model.forget(["id-0003"])
    held = content(config.output_dir)
    assert held != {}
    assert [name for name, data in held.items() if not is_sealed(data)] == []
    assert is_whole(changed(config, encrypt=True))


def before_the_lock(monkeypatch: pytest.MonkeyPatch, another: Callable[[], None]) -> None:
    """Let another process come after a run file was compared, and before the lock is taken."""
    check_move = training._check_move

    def meanwhile(*given: Any, **options: Any) -> None:
        check_move(*given, **options)
        monkeypatch.setattr(training, "_check_move", check_move)
        another()

    monkeypatch.setattr(training, "_check_move", meanwhile)


def test_two_reconfigurations_at_once_leave_one_run_file_and_its_heads(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model(config, executor="serial")
    before_the_lock(monkeypatch, lambda: moved(config, seed=1))
    moved(config, seed=2)
    assert is_whole(changed(config, seed=2))


def test_a_run_file_that_another_process_changed_meanwhile_is_compared_again(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model(config, executor="serial")
    before_the_lock(monkeypatch, lambda: moved(config, seed=1))
    with pytest.raises(ConfigConflict, match="differs"):
        train_model(config, executor="serial")
    assert is_whole(changed(config, seed=1))


def test_another_model_in_the_directory_is_refused(config: RunConfig, tmp_path: Path) -> None:
    model, _ = train_model(config, executor="serial")
    other, _ = train_model(changed(config, output_dir=tmp_path / "other"), executor="serial")
    assert Keyed(model.secret).name != Keyed(other.secret).name
    shutil.rmtree(config.output_dir)
    shutil.copytree(other.directory, config.output_dir)
    before = content(config.output_dir)
    with pytest.raises(ConfigConflict, match="another model"):
        model.forget(["id-0003"])
    with pytest.raises(ConfigConflict, match="another model"):
        model.status()
    assert content(config.output_dir) == before


def test_a_commit_that_changes_no_setting_is_no_reconfiguration(config: RunConfig) -> None:
    events: list[Event] = []
    model, _ = train_model(config, executor="serial", report=events.append)
    resources = model.resources
    with model.writing() as context:
        context.stores.ledger.commit(Change(meta={"note": "of another kind"}))
    assert model.where(["id-0001"])[0].state == "trained"
    assert model.resources is resources  # what is loaded stays loaded
    assert not is_announced(events)


def test_no_base_is_trained_for_a_move_that_is_refused(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model(config, executor="serial")
    monkeypatch.setattr(training, "prepare_base", lambda *_: pytest.fail("a base is trained"))
    scratch = ScratchBase.model_validate({"scratch": {"corpus": [{"path": "corpus.jsonl"}]}})
    with pytest.raises(ConfigConflict, match="names the subject can't change"):
        moved(config, base_model=scratch, sisa=config.sisa.model_copy(update={"group_by": None}))
