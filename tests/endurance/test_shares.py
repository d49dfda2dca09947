"""Run a seeded share of each long check: kills, nodes, soak, service, rollout; and the command of all.

Each check's module has the command of its full run. `tests/integration/service/test_service.py` runs
another share of the service, with one kill.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.endurance import full_run, fuzz, kills, nodes, rollout, service, soak

Results = Callable[..., dict[str, Any]]


@pytest.mark.slow
def test_killed_processes_end_in_the_bytes_of_never_having_been_killed(
    results_of: Results, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of an encrypted model, which is compared with plain training, and leaves no stray key or file."""
    found = results_of(kills.main, "--encrypt", kills=9, lora=0, seed=7)
    assert (found["encrypted"], found["kills"] >= 9) == (True, True)
    assert "source_sha256" in found
    assert len(found["cheap"]["killed_at"]) >= 7
    assert "state left behind" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.torch
def test_killed_training_of_real_adapters_ends_in_the_same_bytes(results_of: Results) -> None:
    assert results_of(kills.main, kills=2, lora=2, seed=7)["lora"]["kills"] >= 2


@pytest.mark.slow
def test_a_soak_with_random_kills_equals_training_from_scratch(results_of: Results) -> None:
    found = results_of(soak.main, requests=12, every=6, seed=6)
    assert found["requests"] == 12
    assert found["kills"] > 0
    assert found["comparisons_with_scratch"] == 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("own_ray")
def test_random_kills_of_nodes_change_no_byte(tmp_path: Path) -> None:
    # One kill, as soon as something trains; its round is finished.
    at_once = (0.0, 0.0)
    found = nodes.run(tmp_path, 3, 0, num_nodes=2, num_shards=2, passes=(10, 3), pause_s=at_once)
    assert found["failures"] == []
    assert found["kills"] == {"node": 1}
    assert found["rounds"] > 0


@pytest.mark.long
@pytest.mark.usefixtures("own_ray")
def test_a_served_model_loses_nothing_and_shows_nothing_deleted(results_of: Results) -> None:
    found = results_of(service.main, deletions=1, minutes=0, kill_every=1, seed=1)
    assert found["deletions"] == 1
    assert found["comparisons"] > 0
    assert sum(found["kills"].values()) > 0


@pytest.mark.long
@pytest.mark.usefixtures("own_ray")
def test_replicas_on_two_nodes_serve_clean_heads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seconds are for a machine that does nothing else: `python -m tests.endurance.rollout`."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    out = tmp_path / "rollout.json"
    rollout.main(["--deletions", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["nodes_of_replicas"] == ["node-0", "node-1"]
    assert found["answers_by_former_heads"] == 0
    assert found["seconds_to_clean_heads"]["times"] == 2 * 2


# --- the command of all --------------------------------------------------------------------------


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
