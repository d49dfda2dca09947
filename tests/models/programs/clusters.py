"""Start the Ray that tests share, and clusters of several nodes on this machine, with their own token.

with own_cluster() as cluster:
    node = add_node(cluster, "a")
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from ray.cluster_utils import Cluster

from cluster.ray import session as ray_session
from tests.models.scripted import NODE


def share_ray() -> ray_session.Session:
    """Connect to the Ray of this process as a run does, with two CPUs and a pretended GPU."""
    if ray.is_initialized() and "GPU" not in ray.cluster_resources():
        ray_session.disconnect()  # a command started this one, with more CPUs
    with mock.patch.object(ray, "init", functools.partial(ray.init, num_gpus=1)):
        return ray_session.connect(None, 2)


def present_session() -> ray_session.Session | None:
    """Return this process's connection to a Ray, if it has one."""
    return ray_session._session


@contextmanager
def own_cluster(**head: Any) -> Iterator[Cluster]:
    """Start a head without CPUs, which is the driver's node; end everything with the block."""
    ray_session.disconnect()
    scratch = Path(tempfile.mkdtemp(dir="/tmp"))  # a short path, since Ray's sockets are below it
    cluster = Cluster()
    try:
        with ray_session.own_token(scratch / "token"):
            options = {
                "num_cpus": 0,
                "temp_dir": str(scratch / "r"),
                "include_dashboard": False,
                "env_vars": {NODE: "head"},
                "_system_config": {"health_check_period_ms": 1000},  # a lost node is noticed in 5 s
            }
            # Otherwise Ray writes the address where `address="auto"` of other processes looks.
            written = mock.patch("ray._private.utils.write_ray_address")
            with written, ray_session.without_needless_processes():
                cluster.add_node(**{**options, **head})
            yield cluster
            ray_session.disconnect()
            cluster.shutdown()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def add_node(cluster: Cluster, name: str, **options: Any) -> Any:
    """Add a node with one CPU; its workers find its name in the environment."""
    variables = {NODE: name, **options.pop("env_vars", {})}
    return cluster.add_node(env_vars=variables, **options)


def remove(cluster: Cluster, node: Any) -> None:
    """Remove a node without warning: its processes are killed."""
    cluster.remove_node(node, allow_graceful=False)


def num_alive() -> int:
    return len([node for node in ray.nodes() if node["Alive"]])
