"""Test a whole model whose ledger is in PostgreSQL, and the move of a ledger there and back.

Everything that works with a file works with a server. A move that is killed at any of its effects leaves
a model that opens, with its rows, and is finished or undone by the next writer; nothing of the ledger
that is not the model's stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sisa.audit.doctor import diagnose
from sisa.audit.garbage import collect_garbage
from sisa.audit.residue import sweep_model
from sisa.core.errors import Busy, ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.flows.requests import Terms
from sisa.flows.wiring import moving
from sisa.flows.wiring.ledger_place import LEDGER, LEDGER_URL, ledger_place, model_lock, open_ledger
from sisa.flows.wiring.moving import LedgerMoved, move_ledger
from sisa.model import open_model
from sisa.store.blobs import files
from sisa.store.ledger.database import ledger_version
from sisa.store.ledger.ledger import SqlLedger
from tests.contract.ledger.ledgers import answers, execute
from tests.crash import Fuse
from tests.examples import is_full
from tests.fakes.postgres_server import PostgresServer
from tests.models.confessing import (
    DELETED,
    NUM_RECORDS,
    build,
    content,
    delete,
    record,
    use_fake_resources,
)


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_resources(monkeypatch)


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.new_url()


@pytest.fixture
def directory(model: Path) -> Path:
    return model


def all_rows(directory: Path) -> dict[str, Any]:
    """Return all rows but the run file, which names the place, and the number of commits."""
    with open_ledger(directory) as ledger:
        found = answers(ledger)
        found["values"] = sorted(each for each in ledger.values() if each[0] != "meta")
        found["meta"] = {k: v for k, v in ledger.meta().items() if k not in ("config", "seq")}
    return {k: v for k, v in found.items() if k != "seq"}


def test_a_model_does_everything_with_a_ledger_on_a_server(
    tmp_path: Path, directory: Path, url: str
) -> None:
    build(tmp_path / "other")
    delete(tmp_path / "other")
    move_ledger(directory, url)
    model = open_model(directory)
    model.forget([record(DELETED).id])
    assert content(directory) == content(tmp_path / "other")
    model.submit([record(3).id], terms=Terms(external_id="T-1", approver="a person"))
    model.run()
    assert model.status().records == NUM_RECORDS - 2
    assert model.status().sizes_bytes[LEDGER_URL] > 0
    assert model.verify().ok
    assert [each.request.state for each in model.requests()] == ["completed"] * 2
    assert model.where([record(DELETED).id])[0].deleted_at
    found = sweep_model(model, ids=[record(DELETED).id])
    assert (found.residue, url in found.places) == ((), True)
    assert not collect_garbage(model, dry_run=True).items
    assert diagnose(directory).healthy


def test_sweep_searches_the_rows_of_a_server(directory: Path, url: str) -> None:
    move_ledger(directory, url)
    model = open_model(directory)
    model.submit([record(3).id], terms=Terms(external_id="T-1", reason="as Bepu Lovfag asked"))
    found = sweep_model(model, texts=["Bepu Lovfag"])
    assert [(each.kind, each.where, each.position) for each in found.residue] == [
        ("string", url, "table requests"),
        ("string", url, "table events"),
    ][: len(found.residue)]
    assert found.residue


def test_a_second_writer_is_busy_on_any_node(directory: Path, url: str) -> None:
    move_ledger(directory, url)
    with model_lock(directory):
        with pytest.raises(Busy, match="is writing to this model"):
            open_model(directory).forget([record(1).id])
        assert [each.kind for each in diagnose(directory).findings] == ["writer"]
        assert open_model(directory).where([record(1).id])  # readers don't wait


def test_people_decide_on_other_nodes_while_one_deletes(directory: Path, url: str) -> None:
    """Each thread has its own connections, as each node would; the chain of events stays one."""
    move_ledger(directory, url)

    def delete_some() -> None:
        for number in (1, 2, 3):
            open_model(directory).forget([record(number).id])

    def decide(node: int) -> None:
        model = open_model(directory)
        for number in range(3):
            name = f"T-{node}-{number}"
            model.submit([record(10 + 3 * node + number).id], terms=Terms(external_id=name))
            model.decide(name, "denied", "a reason")

    with ThreadPoolExecutor(3) as pool:
        for each in [pool.submit(delete_some), *(pool.submit(decide, node) for node in (0, 1))]:
            each.result(120)
    model = open_model(directory)
    assert Counter(each.request.state for each in model.requests()) == {"completed": 3, "denied": 6}
    assert model.verify().ok
    assert diagnose(directory).healthy


def test_a_new_head_wakes_whoever_watches(directory: Path, url: str) -> None:
    move_ledger(directory, url)
    model = open_model(directory)
    with model.watch() as wait:
        assert not wait(0.01)
        model.forget([record(1).id])
        assert wait(1.0)


def test_a_server_that_is_gone_is_said_by_doctor_and_by_commands(
    directory: Path, url: str, postgres: PostgresServer
) -> None:
    move_ledger(directory, url)
    gone = url.replace(str(postgres.folder).replace("/", "%2F"), "%2Fnowhere")
    (directory / LEDGER_URL).write_text(gone)
    with pytest.raises(EnvironmentFault):
        open_model(directory)
    (directory / LEDGER_URL).write_text("postgresql://user:secret@host/db")
    with pytest.raises(IntegrityError) as caught:
        open_model(directory)
    assert "secret" not in str(caught.value)


# --- the move


def test_a_ledger_moves_there_and_back_with_every_row(
    directory: Path, url: str, postgres: PostgresServer
) -> None:
    open_model(directory).forget([record(DELETED).id])
    before = all_rows(directory)
    moved = move_ledger(directory, url)
    assert isinstance(moved, LedgerMoved)
    assert moved.rows["records"] == 23
    assert moved.rows["tombstones"] == 1
    assert all_rows(directory) == before
    assert not list(directory.glob("ledger.sqlite*"))
    assert open_model(directory).config.ledger == url
    with pytest.raises(InvalidInput, match="there already"):
        move_ledger(directory, url)
    second = postgres.new_url()
    move_ledger(directory, second)
    assert (all_rows(directory), ledger_version(url)) == (before, 0)
    move_ledger(directory, None)
    assert (all_rows(directory), ledger_version(second)) == (before, 0)
    assert open_model(directory).config.ledger is None
    left = [each.name for each in directory.iterdir() if each.name.startswith(("ledger", "."))]
    assert left == [LEDGER]
    assert open_model(directory).verify().ok


def test_a_ledger_is_not_moved_over_another(tmp_path: Path, directory: Path, url: str) -> None:
    build(tmp_path / "other")
    move_ledger(tmp_path / "other", url)
    before = all_rows(tmp_path / "other")
    with pytest.raises(ConfigConflict, match="there is a ledger already"):
        move_ledger(directory, url)
    assert all_rows(tmp_path / "other") == before
    open_model(directory).forget([record(1).id])


def test_a_damaged_ledger_is_not_moved(directory: Path, url: str) -> None:
    execute(directory / LEDGER, "DELETE FROM heads WHERE shard = 0")
    with pytest.raises(IntegrityError, match="damaged"):
        move_ledger(directory, url)
    assert ledger_place(directory) == directory / LEDGER


def test_a_row_that_arrives_otherwise_is_noticed(
    directory: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.store.ledger import rows
    from sisa.store.ledger.tables import HEADS_TABLE

    real = rows.checked_rows

    def other(table: Any, found: Any) -> Any:
        return [(row[0] + 1, *row[1:]) for row in found] if table is HEADS_TABLE else real(table, found)

    before = all_rows(directory)
    with monkeypatch.context() as patch:
        patch.setattr(rows, "checked_rows", other)
        with pytest.raises(IntegrityError):
            move_ledger(directory, url)
    open_model(directory).forget([record(1).id])
    assert ledger_version(url) == 0
    assert all_rows(directory).keys() == before.keys()


EFFECTS = [
    (files, "write_atomic"),
    (files, "erase_all"),
    (files, "overwrite"),
    (SqlLedger, "copy"),
    (SqlLedger, "commit"),
    (SqlLedger, "scrub"),
    (moving, "erase_ledger"),
    (Path, "rename"),
]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["server", "file"])
def test_a_killed_move_is_finished_or_undone(to: str, directory: Path, postgres: PostgresServer) -> None:
    """The move is killed before and after its effects, one after another, until it runs to its end."""
    open_model(directory).forget([record(DELETED).id])
    before, number, ended = all_rows(directory), 0, False
    while not ended:
        for place in _both(directory, postgres, to):
            start, target = place
            fuse = Fuse(number // 2 + 1, after=bool(number % 2))
            with fuse.on(*EFFECTS):
                move_ledger(directory, target)
            ended = not fuse.blown
            assert all_rows(directory) == before, number
            model = open_model(directory)
            left = [each for each in diagnose(directory).findings if each.kind == "ledger_left"]
            assert bool(left) == moving.is_unfinished(directory)
            with model.locked():  # as every writer begins
                pass
            assert all_rows(directory) == before, number
            now = ledger_place(directory)
            for url in (each for each in (start, target) if isinstance(each, str)):
                assert (ledger_version(url) == 0) == (url != now), number
            held = {each.name for each in directory.iterdir()}
            assert (LEDGER in held) == isinstance(now, Path), number
            assert held.isdisjoint({moving.LEDGERS_LEFT, moving.UNFINISHED}), number
            assert model.config.ledger == (now if isinstance(now, str) else None), number
            assert model.verify().ok
        number += 1 if is_full() else 5
    assert number > 12


def _both(directory: Path, postgres: PostgresServer, to: str) -> Iterator[tuple[Path | str, str | None]]:
    """Put the ledger where the move begins, and yield that place and the target."""
    now, url = ledger_place(directory), postgres.new_url()
    if to == "server":
        if isinstance(now, str):
            move_ledger(directory, None)
        yield directory / LEDGER, url
    else:
        if isinstance(now, Path):
            move_ledger(directory, url)
        yield ledger_place(directory), None
