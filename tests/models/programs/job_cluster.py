"""Start a cluster as an operator would: a head without CPUs and a worker node, as processes.

It has its own ports and directories, the dashboard on loopback, and a token in a private file. Nodes see
neither this source tree nor the keys of the environment: they train what was sent. Only processes
started here are ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

TRIES = 3


@dataclass(frozen=True)
class JobCluster:
    """Describe the cluster: the address of its dashboard, its token and the processes of its nodes."""

    address: str
    token_file: Path
    nodes: tuple[subprocess.Popen[bytes], ...]

    def drivers(self) -> list[psutil.Process]:
        """Return the processes that drive a training."""
        found = []
        for node in self.nodes:
            for child in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.Error):
                    if child.cmdline()[1:4] == ["-m", "sisa", "train"]:
                        found.append(child)
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def job_cluster(cache: Path, *, wants_token: bool = True) -> Iterator[JobCluster]:
    """Start a cluster, configure this process's clients for it, and end it.

    Without `wants_token`, start it as a user does who has no token and set none for Ray.
    """
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, since Ray's sockets are below it
    token = scratch / "token"
    with os.fdopen(os.open(token, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON"))},
        "HOME": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "SISA_CACHE": str(cache),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs call `python`
    }
    if wants_token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    head = [
        *("--head", f"--port={port}", "--num-cpus=0", f"--temp-dir={scratch}/r"),
        *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
        f"--ray-client-server-port={free_port()}",
    ]
    worker = [f"--address=127.0.0.1:{port}", "--num-cpus=1", "--node-ip-address=127.0.0.2"]
    address = f"http://127.0.0.1:{dashboard}"
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for name, arguments in (("head", head), ("worker", worker)):
            nodes.append(_start_node(arguments, environment, scratch / f"{name}.log"))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("RAY_AUTH_TOKEN", raising=False)
            if wants_token:
                patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
            else:
                patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
                patch.setenv("HOME", str(scratch))
            yield JobCluster(address, token, tuple(nodes))
    finally:
        _end(nodes)
        shutil.rmtree(scratch, ignore_errors=True)


def _end(nodes: list[subprocess.Popen[bytes]]) -> None:
    """Kill the nodes and their children at once: an orderly end takes longer than some tests."""
    started = [each for node in nodes for each in psutil.Process(node.pid).children(recursive=True)]
    for node in nodes:
        node.kill()
        node.wait(30)
    for each in started:
        with suppress(psutil.Error):
            each.kill()


def _start_node(arguments: list[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a node and wait until it is up; try again, since Ray gives up after half a minute."""
    ray = str(Path(sys.executable).with_name("ray"))
    for _ in range(TRIES):
        command = [ray, "start", "--block", *arguments, f"--dashboard-agent-listen-port={free_port()}"]
        with log.open("wb") as output:
            node = subprocess.Popen(command, cwd="/", env=environment, stdout=output, stderr=output)
        while node.poll() is None:
            if b"Ray runtime started" in log.read_bytes():
                return node
            time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])
