"""Outcomes of checks are kept under everything that they depend on, and never guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sisa.config.paths import state_dir
from sisa.core.errors import InvalidInput
from sisa.lm.base.base_checks import kept_check

OF = ("base", "fingerprint")


def finding(*outcome: bool) -> Callable[[], list[bool]]:
    return lambda: list(outcome)


def refuse() -> list[bool]:
    raise InvalidInput("the base can't be run so")


def kept_file() -> Path:
    (found,) = (state_dir() / "cache" / "checks").iterdir()
    return found


def test_an_outcome_is_found_once() -> None:
    assert kept_check("form", OF, finding(True, False)) == [True, False]
    assert kept_check("form", OF, refuse) == [True, False]


@pytest.mark.parametrize(
    ("check", "of"), [("other", OF), ("form", ("base",)), ("form", ("other", "fingerprint"))]
)
def test_an_outcome_is_not_that_of_another_base_machine_or_check(
    check: str, of: tuple[str, ...]
) -> None:
    kept_check("form", OF, finding(True))
    assert kept_check(check, of, finding(False)) == [False]


def test_what_has_no_name_or_was_refused_is_not_kept() -> None:
    assert kept_check("form", (), finding(True)) == [True]
    with pytest.raises(InvalidInput):
        kept_check("form", OF, refuse)
    assert not (state_dir() / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"[true", b"[]", b"[1]", b'{"a": true}', b"\xff"])
def test_a_damaged_file_counts_as_absent(damage: bytes) -> None:
    kept_check("form", OF, finding(True))
    kept_file().write_bytes(damage)
    assert kept_check("form", OF, finding(False)) == [False]
    assert kept_check("form", OF, refuse) == [False]


def test_a_directory_that_cannot_be_written_keeps_nothing() -> None:
    state_dir().mkdir(parents=True)
    (state_dir() / "cache").write_text("a file")
    assert kept_check("form", OF, finding(True)) == [True]
