"""`sisa ledger`: a move to a real PostgreSQL and back, an upgrade, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sisa.flows.wiring import wiring
from tests.contract.test_ledger import back_to_version_4
from tests.fakes.postgres_server import PostgresServer
from tests.models.confessing import NUM_RECORDS, record

Ask = Callable[..., tuple[int, dict[str, Any], str]]


def test_a_year_old_model_moves_by_one_command_and_back(
    model: Path, ask: Ask, postgres: PostgresServer
) -> None:
    url = postgres.new_url()
    back_to_version_4(model / wiring.LEDGER)
    code, moved, _ = ask("ledger", "move", "-m", model, "--to", url)
    assert (code, moved["before"], moved["now"]) == (0, str(model / wiring.LEDGER), url)
    assert (moved["rows"]["records"], moved["seq"] > 0) == (NUM_RECORDS, True)
    assert ask("status", "-m", model)[1]["records"] == NUM_RECORDS
    assert ask("forget", "-m", model, record(7).id)[0] == 0
    code, refused, _ = ask("ledger", "move", "-m", model, "--to", url)
    assert (code, refused["error"]["message"]) == (2, "the ledger is there already")
    code, moved, _ = ask("ledger", "move", "-m", model, "--to", "file")
    assert (code, moved["rows"]["tombstones"]) == (0, 1)
    assert ask("where", "-m", model, record(7).id)[0] == 0
    assert ask("status", "-m", model)[1]["deleted_records"] == 1


def test_a_deletion_is_certified_with_a_ledger_on_a_server(
    model: Path, ask: Ask, postgres: PostgresServer
) -> None:
    assert ask("ledger", "move", "-m", model, "--to", postgres.new_url())[0] == 0
    assert ask("keys", "init", "-m", model)[0] == 0
    assert ask("forget", "-m", model, record(7).id)[0] == 0
    _, found, _ = ask("certificate", "list", "-m", model)
    assert found["pending"] == []
    kinds = [each["kind"].split(":")[2] for each in found["statements"]]
    assert kinds == ["state", "exact-deletion"]


def test_a_ledger_is_brought_up(model: Path, ask: Ask) -> None:
    expected = {"ledger": str(model / wiring.LEDGER), "upgraded": False}
    assert ask("ledger", "upgrade", "-m", model)[:2] == (0, expected)
    back_to_version_4(model / wiring.LEDGER)
    assert ask("ledger", "upgrade", "-m", model)[:2] == (0, {**expected, "upgraded": True})
    assert ask("doctor", "-m", model)[1]["healthy"]


@pytest.mark.parametrize(
    ("to", "code", "kind"),
    [
        ("postgresql://sisa:hunter2@db/models", 2, "InvalidInput"),
        ("sqlite:///hunter2", 2, "InvalidInput"),
        ("postgresql://sisa@/models?host=%2Fnowhere", 6, "EnvironmentFault"),
    ],
)
def test_a_place_that_can_not_be_used_is_refused(
    model: Path, ask: Ask, to: str, code: int, kind: str
) -> None:
    before = (model / wiring.LEDGER).read_bytes()
    found, refused, text = ask("ledger", "move", "-m", model, "--to", to)
    assert (found, refused["error"]["type"]) == (code, kind)
    assert "hunter2" not in f"{refused}{text}"
    assert (model / wiring.LEDGER).read_bytes() == before
    assert ask("doctor", "-m", model)[1]["healthy"]


def test_no_model_has_no_ledger(tmp_path: Path, ask: Ask) -> None:
    for arguments in (("move", "--to", "file"), ("upgrade",)):
        code, refused, _ = ask("ledger", arguments[0], "-m", tmp_path, *arguments[1:])
        assert (code, refused["error"]["message"]) == (2, "there is no model in this directory")
