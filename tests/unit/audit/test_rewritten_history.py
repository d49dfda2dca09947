"""A history of requests that was rewritten by somebody without the key, or set back, is found.

Rewritten is a deletion's date, with all that anybody can compute: checksums, links without a key. The
witness, which would find it as well, is taken away.
"""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cluster.cli import cli
from sisa.core.digest import Keyed
from sisa.core.domain import WitnessHead
from sisa.core.errors import IntegrityError
from sisa.flows.wiring.ledger_place import LEDGER
from sisa.model import Model
from tests.fakes.ports import SECRET
from tests.models.confessing import record
from tests.models.rewriting import From, change, date_back, link_anew, take_witness_away


def opened(directory: Path) -> Model:
    return Model(directory, executor="serial")


@pytest.fixture
def directory(model: Path) -> Path:
    """Return a model with two deletions, whose witness is gone."""
    for number in (3, 5):
        opened(model).forget([record(number).id])
    take_witness_away(model)
    return model


def as_of_an_earlier_version(directory: Path) -> None:
    """Link all events without a key, under the name that an earlier version gave it."""
    with closing(sqlite3.connect(directory / LEDGER)) as connection:
        change(connection, "meta", {"key": "key"}, value=Keyed(SECRET).name)
        link_anew(connection, 1, {})
        connection.commit()


@pytest.mark.parametrize("start", ["the change on", "the first on"])
def test_a_deletion_dated_back_without_the_key_is_found(directory: Path, start: From) -> None:
    assert opened(directory).verify().ok
    take_witness_away(directory)
    date_back(directory, start)
    found = opened(directory).verify()
    assert [each.where for each in found.findings] == ["ledger"]
    assert "events" in found.findings[0].what
    with pytest.raises(IntegrityError, match="contradicts"):
        opened(directory).forget([record(7).id])


def test_a_ledger_of_an_earlier_version_goes_on_under_the_key(directory: Path) -> None:
    as_of_an_earlier_version(directory)
    assert opened(directory).verify().ok
    opened(directory).forget([record(7).id])
    assert opened(directory).verify().ok
    take_witness_away(directory)
    with closing(sqlite3.connect(directory / LEDGER)) as connection:
        ((count,),) = connection.execute("SELECT count(*) FROM events")
        link_anew(connection, count, {})  # the last alone, and after a keyed one
        connection.commit()
    assert not opened(directory).verify().ok


def anchor_of(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the head as `sisa status` prints it."""
    assert cli.run(["status", "-m", str(directory)]) == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if each.startswith("event log"))
    return line.split()[-1]


def verified(directory: Path, anchor: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.run(["verify", "-m", str(directory), "--anchor", anchor])
    shown = capsys.readouterr()
    return code, shown.out + shown.err


def test_an_anchored_head_exposes_a_history_that_was_rewritten_or_set_back(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_of_an_earlier_version(directory)  # the one ledger that can be rewritten without the key
    shutil.copytree(directory, directory.with_name("backup"))
    first = anchor_of(directory, capsys)
    opened(directory).forget([record(7).id])
    last = anchor_of(directory, capsys)
    assert first != last
    for anchor in (first, last):
        assert verified(directory, anchor, capsys)[0] == 0
    take_witness_away(directory)
    code, text = verified(directory.with_name("backup"), last, capsys)
    assert (code, "set back" in text) == (4, True)
    take_witness_away(directory.with_name("backup"))
    date_back(directory.with_name("backup"), "the first on")
    assert opened(directory.with_name("backup")).verify().ok
    code, text = verified(directory.with_name("backup"), first, capsys)
    assert (code, "rewritten" in text) == (4, True)


@pytest.mark.parametrize("anchor", ["", "3", "0:" + "a" * 64, "3:" + "A" * 64, "3:aa"])
def test_what_is_no_head_is_refused(
    directory: Path, capsys: pytest.CaptureFixture[str], anchor: str
) -> None:
    assert verified(directory, anchor, capsys)[0] == 2


def test_an_anchor_can_be_given_from_python(directory: Path) -> None:
    head = opened(directory).status().event_head
    assert opened(directory).verify(anchor=head).ok
    assert not opened(directory).verify(anchor=WitnessHead("a" * 64, head.num_events)).ok
