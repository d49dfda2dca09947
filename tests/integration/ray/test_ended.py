"""A command that is ended from outside while its Ray works leaves nothing behind, seconds later."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.models.scripted import begun, make_site, script_of
from tests.models.tiny_model import write_run
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
SOON_S = 20.0  # of a busy machine
BEGUN = {"ray": "model/checkpoints/.tmp-*", "serial": "model/records/*"}  # what training makes first


def start(scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # `nohup` hands down SIG_IGN
    )


def processes_of(command: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(command.pid).children(recursive=True)
    assert {"raylet", "gcs_server"} <= {each.name() for each in found}
    assert "monitor.py" not in " ".join(word for each in found for word in each.cmdline())  # needless
    return found


def are_gone(started: list[psutil.Process]) -> bool:
    return not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started)


@pytest.mark.torch
@pytest.mark.parametrize(("by", "executor"), [(signal.SIGTERM, "ray"), (signal.SIGHUP, "serial")])
def test_a_command_that_is_asked_to_end_says_how_to_go_on(
    by: signal.Signals, executor: str, scratch: Path, tmp_path: Path, tiny_base: Path
) -> None:
    run_file = write_run(tmp_path, tiny_base, num_epochs=400, cluster={"num_workers": 1})
    with start(scratch, "-m", "sisa", "train", str(run_file), "--executor", executor) as command:
        wait_for(lambda: list(tmp_path.glob(BEGUN[executor])), 120)
        started = processes_of(command) if executor == "ray" else []
        command.send_signal(by)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(timeout=15)
        if (
            command.poll() is None
        ):  # Python drops what a handler raises inside a weak reference's callback
            command.send_signal(by)
        out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (128 + by, ""), err
    assert err.endswith(f"error: ended by {by.name}; run the same command again to continue\n")
    assert "***" not in err
    assert "Traceback" not in err
    wait_for(lambda: are_gone(started), SOON_S)
    assert list(scratch.iterdir()) == []
    assert not list(tmp_path.glob("model/checkpoints/.tmp-*"))


def test_the_ray_of_a_command_that_was_killed_ends(scratch: Path, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    (script_of(site) / "wait-2.0").touch()
    program = (
        "import sys; from pathlib import Path; from tests.integration.ray import test_ray_executor as t;"
        "site = t.make_site(Path(sys.argv[1]));"
        "t.executor(site, 1).run(t.make_chains(site), t.silent)"
    )
    with start(scratch, "-c", program, str(tmp_path)) as command:
        wait_for(lambda: begun(site), 120)
        started = processes_of(command)
        command.kill()
        command.wait()
    wait_for(lambda: are_gone(started) and not list(scratch.iterdir()), SOON_S)
