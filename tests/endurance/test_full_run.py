"""Test the command of the full run: every check runs and is reported, whatever the others' outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.endurance import full_run, fuzz, kills, soak


def test_every_check_is_run_in_full() -> None:
    """The tests that run each command with a small number show that it writes its results."""
    mains = {name: (check, number) for name, check, _, number in full_run.CHECKS}
    assert mains == {
        "kills": (kills.main, 200),
        "kills_encrypted": (kills.main, 200),
        "soak": (soak.main, 500),
        "fuzz": (fuzz.main, 10_000),
    }
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name, check, (*options, last), number in full_run.CHECKS:
        command = " ".join((check.__module__, last, str(number)))
        assert command in readme or (name == "kills_encrypted" and f"`{options[0]}`" in readme)


def test_a_failure_is_reported_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run: list[str] = []

    def check(name: str, code: int) -> full_run.Check:
        def main(arguments: Sequence[str]) -> int:
            run.append(" ".join(arguments))
            return code

        return name, main, ("--number",), 10

    monkeypatch.setattr(full_run, "CHECKS", (check("one", 0), check("two", 1), check("three", 0)))
    assert full_run.main(["--out", str(tmp_path / "new"), "--share", "0.5"]) == 1
    assert run == [
        f"--number 5 --out {tmp_path / 'new' / name}.json" for name in ("one", "two", "three")
    ]
    assert "FAILED: two" in capsys.readouterr().out
