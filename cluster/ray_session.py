"""The process's one connection to Ray: started, shared by all that run tasks, and ended; its mailbox.

Rules: a local Ray starts at the first run and ends with `disconnect` or with the process; its session
directory is private and is removed. A Ray that the caller has started, or that runs at an address, is
used and left as it is. Nothing is printed on standard output.

Not covered: Ray Client (`ray://`) and autoscaling; a session directory whose driver was killed with
SIGKILL (it holds logs without text).
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from sisa.errors import EnvironmentFault

CONNECT_S = 5.0
OBJECT_STORE_BYTES = 100 * 2**20  # only results travel locally; Ray's minimum is 75 MiB
MAX_TEMP_LENGTH = 36  # what a unix socket's 103 bytes leave beside Ray's own names


@dataclass(frozen=True, slots=True)
class Session:
    """A connection to Ray. `private_dir` is None for one that others have started."""

    job_id: str
    address: str | None
    num_cpus: int
    mailbox: Any
    owned: bool
    private_dir: Path | None = None


class Mailbox:
    """What is told on its way to the driver, by run."""

    def __init__(self) -> None:
        self._told: dict[str, list[Any]] = {}

    def put(self, run_id: str, what: Any) -> None:
        self._told.setdefault(run_id, []).append(what)

    def take(self, run_id: str) -> list[Any]:
        return self._told.pop(run_id, [])


_session: Session | None = None


def connect(address: str | None, num_cpus: int) -> Session:
    """The running session if it will do, else a new one. Raises EnvironmentFault."""
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
    if owned and address is not None:
        _attach(address)
    elif owned:
        private_dir = _start(num_cpus)
    _session = Session(_job_id(), address, num_cpus, _open_mailbox(), owned, private_dir)
    return _session


def disconnect() -> None:
    """End the session that `connect` began, with all that it started; others' stay as they are."""
    global _session
    held, _session = _session, None
    if held is not None and held.owned and ray.is_initialized() and held.job_id == _job_id():
        ray.shutdown()
    if held is not None and held.private_dir is not None:
        shutil.rmtree(held.private_dir, ignore_errors=True)


atexit.register(disconnect)


def _job_id() -> str:
    return str(ray.get_runtime_context().get_job_id())


def _start(num_cpus: int) -> Path:
    private_dir = _private_directory()
    try:
        ray.init(
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="sisa",
            object_store_memory=OBJECT_STORE_BYTES,
            # Ray opens its directory to everyone, so it gets one inside the private one.
            _temp_dir=str(private_dir / "r"),
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:
        shutil.rmtree(private_dir, ignore_errors=True)
        raise EnvironmentFault(
            "a local Ray can't be started",
            got=_first_line(error),
            next_step="free memory and disk space, or train with `--executor serial`",
        ) from error
    return private_dir


def _private_directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="sisa-"))
    if len(str(path)) > MAX_TEMP_LENGTH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix="sisa-", dir="/tmp"))
    return path


def _attach(address: str) -> None:
    if "RAY_AUTH_MODE" not in os.environ:
        # `ray start` demands a token by default, but a client with an address sends none unless told,
        # and Ray reads its environment when it is imported: read it again, as `ray.init` does.
        os.environ["RAY_AUTH_MODE"] = "token"
        ray._raylet.Config.initialize("")
    try:
        host, _, port = address.rpartition(":")
        if address != "auto":  # Ray itself waits for a minute and prints on
            socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="sisa")
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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__


def _open_mailbox() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox)
    return actor.options(scheduling_strategy=here).remote()


def alive_cpus() -> list[int]:
    """CPUs of each node that is alive."""
    return [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
