"""The whole promise on a real language model: the quickstart as the README has it."""

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
    # More people than shards, so that somebody's deletion retrains; four epochs teach them.
    assert run(["quickstart", str(target), "--people", "6", "--epochs", "4", "--json"]) == 0
    story = json.loads(capsys.readouterr().out)
    assert (story["people"], story["records"], story["deleted_records"]) == (6, 24, 4)
    assert story["equal"]
    assert story["stages_replayed"] > 0
    assert 0 < story["record_epochs_retrained"] < story["record_epochs_full"]
    assert not story["leaked"]
    assert not story["answered"] or story["answer_before"] != story["answer_after"]
    if story["other_shard"] != story["shard"]:  # the very adapter that answered before
        assert story["other_known_after"] == story["other_known_before"]
    for name in ("general_before", "general_after"):
        assert "Paris" in story[name]
