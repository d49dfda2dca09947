"""The numerics' self-test: what repeats, what does not, and what cannot be run."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

import pytest

from cluster.cli.cli import run
from sisa.core.errors import EnvironmentFault
from sisa.lm.base.numerics import describe_fingerprint, fingerprint
from sisa.lm.train import self_test

FOUND = self_test.Numerics("f" * 64, describe_fingerprint(1), ("a", "a", "a", "a"))


@pytest.mark.torch
def test_this_machine_repeats_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--numerics", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["repeats"]
    assert len(found["digests"]) == 2 * self_test.NUM_PROCESSES
    assert found["fingerprint"] == fingerprint(1)


@pytest.mark.torch
def test_what_is_trained_depends_on_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    one = self_test.trained_digests(1, times=1)
    monkeypatch.setitem(self_test.TRAINING, "lora_dropout", 0.2)
    assert one != self_test.trained_digests(1, times=1)


def test_what_does_not_repeat_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(self_test, "check", lambda **_: replace(FOUND, digests=("a", "a", "a", "b")))
    assert run(["doctor", "--numerics"]) == 4
    assert "DOES NOT REPEAT ITSELF" in capsys.readouterr().out


def test_a_process_that_fails_is_an_environment_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise subprocess.CalledProcessError(1, "python")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(EnvironmentFault, match="self-test's process failed"):
        self_test.check(1)
