"""`sisa token`: made once, listed without secrets, revoked at once."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from cluster.cli.serve import ROLE_NAMES, SCOPE_NAMES
from cluster.serve.tokens import ROLES, Role, Scope, Tokens
from sisa.flows.wiring.upper_houses import TOKENS
from sisa.model import open_model
from tests.unit.commands import Ask, Sisa


def test_a_token_is_shown_once(model: Path, ask: Ask, sisa: Sisa) -> None:
    made = ask("token", "add", "-m", model, "anna", "--role", "officer", "--days", "7")
    text = made.pop("token")
    assert set(made["scopes"]) == ROLES["officer"]
    found = Tokens(model).caller(text)
    assert found is not None
    assert (found.name, found.shards) == ("anna", None)
    assert ask("token", "list", "-m", model) == {"tokens": [made]}
    printed = repr(sisa("token", "list", "-m", model, "--json"))
    assert text not in printed + (model / TOKENS).read_text()
    ended = ask("token", "revoke", "-m", model, "anna")
    assert (ended["state"], Tokens(model).caller(text)) == ("revoked", None)
    ask("token", "revoke", "-m", model, "anna", code=2)


def test_a_token_for_some_shards_is_bound_to_the_models_partition(model: Path, ask: Ask) -> None:
    made = ask("token", "add", "-m", model, "anna", "--role", "reader", "--shards", "1,0,1")
    assert made["shards"] == [0, 1]
    found = Tokens(model).caller(made["token"])
    assert found is not None
    opened = open_model(model)
    assert found.partition == opened.partition
    assert found.view(opened).requests() == []


@pytest.mark.parametrize(
    "wrong",
    [
        ["a b", "--role", "reader"],
        ["anna", "--role", "root"],
        ["anna"],
        ["anna", "--role", "reader", "--scope", "decide"],
        ["anna", "--role", "reader", "--shards", "2"],
        ["anna", "--role", "reader", "--shards", "-1"],
        ["anna", "--role", "reader", "--shards", ""],
        ["anna", "--role", "operator", "--shards", "0", "--scope", "operate"],
        ["anna", "--role", "reader", "--days", "0"],
    ],
)
def test_bad_arguments_make_no_token(model: Path, ask: Ask, wrong: list[str]) -> None:
    error = ask("token", "add", "-m", model, *wrong, code=2)
    assert error["error"]["type"] in ("UsageError", "InvalidInput")
    assert not (model / TOKENS).exists()


def test_the_command_line_knows_the_roles_and_scopes() -> None:
    assert (get_args(Role), get_args(Scope)) == (ROLE_NAMES, SCOPE_NAMES)
