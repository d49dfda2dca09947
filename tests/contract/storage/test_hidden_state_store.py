"""Test the contract of HiddenStateStore over the fake and files on a disk and on an S3 server.

States return to the bit; a file with any defect counts as missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sisa.core.ports import HiddenStateStore, States
from sisa.store.areas import HIDDEN_STATES
from sisa.store.blobs.keyring import is_sealed
from sisa.store.hidden_states import FileHiddenStates
from tests.contract.storage.forms import FORMS, opened, stored_as
from tests.fakes.ports import FakeHiddenStates

NAME, OTHER = "shard-00000-slice-00001-5e6f.prefix", "shard-00001-slice-00001-5e6f.prefix"


def states(*lengths: int) -> dict[str, States]:
    drawn = np.random.default_rng(0)
    return {f"{n:064x}": drawn.standard_normal((n, 8), np.float32) for n in lengths}


@pytest.fixture(params=["fake", *FORMS])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> HiddenStateStore:
    return (
        FakeHiddenStates() if request.param == "fake" else stored_as(FileHiddenStates, request, tmp_path)
    )


@pytest.fixture(params=FORMS)
def real(request: pytest.FixtureRequest, tmp_path: Path) -> FileHiddenStates:
    return stored_as(FileHiddenStates, request, tmp_path)


def same(found: dict[str, Any], expected: dict[str, States]) -> bool:
    return {name: each.tobytes() for name, each in found.items()} == {
        name: each.tobytes() for name, each in expected.items()
    }


def test_states_come_back_to_the_bit(store: HiddenStateStore) -> None:
    assert store.read(NAME) == {}
    store.write(NAME, states(3, 5))
    assert same(store.read(NAME), states(3, 5))
    store.write(NAME, states(3, 5, 7))
    assert same(store.read(NAME), states(3, 5, 7))
    assert store.held() == {NAME}


def test_what_is_erased_is_gone_and_the_rest_stays(store: HiddenStateStore) -> None:
    for name in (NAME, OTHER):
        store.write(name, states(4))
    store.erase([NAME, "shard-00009-slice-00001-none.prefix"])
    assert store.held() == {OTHER}
    assert store.location(OTHER).endswith(f"{HIDDEN_STATES}/{OTHER}")
    assert store.read(NAME) == {}
    assert same(store.read(OTHER), states(4))


def test_bytes_are_counted_by_the_beginning_of_a_name(store: HiddenStateStore) -> None:
    assert store.num_bytes("shard-00000-") == 0
    for name in (NAME, OTHER):
        store.write(name, states(4))
    one, both = store.num_bytes("shard-00000-"), store.num_bytes("shard-")
    assert both == 2 * one >= 2 * 4 * 8 * 4


def test_a_damaged_file_is_as_good_as_none(real: FileHiddenStates) -> None:
    real.write(NAME, states(3, 5))
    data = real.blobs.get(NAME, "file")
    assert is_sealed(data) == real.keyring.seals
    for damaged in (b"", data[:40], data[:-1], data[:-9] + b"x" + data[-8:], b"\xff" * len(data)):
        real.blobs.put(NAME, damaged)
        assert real.read(NAME) == {}
    real.write(NAME, states(3))
    assert same(real.read(NAME), states(3))


def test_a_file_whose_key_is_gone_is_as_good_as_none(tmp_path: Path) -> None:
    store = opened(FileHiddenStates, tmp_path, "sealed")
    store.write(NAME, states(3))
    store.keyring.destroy(HIDDEN_STATES, [NAME])
    assert store.read(NAME) == {}
    store.erase([NAME])
    assert store.keyring.held(HIDDEN_STATES) == frozenset()
