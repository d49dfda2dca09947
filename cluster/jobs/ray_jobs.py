"""Run jobs on a Ray cluster through the address of its dashboard.

The given address is used, whatever RAY_ADDRESS says. The token is found as Ray finds it (RAY_AUTH_TOKEN,
the file that RAY_AUTH_TOKEN_PATH names, `~/.ray/auth_token`) and is sent in a header of requests alone;
with RAY_AUTH_MODE=disabled none is sent. Nothing is printed.

REQUESTS_CA_BUNDLE or SSL_CERT_FILE names a private certificate authority.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import socket
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.jobs.jobs import Job, State, Submission, taken_name, unknown_job
from cluster.ray.ray_session import AUTH_MODE, has_token, read_environment
from sisa.core.errors import EnvironmentFault, InvalidInput

JOB_CONNECT_S = 5.0
YOUNG_S, AGAIN_S = 60.0, 0.5  # how long, and how often, to retry on a cluster that has just started
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # Ray prefers them to the given address
TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)


class RayJobs:
    """Run jobs on a cluster, as `Jobs`.

    Raise InvalidInput for an invalid address, EnvironmentFault if the cluster does not answer.
    """

    def __init__(self, address: str) -> None:
        self._address = check_address(address)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        with self._translated(), _as_given():
            _knock(self._address)
            self._client = JobSubmissionClient(self._address)

    def submit(self, submission: Submission) -> None:
        with self._translated():
            if self._known(submission.id):
                raise taken_name(submission.id)
            self._submit(submission)

    def get(self, job: str) -> Job:
        with self._translated(job):
            return _job(self._client.get_job_info(job))

    def all(self) -> list[Job]:
        with self._translated():
            found = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda each: (each.started_s or 0.0, each.id), reverse=True)

    def log(self, job: str) -> str:
        with self._translated(job):
            return str(self._client.get_job_logs(job))

    def follow(self, job: str) -> Iterator[str]:
        self.get(job)
        with self._translated(job), asyncio.Runner() as runner:
            pieces = self._client.tail_job_logs(job)
            try:
                while (piece := runner.run(_next(pieces))) is not None:
                    yield piece
            finally:
                # After Ctrl-C the generator may still run: closing it fails, and the runner ends it.
                with suppress(RuntimeError):
                    runner.run(pieces.aclose())

    def stop(self, job: str) -> bool:
        with self._translated(job):
            return bool(self._client.stop_job(job))

    def _submit(self, submission: Submission) -> None:
        until = time.monotonic() + YOUNG_S
        while True:
            try:
                self._client.submit_job(
                    # `exec`: signals that end the job reach the program instead of a shell
                    entrypoint=f"exec {shlex.join(submission.words)}",
                    submission_id=submission.id,
                    runtime_env={"working_dir": str(submission.folder), "env_vars": _auth_environment()},
                    metadata=dict(submission.said),
                )
                return
            except RuntimeError as error:
                # A dashboard answers before the agent that accepts jobs; no job was accepted then.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(AGAIN_S)

    def _known(self, job: str) -> bool:
        try:
            self.get(job)
        except InvalidInput:
            return False
        return True

    @contextmanager
    def _translated(self, job: str = "") -> Iterator[None]:
        """Raise the errors of Ray and of the network as errors of this program."""
        try:
            yield
        except AuthenticationError as error:
            raise EnvironmentFault(
                "the cluster does not accept the token" if has_token() else "there is no token to send",
                where=self._address,
                got=_first_line(error),
                next_step="put the cluster's token into a file and name it by RAY_AUTH_TOKEN_PATH "
                "(RAY_AUTH_MODE=disabled for a cluster that wants none)",
            ) from None
        except (OSError, aiohttp.ClientError) as error:
            raise EnvironmentFault(
                "no Ray cluster can be reached",
                where=self._address,
                expected="the address of a head node's dashboard, such as http://127.0.0.1:8265",
                got=_first_line(error),
                next_step="check the address; if the head node was lost, restart it and submit the job "
                "again: it continues from what is stored",
            ) from None
        except RuntimeError as error:
            if job and "status code 404" in str(error):
                raise unknown_job(job) from None
            raise EnvironmentFault(
                "the cluster refused the request",
                where=self._address,
                got=_first_line(error),
                next_step="see the dashboard's log on the head node",
            ) from None


def check_address(address: str) -> str:
    """Return the address of a dashboard without its last slash; raise InvalidInput if it is none."""
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.username or parts.password or parts.query or parts.fragment:
        raise InvalidInput(
            "this is not the address of a cluster's dashboard",
            expected="http://HOST:PORT or https://HOST:PORT, without user, password or query",
            next_step="name the head node and its dashboard's port, such as http://127.0.0.1:8265",
        )
    return address.rstrip("/")


def _knock(address: str) -> None:
    """Raise OSError if the dashboard does not accept a connection: Ray's client would wait for ever.

    Behind a proxy, do nothing.
    """
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    socket.create_connection((host, port), timeout=JOB_CONNECT_S).close()


@contextmanager
def _as_given() -> Iterator[None]:
    """Make Ray's client use the given address and look for a token, until the block ends."""
    former = {name: os.environ.pop(name, None) for name in OVERRIDING}
    chosen = AUTH_MODE in os.environ
    os.environ.setdefault(AUTH_MODE, "token")
    read_environment()
    try:
        yield
    finally:
        os.environ |= {name: value for name, value in former.items() if value is not None}
        if not chosen:
            del os.environ[AUTH_MODE]
        read_environment()


def _auth_environment() -> dict[str, str]:
    """Return the job's environment: it sends no token to its cluster if the user disabled tokens."""
    disabled = os.environ.get(AUTH_MODE, "").lower() == "disabled"
    return {AUTH_MODE: "disabled"} if disabled else {}


async def _next(pieces: AsyncIterator[str]) -> str | None:
    with warnings.catch_warnings():  # Ray calls aiohttp in a deprecated way
        warnings.simplefilter("ignore", DeprecationWarning)
        return await anext(pieces, None)


def _job(details: Any) -> Job:
    state: State = str(details.status)  # type: ignore[assignment]
    return Job(
        id=details.submission_id or "",
        state=state,
        exit_code=details.driver_exit_code,
        fault=details.error_type or "",
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        said=details.metadata or {},
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300] or type(error).__name__
