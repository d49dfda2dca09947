"""The clean process that forks for each stage: one for all, replaced when it dies, never orphaned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from sisa.audit.clean_process import SERVE, StageRequest, clean_process
from sisa.lm.base.numerics import worker_environment
from tests.models.tiny_model import Tiny

NOWHERE = StageRequest("/nonexistent", "scratch", 0, "key")
HANGING = (
    "import time; from sisa.audit import clean_process as clean; clean.IMPORTS = ()\n"
    "clean.open_as_it_is = lambda *_, **__: time.sleep(60)\n"
)


def clean_processes() -> list[psutil.Process]:
    """Return the clean processes of this process, zombies included (they have no command line)."""
    found = psutil.Process().children()
    assert psutil.STATUS_ZOMBIE not in [each.status() for each in found]
    return [each for each in found if SERVE in each.cmdline()]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@pytest.mark.torch
def test_replays_share_one_clean_process_and_survive_its_death(tiny: Tiny) -> None:
    model = tiny.open()
    found: list[psutil.Process] = []
    for _ in range(3):
        proof = model.verify(replay="sample")
        assert [each.equal_apart for each in proof.shards].count(True) == 1
        found.append(*clean_processes())
        if len(found) == 2:
            found[-1].kill()
            found[-1].wait()
    assert found[0] == found[1] != found[2]


@pytest.mark.torch
def test_a_replay_in_one_process_proves_shards_without_a_clean_one(tiny: Tiny) -> None:
    clean_process().end()
    proof = tiny.open().verify(replay="sample", apart=False)
    assert proof.ok
    assert [each.equal for each in proof.shards].count(True) == 1
    assert {each.equal_apart for each in proof.shards} == {None}
    assert clean_processes() == []


@pytest.mark.torch
def test_threads_share_the_clean_process_and_forks_leave_it_alone() -> None:
    def failing(_: int) -> str:
        return clean_process().train(NOWHERE, worker_environment(1))

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(failing, range(8))) == {"IntegrityError"}
    before, num_fds = clean_processes(), psutil.Process().num_fds()
    running = clean_process()._running
    assert running is not None
    line = running.channel.fileno()
    child = os.fork()
    if not child:
        clean_process().end()  # ends nothing: it is the parent's
        os._exit(is_open(line))
    assert os.waitpid(child, 0)[1] == 0, "the fork holds the socket"
    assert is_open(line)
    assert failing(0) == "IntegrityError"
    assert (clean_processes(), len(before), psutil.Process().num_fds()) == (before, 1, num_fds)


@pytest.mark.parametrize("killed", [False, True])
def test_no_stage_outlives_whoever_asked_for_it(killed: bool) -> None:
    """The clean process ends with its input, and a stage with the clean process, whatever ends it."""
    with subprocess.Popen(
        [sys.executable, "-c", HANGING + SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as clean:
        assert clean.stdin is not None
        clean.stdin.write(json.dumps({"stage": vars(NOWHERE), "environment": {}}).encode() + b"\n")
        clean.stdin.flush()
        while not (stages := psutil.Process(clean.pid).children()):
            assert clean.poll() is None
        if killed:
            clean.kill()
    _, alive = psutil.wait_procs(stages, timeout=10)
    assert [each for each in alive if each.status() != psutil.STATUS_ZOMBIE] == []
