"""The one loop over Ray tasks, with tasks that are neither chains nor evaluations."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.ray import tasks as ray_tasks
from cluster.ray.attempt import Unready
from cluster.ray.scheduling import Placement
from cluster.ray.session import connect
from cluster.ray.tasks import run_tasks
from sisa.core.events import Event, Notice, Report, silent

pytestmark = pytest.mark.ray


def write_name(path: Path, report: Report) -> str:
    """Die or be unready as the task's name says; write the process id to the file."""
    path.write_text(str(os.getpid()))
    report(Notice(f"at {path.name}"))
    if path.name == "unready":
        raise Unready
    if path.name == "dies" and not path.with_name("died").exists():
        path.with_name("died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return path.name


def run(
    paths: list[Path], report: Report, environment: Mapping[str, str] | None = None, **options: Any
) -> list[str]:
    return run_tasks(
        paths,
        write_name,
        report,
        session=connect(None, 2),
        placement=Placement(num_cpus=1, environment=environment or {}),
        label=lambda path: f"task {path.name}",
        **options,
    )


def test_results_come_in_order_and_a_dead_worker_is_announced(tmp_path: Path) -> None:
    events: list[Event] = []
    assert run([tmp_path / "dies", tmp_path / "b", tmp_path / "c"], events.append) == ["dies", "b", "c"]
    texts = [each.text for each in events if isinstance(each, Notice)]
    assert {"at b", "at c"} <= set(texts)
    assert [each for each in texts if "task dies died" in each and "attempt 2 of 4" in each]


def test_what_is_unready_is_made_ready(tmp_path: Path) -> None:
    unready = tmp_path / "unready"
    assert run([unready], silent, make_ready=lambda path: path.with_name("ready")) == ["ready"]


def test_a_worker_that_does_not_begin_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Python of its environment hangs before it can say anything, until that is reported."""
    monkeypatch.setattr(ray_tasks, "START_S", 0.0)
    hangs = tmp_path / "hangs"
    code = f"import os, time\nwhile os.path.exists({str(hangs)!r}):\n    time.sleep(0.1)\n"
    (tmp_path / "sitecustomize.py").write_text(code)
    hangs.touch()
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    texts: list[str] = []

    def hear(event: Event) -> None:
        texts.append(event.text if isinstance(event, Notice) else "")
        hangs.unlink(missing_ok=True)

    asked: dict[str, Any] = {"stall_limit_s": 3.0, "max_retries": 0}
    assert run([tmp_path / "b"], hear, {"PYTHONPATH": paths}, **asked) == ["b"]
    assert "worker of task b on node" in texts[0]
    assert "did not begin" in texts[0]
