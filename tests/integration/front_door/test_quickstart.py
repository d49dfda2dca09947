"""The whole promise on a real language model: the quickstart in a shortened form, then a full replay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.cli import run


@pytest.mark.torch
@pytest.mark.ray
@pytest.mark.slow
def test_quickstart_ends_in_equal_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "story"
    assert run(["quickstart", str(target), "--people", "8", "--epochs", "4", "--json"]) == 0
    story = json.loads(capsys.readouterr().out)
    assert story["records"] == 40
    assert story["deleted_records"] == 5
    assert story["equal"]
    assert not story["leaked"]
    assert 0 < story["record_epochs_retrained"] < story["record_epochs_full"]
    assert not story["answered"] or story["answer_before"] != story["answer_after"]
    assert run(["verify", "-m", str(target / "model"), "--replay", "all", "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["ok"]
    replayed = [shard for shard in proof["shards"] if shard["head"]]
    assert replayed
    assert all(shard["replayed"] and shard["equal"] for shard in replayed)
