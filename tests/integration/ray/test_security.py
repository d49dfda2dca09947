"""A cluster reveals nothing without its token, and no secret to workers, logs or `ps`.

A real training of an encrypted model runs on a local Ray. The secrets (the model's partition key, the
keys of its keyring, and the token of the Ray) are searched for raw, in hexadecimal and in base64.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle

import sisa
from cluster.ray import executor as ray_executor
from cluster.ray import tasks as ray_tasks
from sisa.core.events import Event, SliceProgress
from tests.integration.ray.secret_forms import forms
from tests.models.programs.clusters import share_ray
from tests.models.tiny_model import KEY, PEOPLE, write_run

pytestmark = [pytest.mark.ray, pytest.mark.torch]


@dataclass
class Seen:
    """Everything that left the driver in a training, as bytes by place, and the listening addresses."""

    places: dict[str, bytes] = field(default_factory=dict)
    listening: set[str] = field(default_factory=set)
    secrets: set[bytes] = field(default_factory=set)
    token_mode: int = 0
    stranger: int = 0
    gcs_address: str = ""

    def leaks(self) -> list[str]:
        return sorted(
            place for place, data in self.places.items() if any(each in data for each in self.secrets)
        )


def processes() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def look_at_processes(seen: Seen) -> None:
    for each in processes():
        with contextlib.suppress(psutil.Error, OSError):
            name = f"{each.pid} {each.name()}"
            seen.places[f"command line of {name}"] = Path(f"/proc/{each.pid}/cmdline").read_bytes()
            seen.places[f"environment of {name}"] = Path(f"/proc/{each.pid}/environ").read_bytes()
            found = each.net_connections(kind="inet")
            seen.listening |= {at.laddr.ip for at in found if at.status == psutil.CONN_LISTEN}


def ask(address: str, environment: Mapping[str, str]) -> int:
    """Return the exit code of a client whose only credentials are in this environment."""
    program = (
        "import sys; from ray._raylet import GcsClient;"
        "print(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', namespace=None, timeout=10))"
    )
    return subprocess.run(
        [sys.executable, "-c", program, address],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}, **environment},
        capture_output=True,
        timeout=120,
    ).returncode


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Seen:
    session = share_ray()
    folder = tmp_path_factory.mktemp("security")
    block = {"shards": 1, "slices": 1}
    options: Mapping[str, Any] = {"encrypt": True, "keyring": "keys", "witness": "witness"}
    path = write_run(
        folder, tiny_base, PEOPLE[:4], sisa_block=block, cluster={"num_workers": 1}, **options
    )
    found = Seen()
    run_tasks = ray_tasks.run_tasks

    def watched(tasks: Sequence[Any], *arguments: Any, **named: Any) -> Any:
        for number, task in enumerate(tasks):
            found.places[f"task {number}"] = cloudpickle.dumps(task)
        return run_tasks(tasks, *arguments, **named)

    def report(event: Event) -> None:
        if isinstance(event, SliceProgress) and not found.listening:
            look_at_processes(found)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_executor, "run_tasks", watched)
        sisa.train_model(path, executor="ray", report=report)
    assert session.private_dir is not None
    token = session.private_dir / "token"
    found.token_mode = token.stat().st_mode & 0o777
    for file in (each for each in session.private_dir.rglob("*") if each.is_file() and each != token):
        found.places[f"file {file.name}"] = file.read_bytes()
    found.gcs_address = ray.get_runtime_context().gcs_address
    found.secrets = {token.read_bytes().strip(), *forms(bytes.fromhex(KEY))}
    for file in (folder / "keys").rglob("*"):
        if file.is_file() and file.stat().st_size == 32:
            found.secrets |= forms(file.read_bytes())
    return found


def test_no_secret_leaves_the_driver(seen: Seen) -> None:
    assert len(seen.secrets) > 6
    places = " ".join(seen.places)
    for kind in ("command line of", "environment of", "file raylet.out", "task 0"):
        assert kind in places
    assert any(b"train_remotely" in data for data in seen.places.values())
    assert seen.leaks() == []


def test_a_leak_would_be_seen(seen: Seen) -> None:
    other = Seen({"task 9": b"key: " + KEY.encode() + b"."}, secrets=seen.secrets)
    assert other.leaks() == ["task 9"]


def test_everything_listens_on_loopback_alone(seen: Seen) -> None:
    assert seen.listening
    assert {each.removeprefix("::ffff:") for each in seen.listening} <= {"127.0.0.1", "::1"}


def test_who_lacks_the_token_is_refused(seen: Seen) -> None:
    assert seen.token_mode == 0o600
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    with_it = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token}
    assert ask(seen.gcs_address, with_it) == 0
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    for environment in ({"RAY_AUTH_MODE": "disabled"}, wrong):
        assert ask(seen.gcs_address, environment) != 0
