"""A backup of the model directory that is brought back, at the command line and from Python.

The model is real but for its trainer; the witness rests in the state directory, which no backup of the
model holds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sisa.config.paths import state_dir
from sisa.config.runfile import parse_run_file
from sisa.core.errors import InvalidInput
from sisa.flows.wiring.ledger_place import LOCK
from sisa.store.areas import CHECKPOINTS
from sisa.store.blobs.files import writer_lock
from tests.models import confessing
from tests.models.confessing import content, record
from tests.unit.commands import Ask, Sisa

GONE = record(7).id


@pytest.fixture
def ask(model: Path, sisa: Sisa) -> Ask:
    """Run a command on the model, check its exit code, and return its JSON.

    `messages` is what it wrote to standard error.
    """

    def asked(*arguments: str | Path, code: int = 0, on: Path = model) -> dict[str, Any]:
        found, out, err = sisa(*arguments, "-m", on, "--json")
        assert found == code, (out, err)
        return {**json.loads(out), "messages": err}

    return asked


def restore(backup: Path, model: Path) -> None:
    shutil.rmtree(model)
    shutil.copytree(backup, model)


def back_up(model: Path) -> Path:
    return Path(shutil.copytree(model, model.parent / "backup"))


def witness_file() -> Path:
    (found,) = (state_dir() / "witness").iterdir()
    return found


def test_a_question_to_a_restored_backup_deletes_again_first(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    request_id = ask("forget", GONE)["request_id"]
    clean = content(model)
    restore(backup, model)
    found = ask("where", GONE)
    assert "1 records that were deleted since are deleted again" in found["messages"]
    (where,) = found["records"]
    assert (where["state"], where["request_id"]) == ("deleted", request_id)
    assert content(model).items() <= clean.items()  # erased; what is missing is trained by a writer
    assert "deleted again" not in ask("status")["messages"]
    ask("run")
    assert content(model) == clean
    shown = ask("request", "show", request_id)
    assert shown["state"] == "completed"
    states = " ".join(each["state"] for each in shown["events"])
    assert states == "received approved committed rolled_back erased retrained completed"
    assert {each["note"] for each in shown["events"][:2]} == {"replayed from the witness"}
    assert ask("status")["witness"] == {"path": str(witness_file()), "standing": "current"}


@pytest.mark.parametrize(
    "command",
    [
        *(("status",), ("verify",), ("find", "--text", "question"), ("run", "--plan")),
        *(("request", "list"), ("gc", "--dry-run"), ("sweep",), ("add", "FILE"), ("forget", "id-0001")),
    ],
)
def test_every_command_replays_first(
    model: Path, ask: Ask, tmp_path: Path, command: tuple[str, ...]
) -> None:
    backup = back_up(model)
    ask("forget", GONE)
    restore(backup, model)
    (tmp_path / "more.jsonl").write_text('{"id": "new", "subject_id": null, "text": "words"}\n')
    arguments = [str(tmp_path / "more.jsonl") if each == "FILE" else each for each in command]
    ask(*arguments)
    with confessing.context_of(model) as context:
        digest = context.settings.assigner.id_digest(GONE)
        assert type(context.stores.ledger.lookup([digest])[digest]).__name__ == "Tombstone"
        assert not any(
            row.id_digest == digest for s in range(2) for row in context.stores.ledger.rows(s)
        )


def test_a_backup_that_is_restored_elsewhere_replays_too(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    ask("forget", GONE)
    assert ask("where", GONE, on=backup)["records"][0]["state"] == "deleted"


def test_what_was_added_and_deleted_after_the_backup_stays_out(
    model: Path, ask: Ask, tmp_path: Path
) -> None:
    backup, file = back_up(model), tmp_path / "late.jsonl"
    file.write_text('{"id": "late", "subject_id": null, "text": "a text that came late"}\n')
    ask("add", file)
    request_id = ask("forget", "late")["request_id"]
    restore(backup, model)
    for text in (
        '{"id": "late", "subject_id": null, "text": "else"}',
        '{"id": "x", "subject_id": null, "text": "A text  that came LATE"}',
    ):
        file.write_text(text + "\n")
        (problem,) = ask("add", file, code=2)["error"]["problems"]
        assert request_id in problem["what"]
    ask("run")
    assert ask("request", "show", request_id)["state"] == "completed"


def test_requests_that_the_backup_lacks_are_said_to_be_lost(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    ask("request", "submit", GONE, "--external-id", "T-1")
    restore(backup, model)
    found = ask("status")
    assert "1 events are lost" in found["messages"]
    assert found["requests"] == []
    assert "lost" not in ask("status")["messages"]


def test_a_request_of_the_backup_is_carried_out_under_its_name(model: Path, ask: Ask) -> None:
    ask("request", "submit", GONE, "--external-id", "T-1", "--reason", "Art. 17")
    backup = back_up(model)
    ask("request", "hold", "T-1", "--reason", "a lawsuit")
    held = Path(shutil.copytree(model, model.parent / "held"))
    ask("request", "approve", "T-1", "--approver", "dpo")
    ask("run")
    for older in (backup, held):  # a hold that has ended does not keep what was deleted
        restore(older, model)
        ask("run")
        (request,) = ask("request", "list")["requests"]
        assert (request["external_id"], request["state"]) == ("T-1", "completed")
        assert request["reason"] == "Art. 17"


def test_the_model_that_was_not_restored_replays_nothing(model: Path, ask: Ask) -> None:
    for number in (7, 8):
        ask("forget", record(number).id)
    before = content(model), witness_file().read_bytes()
    messages = [ask("status")["messages"], ask("run")["messages"], ask("verify")["messages"]]
    assert not any("witness" in each for each in messages)
    assert (content(model), witness_file().read_bytes()) == before


def test_a_readmitted_record_is_not_deleted_again(model: Path, ask: Ask, tmp_path: Path) -> None:
    backup = back_up(model)
    ask("forget", GONE, record(8).id)
    parts = {part.role: part.text for part in record(7).parts}
    (tmp_path / "again.jsonl").write_text(json.dumps({"id": GONE, "subject_id": None, **parts}) + "\n")
    ask("add", tmp_path / "again.jsonl", "--allow-deleted")
    restore(backup, model)
    found = ask("where", GONE, record(8).id)["records"]
    assert [each["state"] == "deleted" for each in found] == [False, True]


def test_a_reader_waits_for_the_writer_that_replays(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    ask("forget", GONE)
    restore(backup, model)
    with writer_lock(model / LOCK):
        assert ask("where", GONE, code=5)["error"]["type"] == "Busy"


def test_doctor_reports_and_repairs(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    ask("forget", GONE)
    clean = content(model)
    restore(backup, model)
    stale = content(model)
    (finding,) = ask("doctor", code=4)["findings"]
    assert (finding["kind"], finding["severity"], finding["where"]) == (
        "behind", "error", str(witness_file())
    )  # fmt: skip
    assert content(model) == stale
    ask("doctor", "--repair")
    assert content(model) == clean
    assert ask("doctor")["healthy"]


@pytest.mark.slow
def test_a_restored_backup_with_a_damaged_checkpoint_is_repaired(model: Path, ask: Ask) -> None:
    """A replay builds on it, and a repair trains: what was deleted must be gone before that."""
    backup = back_up(model)
    ask("forget", GONE)
    clean = content(model)
    for name in sorted(each.name for each in (backup / CHECKPOINTS).iterdir()):
        restore(backup, model)
        (model / CHECKPOINTS / name / "manifest.json").unlink()
        ask("doctor", "--repair")
        assert content(model) == clean
        assert ask("where", GONE)["records"][0]["state"] == "deleted"
        assert ask("doctor")["healthy"]


def test_a_damaged_witness_stops_every_command(model: Path, ask: Ask) -> None:
    backup = back_up(model)
    ask("forget", GONE)
    restore(backup, model)
    data = witness_file().read_bytes()
    witness_file().write_bytes(data.replace(b'"tombstone":["', b'"tombstone":["0', 1))
    stale = content(model)
    for command in (("status",), ("run",), ("where", GONE)):
        assert ask(*command, code=4)["error"]["where"] == str(witness_file())
    (finding,) = ask("doctor", code=4)["findings"]
    assert finding["kind"] == "witness"
    assert content(model) == stale


def test_a_lost_witness_is_begun_anew(ask: Ask) -> None:
    """With all that the ledger knows, so that the next backup is watched again."""
    ask("forget", GONE)
    before = witness_file().read_bytes()
    witness_file().unlink()
    assert ask("status")["witness"]["standing"] == "absent"
    ask("run")
    assert ask("status")["witness"]["standing"] == "current"
    assert witness_file().read_bytes().count(b"tombstone") == before.count(b"tombstone") == 1


def test_the_witness_may_rest_where_the_run_file_says(tmp_path: Path) -> None:
    text = "datasets: [{path: owner/people}]\noutput_dir: /model\nwitness: /model/inside\n"
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InvalidInput) as refused:
        opening_of(tmp_path / "run.yaml")
    (problem,) = refused.value.problems
    assert (problem.where, problem.what) == (
        "line 3: witness",
        "conflict: the witness is inside output_dir",
    )
    (tmp_path / "run.yaml").write_text(text.replace("/model/inside", "kept/witness"))
    assert opening_of(tmp_path / "run.yaml").witness == tmp_path / "kept" / "witness"
    parse_run_file(text.replace("/model/inside", "null"), "run.yaml")


def opening_of(path: Path) -> Any:
    import sisa

    return sisa.load_run_file(path)


def test_the_state_directory_is_the_users() -> None:
    code = "from sisa.config.paths import state_dir; print(state_dir())"
    for variables, expected in (
        ({"HOME": "/h"}, "/h/.local/state/sisa"),
        ({"HOME": "/h", "XDG_STATE_HOME": "/s"}, "/s/sisa"),
        ({"HOME": "/h", "XDG_STATE_HOME": "relative"}, "/h/.local/state/sisa"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
