"""A patch that is made in a Ray worker, without Ray: what the driver asks of the worker."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.ray import patch_tasks
from sisa.config.config import RunConfig
from sisa.core.ports import PatchMade


def test_a_silent_worker_is_ended_as_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = PatchMade(None, unfinished=True, report={}), dict[str, Any]()

    def run_tasks(*_: Any, **options: Any) -> list[PatchMade]:
        asked.update(options)
        return [made]

    monkeypatch.setattr(patch_tasks, "run_tasks", run_tasks)
    for name in ("connect", "manifest_of", "carrier", "NodeTerms", "fingerprint"):
        monkeypatch.setattr(patch_tasks, name, lambda *_: "")
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr("ray.get_runtime_context", lambda: here)
    site: Any = SimpleNamespace(base=SimpleNamespace(directory="base"), threads=1)
    monkeypatch.setattr(patch_tasks, "_lent", lambda *_: nullcontext(site))
    config = RunConfig.model_validate(
        {
            "datasets": [{"path": "people.jsonl"}],
            "output_dir": "model",
            "cluster": {"stall_limit_s": 7.0, "max_retries": 2},
        }
    )
    order: Any = SimpleNamespace(job=SimpleNamespace(key="key"))
    assert patch_tasks.RayPatcher(site, config).make(order, lambda _: None) is made
    assert (asked["stall_limit_s"], asked["max_retries"]) == (7.0, 2)
