"""A model that is trained with a ledger in a real PostgreSQL has the bytes of one with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sisa.core.errors import ConfigConflict, EnvironmentFault, InvalidInput
from sisa.flows.wiring.ledger_place import LEDGER, LEDGER_URL
from tests.fakes.postgres_server import PostgresServer
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    change_run,
    held_files,
    ids_of,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

GONE = ids_of(of_people("p004"))


def test_a_model_on_a_server_has_the_bytes_of_one_with_a_file(
    tmp_path: Path, tiny_base: Path, postgres: PostgresServer
) -> None:
    url = postgres.new_url()
    tiny = Tiny(write_run(tmp_path / "tiny", tiny_base, ledger=url).parent, tiny_base)
    tiny.train()
    model = tiny.open()
    model.forget(GONE)
    remaining = train_scratch(tmp_path / "scratch", tiny_base, without(PEOPLE, GONE))
    assert held_files(tiny.directory) == held_files(remaining.directory)
    assert not (tiny.directory / LEDGER).exists()
    assert model.verify(replay="all", apart=False).ok
    assert tiny.train().slices_trained == 0

    second = Tiny(write_run(tmp_path / "second", tiny_base, ledger=url).parent, tiny_base)
    with pytest.raises(ConfigConflict, match="there is a ledger already"):
        second.train()
    assert not (second.directory / LEDGER_URL).exists()
    change_run(tiny.run_file, ledger=postgres.new_url())
    with pytest.raises(ConfigConflict) as caught:
        tiny.train(accept_differences=True)
    assert "sisa ledger move" in caught.value.next_step
    assert model.where(GONE)


def test_nothing_is_written_before_the_server_is_reached(tmp_path: Path, tiny_base: Path) -> None:
    away = "postgresql://sisa@/models?host=%2Fnowhere"
    tiny = Tiny(write_run(tmp_path / "tiny", tiny_base, ledger=away).parent, tiny_base)
    with pytest.raises(EnvironmentFault, match="can't be used"):
        tiny.train()
    assert not tiny.directory.exists()
    change_run(tiny.run_file, ledger="postgresql://sisa:hunter2@db/models")
    with pytest.raises(InvalidInput) as caught:
        tiny.train()
    assert "hunter2" not in str(caught.value)
