"""Hold the one connection to Ray that all runs of a process share, and its mailbox.

A local Ray starts with the first run and ends with `disconnect` or with the process. It listens on
loopback alone and requires its token: a new secret in a file of mode 0600 in the session's private
directory. The directory is removed at the end, or by `reaper.py` if the process is killed. A Ray
that the caller started, or that runs at an address, is used and left as it is. Nothing is printed on
standard output. The process's reaction to SIGTERM stays as it was.
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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray._private import node, services, utils, worker
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray import reaper
from sisa.core.errors import EnvironmentFault
from sisa.flows.wiring.upper_houses import ROOT, check_upper_houses

CONNECT_S = 5.0
OBJECT_STORE_BYTES = 100 * 2**20  # only results travel locally; Ray's minimum is 75 MiB
# Processes of a head node that a Ray on one machine does not need: they scale a cluster, and copy
# workers' logs to the driver's terminal.
NEEDLESS = ("start_monitor", "start_log_monitor")
MAX_TEMP_LENGTH = 36  # what a unix socket's 103 bytes leave beside Ray's own names
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@dataclass(frozen=True, slots=True)
class Session:
    """Describe a connection to Ray."""

    job_id: str
    address: str | None
    num_cpus: int
    mailbox: Any
    owned: bool  # whether `connect` made the connection, to its own Ray or to another
    private_dir: Path | None  # None if the Ray was started by others
    at_end: ExitStack  # undoes what connecting did


class _OwnPath(JobConfig):  # type: ignore[misc]
    """Configure a job whose workers import this program from where this process does.

    Ray puts the driver's working directory first on their search path, where a `cluster.py` would hide
    ours. A job that was submitted with its code has no such path and keeps none.
    """

    _py_driver_sys_path: list[str]

    def _serialize(self) -> bytes:
        if self._py_driver_sys_path:
            self._py_driver_sys_path = [str(ROOT)]
        return bytes(super()._serialize())


class Mailbox:
    """Keep events for the driver, by run."""

    def __init__(self) -> None:
        self._events: dict[str, list[Any]] = {}

    def put(self, run_id: str, what: Any) -> None:
        self._events.setdefault(run_id, []).append(what)

    def take(self, run_id: str) -> list[Any]:
        return self._events.pop(run_id, [])


class Listener:
    """Read a run's mailbox, which Ray restarts, empty, if it dies."""

    def __init__(self, mailbox: Any, run_id: str) -> None:
        self._mailbox, self._run_id = mailbox, run_id
        self._answer: Any = None  # requested, not yet received: its events left the mailbox

    def received(self, timeout_s: float) -> list[Any]:
        """Return the events since the last call; none if no answer arrives in time."""
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
    """Return the running session if it suffices, else a new one.

    Raise EnvironmentFault if Ray can't be started or reached.
    """
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
            # Ray prints on standard output when a node is lost, whatever the logging settings;
            # a Notice reports the loss instead.
            at_end.enter_context(_instead(worker, "print_to_stdstream", lambda *_, **__: None))
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
    """End the session that `connect` began and everything it started; leave others' Ray as it is."""
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
def _instead(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    """Replace a name in a module or class of Ray until the block ends."""
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


def _init(**options: Any) -> None:
    """Call `ray.init` without output.

    Ray keeps a driver's command line in its job table, where anyone with the token can read it. The
    command line may contain ids, so Ray gets the program's name instead. Ray's own handler of SIGTERM,
    which prints a stack trace, is not installed.
    """
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
    private_dir = Path(tempfile.mkdtemp(prefix="sisa-"))
    if len(str(private_dir)) > MAX_TEMP_LENGTH:
        private_dir.rmdir()
        private_dir = Path(tempfile.mkdtemp(prefix="sisa-", dir="/tmp"))
    at_end.enter_context(_reaped(private_dir))
    at_end.callback(shutil.rmtree, private_dir, ignore_errors=True)
    at_end.enter_context(own_token(private_dir / "token"))
    try:
        # Ray would replace 127.0.0.1 by the machine's own address.
        with without_needless_processes(), _instead(services, "resolve_ip_for_localhost", str):
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
            got=first_line(error),
            next_step="free memory and disk space, or try again when the machine is less busy; "
            "`--executor serial` trains without Ray",
        ) from error
    return private_dir


@contextmanager
def without_needless_processes() -> Iterator[None]:
    """Start head nodes without NEEDLESS processes until the block ends, with a third less work."""
    with ExitStack() as changes:
        for each in NEEDLESS:
            changes.enter_context(_instead(node.Node, each, lambda *_, **__: None))
        yield


@contextmanager
def _reaped(private_dir: Path) -> Iterator[None]:
    """Start a process that ends all processes of the directory if this process is killed."""
    command = [sys.executable, "-I", "-S", reaper.__file__, str(private_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield
        finally:
            with suppress(OSError):  # it may have been killed itself
                process.communicate(reaper.OVER)


@contextmanager
def own_token(path: Path) -> Iterator[None]:
    """Write a new token for this Ray until the block ends.

    Workers inherit the environment, so it names the token's file and does not hold the token.
    """
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    with changed_environment({AUTH_MODE: "token", TOKEN: None, TOKEN_PATH: str(path)}):
        yield


@contextmanager
def changed_environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables, or remove those that are None, for this process and its Ray; undo it at the end."""
    former = {name: os.environ.get(name) for name in variables}
    _set_environment(variables)
    try:
        yield
    finally:
        _set_environment(former)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    # Ray reads its environment on import, and a token once.
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


def _attach(address: str) -> None:
    # A cluster demands a token if `ray start` found one or got RAY_AUTH_MODE. Send one by default; on a
    # node of the cluster (`auto`), send one only if there is one, as a job does.
    if AUTH_MODE not in os.environ and (address != "auto" or has_token()):
        _set_environment({AUTH_MODE: "token"})
    try:
        host, _, port = address.rpartition(":")
        if address != "auto":  # Ray itself would wait for a minute and print
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        _init(address=address)
    except Exception as error:
        raise EnvironmentFault(
            "no Ray cluster can be reached",
            where=address,
            expected="HOST:PORT of a Ray head node of this Ray and Python version, or `auto`",
            got=first_line(error),
            next_step="run `ray status` on the head node and check the address and the token "
            "(~/.ray/auth_token; RAY_AUTH_MODE=disabled for a cluster that wants none); without "
            "`address` a local Ray is started",
        ) from error


def has_token() -> bool:
    """Return whether there is a token where Ray looks for one."""
    return bool(ray._raylet.AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True))


def first_line(error: Exception) -> str:
    """Return the first line of a message, at most 300 characters, or else the error's type."""
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _open_mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox)
    return actor.options(scheduling_strategy=here).remote()


def alive_cpus() -> list[int]:
    """Return the number of CPUs of each live node."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
