"""Hold the process's one connection to Ray, which all that run tasks share, and its mailbox.

A local Ray starts at the first run and ends with `disconnect` or with the process. It listens on
loopback alone and answers only who knows its token: a new secret in a file of mode 0600 in the session's
private directory, which is removed at the end; after a process that was killed, by `ray_reaper.py`. A
Ray that the caller has started, or that runs at an address, is used and left as it is. Nothing is
printed on standard output, also when a node is lost. What SIGTERM does to the process stays as it was.

Ray Client (`ray://`) and autoscaling are not supported.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray._private import services, utils, worker
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray import ray_reaper
from sisa.core.errors import EnvironmentFault
from sisa.flows.wiring.upper_houses import ROOT, check_upper_houses

CONNECT_S = 5.0
OBJECT_STORE_BYTES = 100 * 2**20  # only results travel locally; Ray's minimum is 75 MiB
MAX_TEMP_LENGTH = 36  # what a unix socket's 103 bytes leave beside Ray's own names
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray. `private_dir` is None for a Ray that others have started; `owned` is a
    connection that `connect` made, to whichever."""

    job_id: str
    address: str | None
    num_cpus: int
    mailbox: Any
    owned: bool
    private_dir: Path | None
    at_end: ExitStack  # undoes what connecting did


class _OwnPath(JobConfig):  # type: ignore[misc]
    """A job whose workers find this program where this process does.

    Ray puts the driver's working directory first on their search path; a `cluster.py` there would hide
    ours. A job that was submitted with its code has no such path, and keeps none."""

    _py_driver_sys_path: list[str]

    def _serialize(self) -> bytes:
        if self._py_driver_sys_path:
            self._py_driver_sys_path = [str(ROOT)]
        return bytes(super()._serialize())


class Mailbox:
    """Events on their way to the driver, by run."""

    def __init__(self) -> None:
        self._events: dict[str, list[Any]] = {}

    def put(self, run_id: str, what: Any) -> None:
        self._events.setdefault(run_id, []).append(what)

    def take(self, run_id: str) -> list[Any]:
        return self._events.pop(run_id, [])


class Listener:
    """What a run's mailbox holds. An answer that is late is kept, for what is in it is no longer in the
    mailbox; a mailbox that died is started again by Ray, empty."""

    def __init__(self, mailbox: Any, run_id: str) -> None:
        self._mailbox, self._run_id = mailbox, run_id
        self._answer: Any = None  # on its way

    def received(self, timeout_s: float) -> list[Any]:
        """Return what came since the last time; nothing where no answer comes in time."""
        if self._answer is None:
            self._answer = self._mailbox.take.remote(self._run_id)
        if not ray.wait([self._answer], timeout=timeout_s)[0]:
            return []
        answer, self._answer = self._answer, None
        try:
            return list(ray.get(answer))
        except RayError:
            return []


_session: Session | None = None


def connect(address: str | None, num_cpus: int) -> Session:
    """Return the running session if it will do, else a new one. Raises EnvironmentFault."""
    global _session
    held = _session
    if held is not None and ray.is_initialized() and held.job_id == _job_id():
        enough = held.address == address and (address is not None or held.num_cpus >= num_cpus)
        if enough or not held.owned:
            return held
    disconnect()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    private_dir = None
    owned = not ray.is_initialized()
    with ExitStack() as at_end:
        if owned:
            # Ray prints on standard output when a node is lost, whatever logging is set to; a
            # Notice says that it was lost.
            at_end.enter_context(_instead(worker, "print_to_stdstream", _print_nothing))
            if address is None:
                private_dir = _start(num_cpus, at_end)
            else:
                _attach(address)
            at_end.callback(_shut_down, _job_id())
        else:
            check_upper_houses(worker.global_worker.core_worker.get_job_config().py_driver_sys_path)
        mailbox = _open_mailbox()
        _session = Session(_job_id(), address, num_cpus, mailbox, owned, private_dir, at_end.pop_all())
    return _session


def disconnect() -> None:
    """End the session that `connect` began, with all that it started; others' stay as they are."""
    global _session
    held, _session = _session, None
    if held is not None:
        held.at_end.close()


atexit.register(disconnect)


def _job_id() -> str:
    return str(ray.get_runtime_context().get_job_id())


def _shut_down(job_id: str) -> None:
    if ray.is_initialized() and _job_id() == job_id:
        ray.shutdown()


@contextmanager
def _instead(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Let a module of Ray have something else under a name of its own."""
    former = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, former)


def _print_nothing(*_: object, **__: object) -> None:
    """Print nothing: what a lost node logged is in Ray's logs."""


def _init(**options: Any) -> None:
    """`ray.init`, quietly.

    Ray keeps a driver's command line in its job table, for whoever holds the token; ids may stand in it,
    so that it gets the program's name alone. And it answers SIGTERM by a stack trace of its own."""
    before = signal.getsignal(signal.SIGTERM)
    with (
        _instead(utils, "get_entrypoint_name", lambda: "sisa"),
        _instead(utils, "set_sigterm_handler", lambda _: None),
    ):
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="sisa",
            job_config=_OwnPath(),
            **options,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _start(num_cpus: int, at_end: ExitStack) -> Path:
    private_dir = _private_directory()
    at_end.enter_context(_reaped(private_dir))
    at_end.callback(shutil.rmtree, private_dir, ignore_errors=True)
    at_end.enter_context(own_token(private_dir / "token"))
    try:
        # Ray takes 127.0.0.1 for a slip and puts the machine's own address in its place.
        with _instead(services, "resolve_ip_for_localhost", str):
            _init(
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                # Ray opens its directory to everyone, so it gets one inside the private one.
                _temp_dir=str(private_dir / "r"),
                _node_ip_address="127.0.0.1",
            )
    except Exception as error:
        raise EnvironmentFault(
            "a local Ray can't be started",
            got=_first_line(error),
            next_step="free memory and disk space, or train with `--executor serial`",
        ) from error
    return private_dir


@contextmanager
def _reaped(private_dir: Path) -> Iterator[None]:
    """Have somebody end what belongs to the directory, should this process be killed."""
    command = [sys.executable, "-I", "-S", ray_reaper.__file__, str(private_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as reaper:
        try:
            yield
        finally:
            with suppress(OSError):  # it may have been killed itself
                reaper.communicate(ray_reaper.OVER)


@contextmanager
def own_token(path: Path) -> Iterator[None]:
    """Make a token of this Ray's own. The environment, which workers inherit, names the file
    alone."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    former = {name: os.environ.pop(name, None) for name in (AUTH_MODE, TOKEN, TOKEN_PATH)}
    os.environ |= {AUTH_MODE: "token", TOKEN_PATH: str(path)}
    read_environment()
    try:
        yield
    finally:
        for name, value in former.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        read_environment()


def read_environment() -> None:
    """Ray reads its environment when it is imported, and a token once."""
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _private_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="sisa-"))
    if len(str(path)) > MAX_TEMP_LENGTH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="sisa-", dir="/tmp"))
    return path


def _attach(address: str) -> None:
    # `ray start` demands a token where it finds one, or is set to. A client sends one unless
    # set otherwise; on a node of the cluster what is found there decides, as for a job.
    if AUTH_MODE not in os.environ and (address != "auto" or has_token()):
        os.environ[AUTH_MODE] = "token"
        read_environment()
    try:
        host, _, port = address.rpartition(":")
        if address != "auto":  # Ray itself waits for a minute and prints on
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        _init(address=address)
    except Exception as error:
        raise EnvironmentFault(
            "no Ray cluster can be reached",
            where=address,
            expected="HOST:PORT of a Ray head node of this Ray and Python version, or `auto`",
            got=_first_line(error),
            next_step="run `ray status` on the head node and check the address and the token "
            "(~/.ray/auth_token; RAY_AUTH_MODE=disabled for a cluster that wants none); without "
            "`address` a local Ray is started",
        ) from error


def has_token() -> bool:
    """Return whether a token is found where Ray looks for one."""
    return bool(ray._raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _open_mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox)
    return actor.options(scheduling_strategy=here).remote()


def alive_cpus() -> list[int]:
    """Return CPUs of each node that is alive."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
