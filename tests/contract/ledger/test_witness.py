"""Test the contract of Witness over the fake and a file.

Deletions accumulate, a readmitted id is removed, and the newest head counts. The file survives a torn
write, refuses changed lines, and never shrinks otherwise.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sisa.core import domain
from sisa.core.digest import Keyed, canonical_json, digest_of
from sisa.core.domain import Restrictions, Tombstone, WitnessHead
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.ports import Witness
from sisa.store.witness import TAIL_BYTES, FileWitness
from tests.fakes.ports import SECRET, FakeWitness

KEYED = Keyed(SECRET)


def tombstone(number: int) -> Tombstone:
    return Tombstone(f"{number:064x}", None, f"{number:063x}t", 1, 2, "req-1", "2026-01-01", 3)


def head(number: int) -> WitnessHead:
    return WitnessHead(f"{number:064x}", number)


@pytest.fixture(params=["fake", "file"])
def witness(request: pytest.FixtureRequest, tmp_path: Path) -> Witness:
    return FakeWitness() if request.param == "fake" else FileWitness(tmp_path / "w" / "m.jsonl", KEYED)


@pytest.fixture
def file(tmp_path: Path) -> FileWitness:
    found = FileWitness(tmp_path / "state" / "witness" / "model.jsonl", KEYED)
    for number in range(3):
        found.append(head(number), [tombstone(number)], ())
    return found


def test_a_new_witness_knows_nothing(witness: Witness) -> None:
    assert witness.head() is None
    assert witness.read() == domain.Testimony(None, {})


def test_writes_add_up(witness: Witness) -> None:
    witness.append(WitnessHead("", 0), (), ())
    assert witness.head() == WitnessHead("", 0)
    witness.append(head(1), [tombstone(1), tombstone(2)], ())
    witness.append(head(2), (), [tombstone(1).id_digest])
    witness.append(head(3), [tombstone(3)], ["never written"])
    assert witness.head() == head(3)
    expected = {each.id_digest: each for each in (tombstone(2), tombstone(3))}
    assert witness.read() == domain.Testimony(head(3), expected)
    again = replace(tombstone(2), request_id="req-2")
    witness.append(head(4), [again], ())
    assert witness.read().tombstones[again.id_digest] == again


def test_the_newest_restrictions_count(witness: Witness) -> None:
    assert witness.num_restrictions() == 0
    newest = Restrictions(2, {"b": "2026-01-02"})
    for stated in (Restrictions(1, {"a": "2026-01-01"}), newest, Restrictions(1)):
        witness.append(head(1), [tombstone(1)], (), stated)
    witness.append(head(2), (), ())
    assert witness.num_restrictions() == 2
    assert witness.read() == domain.Testimony(head(2), {tombstone(1).id_digest: tombstone(1)}, newest)


def test_a_long_torn_batch_hides_no_restriction(file: FileWitness) -> None:
    file.append(head(8), (), (), Restrictions(4, {"a": "2026-01-01"}))
    file.append(head(9), [tombstone(n) for n in range(100)], ())
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join(lines[:-1]))
    assert file.num_restrictions() == 4
    file.append(head(10), (), ())
    assert (file.num_restrictions(), file.read().restrictions.number) == (4, 4)


steps = st.lists(st.tuples(st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9))), max_size=8)


@given(steps, st.data())
def test_a_torn_write_loses_that_write_alone(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[set[int], set[int]]],
    data: st.DataObject,
) -> None:
    """After a cut anywhere in its last batch, the file holds the earlier batches and takes new ones."""
    found, fake = FileWitness(tmp_path_factory.mktemp("w") / "m.jsonl", KEYED), FakeWitness()
    closed = 0
    for number, (dead, back) in enumerate(writes):
        batch = ([tombstone(n) for n in sorted(dead)], [tombstone(n).id_digest for n in sorted(back)])
        found.append(head(number), *batch)
        size = found.path.stat().st_size
        if data.draw(st.booleans()):
            os.truncate(found.path, data.draw(st.integers(closed, size - 1)))
        else:
            closed = size
            fake.append(head(number), *batch)
        assert found.head() == fake.head()
        assert found.read() == fake.read()


def test_a_long_torn_batch_is_passed_over(file: FileWitness) -> None:
    known = file.read()
    file.append(head(9), [tombstone(n) for n in range(100)], ())
    lines = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(b"".join(lines[:-1]))
    assert file.path.stat().st_size > 2 * TAIL_BYTES
    assert file.head() == known.head
    assert file.read() == known
    file.append(head(4), (), ())
    assert file.read() == domain.Testimony(head(4), known.tombstones)


def rewritten(file: FileWitness, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the file as somebody without the key does to make it consistent after changing a line."""
    chain, lines = "", []
    for line in file.path.read_bytes().splitlines():
        body = json.loads(line)
        change(body)
        plain = {name: each for name, each in body.items() if name not in ("chain", "mac")}
        chain = digest_of([chain, plain])
        lines.append(canonical_json(body | {"chain": chain} if "chain" in body else body))
    file.path.write_bytes(b"\n".join(lines) + b"\n")


def test_a_deletion_can_not_be_dated_back_without_the_key(file: FileWitness) -> None:
    def date_back(body: dict[str, Any]) -> None:
        if "tombstone" in body:
            body["tombstone"][6] = "2001-01-01T00:00:00+00:00"

    rewritten(file, lambda _: None)
    assert file.read().head == file.head()
    rewritten(file, date_back)
    with pytest.raises(IntegrityError) as caught:
        file.read()
    assert "key" in caught.value.got
    with pytest.raises(IntegrityError):
        file.head()


def test_an_earlier_versions_witness_is_gone_on_with_under_the_key(file: FileWitness) -> None:
    whole = file.path.read_bytes()
    rewritten(file, lambda body: body.pop("mac", None))
    earlier = file.path.read_bytes()
    assert (b'"mac"' in whole, b'"mac"' in earlier) == (True, False)
    before = file.read()
    file.append(head(7), [tombstone(9)], ())
    assert file.read().head == head(7)
    assert file.read().tombstones.keys() > before.tombstones.keys()
    keyed = file.path.read_bytes()
    file.append(head(8), [], ())
    rewritten(file, lambda body: body.pop("mac", None) if body.get("num_events") == 8 else None)
    with pytest.raises(IntegrityError):
        file.read()
    file.path.write_bytes(keyed)
    assert file.head() == head(7)


@pytest.mark.parametrize("line", range(6))
def test_a_line_that_is_changed_or_missing_is_found(file: FileWitness, line: int) -> None:
    lines = file.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6
    body = json.loads(lines[line])
    if "head" in body:
        body["num_events"] += 1
    else:
        body["tombstone"][3] = 9
    without = lines[:line] + lines[line + 1 :]
    other = json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    for changed in (without, [*lines[:line], other, *lines[line + 1 :]]):
        file.path.write_bytes(b"".join(changed))
        if line == 5 and changed is without:
            assert file.read().head == head(1)  # a torn write looks the same
            continue
        with pytest.raises(IntegrityError):
            file.read()
        with pytest.raises(IntegrityError):
            file.head()


@pytest.mark.parametrize("num_deleted", [1, 100])  # in the last batch: within TAIL_BYTES, or beyond
def test_a_forged_closing_line_hides_no_deletion(file: FileWitness, num_deleted: int) -> None:
    """A restored ledger would seem current if the line named its head, with the true MAC or none."""
    for number in range(20):
        file.append(head(number), [tombstone(number)], ())
    file.append(head(20), [tombstone(20 + n) for n in range(num_deleted)], (), Restrictions(7))
    *before, last = file.path.read_bytes().splitlines(keepends=True)
    forged = json.loads(last) | {"head": head(1).link, "num_events": 1}
    older = json.loads(last) | {"restrictions": 0}
    without_mac = {name: each for name, each in forged.items() if name != "mac"}
    for body in (forged, older, without_mac):
        file.path.write_bytes(b"".join(before) + canonical_json(body) + b"\n")
        for use in (file.head, file.num_restrictions, partial(file.append, head(21), (), ())):
            with pytest.raises(IntegrityError):
                use()


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"\xff", b'{"chain": 1, "head": "", "num_events": 0}', b'{"tombstone": [1]}']
)
def test_a_line_of_another_form_is_damage(file: FileWitness, line: bytes) -> None:
    closing = b'{"chain":"","head":"","num_events":0}\n'
    file.path.write_bytes(line + b"\n" + closing)
    with pytest.raises(IntegrityError) as refused:
        file.read()
    assert "move the witness away" in refused.value.next_step


def test_only_its_owner_may_read_it(file: FileWitness) -> None:
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_a_place_that_cannot_be_written_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault):
        FileWitness(tmp_path / "file" / "m.jsonl", KEYED).append(head(1), (), ())
    (tmp_path / "folder").mkdir()
    with pytest.raises(EnvironmentFault):
        FileWitness(tmp_path / "folder", KEYED).read()
    with pytest.raises(EnvironmentFault):
        FileWitness(tmp_path / "folder", KEYED).head()


def test_a_statement_that_can_not_be_read_back_is_refused_before_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "new" / "folder" / "m.jsonl", tmp_path / "m.jsonl"):
        FileWitness(path, KEYED).check_writable()
    for path in (tmp_path / "file" / "m.jsonl", tmp_path / "file" / "folder" / "m.jsonl", tmp_path):
        with pytest.raises(EnvironmentFault) as refused:
            FileWitness(path, KEYED).check_writable()
        assert "`witness:`" in refused.value.next_step
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file"]


def test_two_writers_at_once_are_both_recorded(file: FileWitness) -> None:
    """Copies of a model share a witness."""
    other = FileWitness(file.path, KEYED)
    file.append(head(5), [tombstone(5)], ())
    other.append(head(6), [tombstone(6)], ())
    file.append(head(7), [tombstone(7)], ())
    assert {tombstone(n).id_digest for n in (5, 6, 7)} <= set(other.read().tombstones)
