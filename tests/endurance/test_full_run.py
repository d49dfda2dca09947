"""The command of the full run, at a small share: every check is run, told, and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.endurance import full_run


@pytest.mark.slow
def test_every_check_is_run_and_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert full_run.main(["--out", str(tmp_path), "--share", "0.005"]) == 0
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert found.keys() == {name for name, *_ in full_run.CHECKS}
    assert all("source_sha256" in each for each in found.values())
    said = capfd.readouterr().out
    assert "all held" in said
    assert "state left behind" in said


def test_a_failure_is_told_and_the_rest_is_run(
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
