"""`sisa ledger`: a move to a real PostgreSQL and back, an upgrade, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sisa.flows.wiring.ledger_place import LEDGER
from tests.contract.ledger.ledgers import back_to_version_4
from tests.fakes.postgres_server import PostgresServer
from tests.models.confessing import NUM_RECORDS, record
from tests.unit.commands import Ask, Sisa


def test_a_year_old_model_moves_by_one_command_and_back(
    model: Path, ask: Ask, postgres: PostgresServer
) -> None:
    url = postgres.new_url()
    back_to_version_4(model / LEDGER)
    moved = ask("ledger", "move", "-m", model, "--to", url)
    assert (moved["before"], moved["now"]) == (str(model / LEDGER), url)
    assert (moved["rows"]["records"], moved["seq"] > 0) == (NUM_RECORDS, True)
    assert ask("status", "-m", model)["records"] == NUM_RECORDS
    ask("forget", "-m", model, record(7).id)
    refused = ask("ledger", "move", "-m", model, "--to", url, code=2)
    assert refused["error"]["message"] == "the ledger is there already"
    moved = ask("ledger", "move", "-m", model, "--to", "file")
    assert moved["rows"]["tombstones"] == 1
    ask("where", "-m", model, record(7).id)
    assert ask("status", "-m", model)["deleted_records"] == 1


def test_a_deletion_is_certified_with_a_ledger_on_a_server(
    model: Path, ask: Ask, postgres: PostgresServer
) -> None:
    ask("ledger", "move", "-m", model, "--to", postgres.new_url())
    ask("keys", "init", "-m", model)
    ask("forget", "-m", model, record(7).id)
    found = ask("certificate", "list", "-m", model)
    assert found["pending"] == []
    kinds = [each["kind"].split(":")[2] for each in found["statements"]]
    assert kinds == ["state", "exact-deletion"]


def test_a_ledger_is_brought_up(model: Path, ask: Ask) -> None:
    expected = {"ledger": str(model / LEDGER), "upgraded": False}
    assert ask("ledger", "upgrade", "-m", model) == expected
    back_to_version_4(model / LEDGER)
    assert ask("ledger", "upgrade", "-m", model) == {**expected, "upgraded": True}
    assert ask("doctor", "-m", model)["healthy"]


@pytest.mark.parametrize(
    ("to", "code", "kind"),
    [
        ("postgresql://sisa:hunter2@db/models", 2, "InvalidInput"),
        ("sqlite:///hunter2", 2, "InvalidInput"),
        ("postgresql://sisa@/models?host=%2Fnowhere", 6, "EnvironmentFault"),
    ],
)
def test_a_place_that_can_not_be_used_is_refused(
    model: Path, ask: Ask, sisa: Sisa, to: str, code: int, kind: str
) -> None:
    before = (model / LEDGER).read_bytes()
    move = ("ledger", "move", "-m", model, "--to", to)
    assert ask(*move, code=code)["error"]["type"] == kind
    assert "hunter2" not in repr(sisa(*move, "--json"))
    assert (model / LEDGER).read_bytes() == before
    assert ask("doctor", "-m", model)["healthy"]


def test_no_model_has_no_ledger(tmp_path: Path, ask: Ask) -> None:
    for arguments in (("move", "--to", "file"), ("upgrade",)):
        refused = ask("ledger", arguments[0], "-m", tmp_path, *arguments[1:], code=2)
        assert refused["error"]["message"] == "there is no model in this directory"


def test_a_folder_above_a_model_is_refused_with_the_name_of_the_model(model: Path, ask: Ask) -> None:
    for command in ("status", "doctor"):
        error = ask(command, "-m", model.parent, code=2)["error"]
        assert error["next_step"].endswith(f": {model}")
