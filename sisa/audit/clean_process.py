"""Train stages again, each in a process that has trained nothing before.

If one process trained all stages, a replay would not notice state that the trainer carries over from one
stage to the next. So a clean process, which has only imported what training needs, forks for each stage
that it reads from its standard input. Importing torch takes seconds, so it serves every replay in the
same environment, and ends with the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from sisa.core.domain import Chain
from sisa.core.errors import EnvironmentFault
from sisa.core.events import silent
from sisa.core.ports import CheckpointStore
from sisa.flows.context.context import Context
from sisa.flows.wiring.executors import OnCluster
from sisa.flows.wiring.model_directory import ModelDirectory
from sisa.flows.wiring.wiring import open_as_it_is
from sisa.lm.base.numerics import worker_environment
from sisa.planning.plan import all_paths
from sisa.store.areas import REPLAYS
from sisa.store.checkpoints import FileCheckpoints

IMPORTS = ("sisa.lm.train.trainer", "pyarrow.dataset")
SERVE = "from sisa.audit.clean_process import serve; serve()"
READ_LATE = ("PYTEST_CURRENT_TEST", "XDG_STATE_HOME")  # read when a model is opened, not by an import
PR_SET_PDEATHSIG = 1  # from prctl.h
REPLY_BYTES = 4096


@dataclass(frozen=True)
class Apart:
    """Pair a store with a function that trains a shard's stages into it, each in its own process."""

    store: CheckpointStore
    train: Callable[[Sequence[Chain]], None]


def stages_apart(model: ModelDirectory, context: Context) -> Apart | None:
    """Return how to train a model's stages apart; None for an executor object of the caller's."""
    if not isinstance(model.executor, str | OnCluster):
        return None
    name = uuid.uuid4().hex
    return Apart(replay_store(context, name), partial(_train_all, model, name))


def replay_store(context: Context, name: str = "") -> FileCheckpoints:
    """Return the store of a replay: a new one, or the one of the given name."""
    place = context.stores.blobs[REPLAYS].below(name or uuid.uuid4().hex)
    return FileCheckpoints(place, context.stores.keyring, REPLAYS)


def train_stage(context: Context, shard: int, key: str, store: CheckpointStore) -> None:
    """Train one stage of a shard from the base, or from its parent in the store, into the store."""
    files = tuple(context.stores.ledger.slices(shard))
    for path in all_paths(shard, files, context.recipe, context.compute.fingerprint):
        for number, job in enumerate(path, start=1):
            if job.key == key:  # earlier stages are in the store and are not trained again
                context.compute.executor_for(store).run(
                    [Chain(shard, path[:number], None, files)], context.report
                )
                return


def _train_all(model: ModelDirectory, store: str, chains: Sequence[Chain]) -> None:
    """Train all stages of a shard, each in a fork. Raise EnvironmentFault if one fails."""
    config, shard = model.config, chains[0].shard
    settings = worker_environment(config.sisa.threads_per_shard, config.precision)
    for key in dict.fromkeys(job.key for chain in chains for job in chain.jobs):
        failed = clean_process().train(
            StageRequest(str(model.directory.absolute()), store, shard, key), settings
        )
        if failed:
            raise EnvironmentFault(
                "a stage could not be trained again in its own process",
                where=f"shard {shard}",
                got=failed,
                next_step="check the memory, and that `sisa status` opens the model",
            )


@dataclass(frozen=True)
class StageRequest:
    """Describe a stage that a fork trains, and the name of the store into which it trains it."""

    directory: str
    store: str
    shard: int
    key: str


class _Running(NamedTuple):
    """A clean process, its environment, and this end of its standard input and output."""

    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    channel: socket.socket


class CleanProcess:
    """Run a process that has only imported modules; start it when first needed. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def train(self, stage: StageRequest, settings: Mapping[str, str]) -> str:
        """Train a stage in a fork; return its error's name or exit status, and "" if it succeeded."""
        environment = {**os.environ, **settings}
        read_late = {name: environment.pop(name) for name in READ_LATE if name in environment}
        request = json.dumps({"stage": asdict(stage), "environment": read_late})
        with self._lock:
            running = self._running
            if running and (running.environment != environment or running.process.poll() is not None):
                self.end()
            self._running = self._running or _started(environment)
            reply = b""  # stays empty if the process ends before it replies
            try:
                with contextlib.suppress(ConnectionError):
                    self._running.channel.sendall(request.encode() + b"\n")
                    reply = self._running.channel.recv(REPLY_BYTES)
            except BaseException:  # an interrupted replay must leave no process that still writes
                self.end()
                raise
            return str(json.loads(reply)) if reply else f"exit {self.end()}"

    def disown(self) -> None:
        """Leave the clean process to the process that this one was forked from."""
        self._lock = threading.Lock()  # a thread that the fork lacks may hold the old one
        if self._running is not None:
            self._running.channel.close()
            self._running.process.returncode = 0  # another's child, so Popen must not wait for it
        self._running = None

    def end(self) -> int:
        """End the clean process and its fork; return its exit status."""
        running, self._running = self._running, None
        if running is None:
            return 0
        with contextlib.suppress(OSError), running.channel:
            running.channel.shutdown(socket.SHUT_RDWR)
        return running.process.wait()


def _started(environment: Mapping[str, str]) -> _Running:
    here = str(Path(__file__).resolve().parents[2])
    paths = filter(None, (here, environment.get("PYTHONPATH")))
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVE],
            env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C in a terminal reaches the caller only, which ends this process
        )
    return _Running(environment, process, ours)


@cache
def clean_process() -> CleanProcess:
    """Return this process's clean process, which ends with it."""
    made = CleanProcess()
    atexit.register(made.end)
    os.register_at_fork(after_in_child=made.disown)
    return made


# --- in the clean process ------------------------------------------------------------------------


def serve() -> None:
    """Train the stages requested on standard input, one line of JSON each, until the input ends.

    Write one line of JSON for each to standard output: why it failed, or an empty string.
    """
    for module in IMPORTS:
        importlib.import_module(module)
    with open(os.dup(0)) as requests, open(os.dup(1), "w") as replies:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)  # output that a library prints must not become a reply
        for line in requests:
            why = _train_forked(requests.fileno(), **json.loads(line))
            print(json.dumps(why), file=replies, flush=True)


def _train_forked(requests: int, stage: dict[str, Any], environment: dict[str, str]) -> str:
    """Train a stage in a fork of this process; end both if the caller is gone."""
    failed, failing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        with contextlib.suppress(OSError, AttributeError):  # the kernel ends the child with its parent
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        _train_and_exit(StageRequest(**stage), environment, failing)
    os.close(failing)
    if failed not in select.select([failed, requests], [], [])[0]:
        os.kill(child, signal.SIGKILL)  # input before the reply means that the caller has closed it
        os.waitpid(child, 0)
        raise SystemExit(1)
    with open(failed) as pipe:
        name = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return name or (f"exit {status}" if status else "")


def _train_and_exit(stage: StageRequest, environment: dict[str, str], failing: int) -> NoReturn:
    try:
        os.environ.update(environment)
        with open_as_it_is(Path(stage.directory)) as context:
            store = replay_store(context, stage.store)
            train_stage(replace(context, report=silent), stage.shard, stage.key, store)
    except BaseException as error:  # send only its name: its text may quote a record
        os.write(failing, type(error).__name__.encode())
        os._exit(1)
    os._exit(0)
