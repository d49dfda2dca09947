"""Run jobs on a Ray cluster through the address of its dashboard.

The given address is used; RAY_ADDRESS is ignored. The token is found as Ray finds it (RAY_AUTH_TOKEN,
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
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from cluster.jobs.jobs import Job, State, Submission, taken_name, unknown_job
from cluster.ray.session import AUTH_MODE, changed_environment, first_line, has_token
from sisa.core.errors import EnvironmentFault, InvalidInput

JOB_CONNECT_S = 5.0
YOUNG_S, RETRY_YOUNG_S = 60.0, 0.5  # how long, and how often, to retry on a cluster that just started
TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)


class RayJobs:
    """Run jobs on a cluster. Raise InvalidInput for an invalid address, else as `Jobs`."""

    def __init__(self, address: str) -> None:
        self._address = check_address(address)
        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        # Ray prefers these variables to the given address, and needs the mode "token" to look for one.
        overriding = dict.fromkeys(("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"))
        given = {**overriding, AUTH_MODE: os.environ.get(AUTH_MODE, "token")}
        with self._translated(), changed_environment(given):
            _knock(self._address)
            self._client = JobSubmissionClient(self._address)

    def submit(self, submission: Submission) -> None:
        try:
            self.get(submission.id)
        except InvalidInput:
            with self._translated():
                self._submit(submission)
        else:
            raise taken_name(submission.id)

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
        # A job sends no token to its cluster if the user disabled tokens.
        disabled = os.environ.get(AUTH_MODE, "").lower() == "disabled"
        environment = {AUTH_MODE: "disabled"} if disabled else {}
        until = time.monotonic() + YOUNG_S
        while True:
            try:
                self._client.submit_job(
                    # `exec`: signals that end the job reach the program instead of a shell
                    entrypoint=f"exec {shlex.join(submission.words)}",
                    submission_id=submission.id,
                    runtime_env={"working_dir": str(submission.folder), "env_vars": environment},
                    metadata=dict(submission.metadata),
                )
                return
            except RuntimeError as error:
                # A dashboard answers before the agent that accepts jobs; no job was accepted then.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(RETRY_YOUNG_S)

    @contextmanager
    def _translated(self, job: str = "") -> Iterator[None]:
        """Raise the errors of Ray and of the network as errors of this program."""
        try:
            yield
        except AuthenticationError as error:
            raise EnvironmentFault(
                "the cluster does not accept the token" if has_token() else "there is no token to send",
                where=self._address,
                got=first_line(error),
                next_step="put the cluster's token into a file and name it by RAY_AUTH_TOKEN_PATH "
                "(RAY_AUTH_MODE=disabled for a cluster that wants none)",
            ) from None
        except (OSError, aiohttp.ClientError) as error:
            raise EnvironmentFault(
                "no Ray cluster can be reached",
                where=self._address,
                expected="the address of a head node's dashboard, such as http://127.0.0.1:8265",
                got=first_line(error),
                next_step="check the address; if the head node was lost, restart it and submit the job "
                "again: it continues from what is stored",
            ) from None
        except RuntimeError as error:
            if job and "status code 404" in str(error):
                raise unknown_job(job) from None
            raise EnvironmentFault(
                "the cluster refused the request",
                where=self._address,
                got=first_line(error),
                next_step="see the dashboard's log on the head node",
            ) from None


def check_address(address: str) -> str:
    """Return the address of a dashboard without a slash at the end. Raise InvalidInput."""
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
    """Raise OSError if the dashboard does not accept a connection: Ray's client would wait for ever."""
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme]
    if parts.scheme not in getproxies() or proxy_bypass(host):
        socket.create_connection((host, port), timeout=JOB_CONNECT_S).close()


async def _next(pieces: AsyncIterator[str]) -> str | None:
    with warnings.catch_warnings():  # Ray calls aiohttp in a deprecated way
        warnings.simplefilter("ignore", DeprecationWarning)
        return await anext(pieces, None)


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or "",
        state=cast(State, str(details.status)),
        exit_code=details.driver_exit_code,
        fault=details.error_type or "",
        started_s=details.start_time / 1000 if details.start_time else None,
        ended_s=details.end_time / 1000 if details.end_time else None,
        metadata=details.metadata or {},
    )
