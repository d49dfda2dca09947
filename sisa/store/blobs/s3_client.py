"""Connect to an object store, and turn its errors into this project's.

Failures of network, server or permission become an EnvironmentFault that names the location and the
store's code, never its text. boto3 first retries what may pass by itself (throttling, server errors,
lost connections); AWS_MAX_ATTEMPTS sets how often. Credentials and profile come from the machine's AWS
chain and are not stored here.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

from sisa.core.errors import EnvironmentFault, extra

CONNECT_S, READ_S = 10, 60
STORAGE_STEPS = {
    "NoSuchBucket": "create the bucket, or name another by `storage:`",
    "AccessDenied": "allow this machine's AWS identity to list, get, put and delete under the prefix",
    "NotImplemented": "use a store that supports If-None-Match: AWS S3, MinIO, Ceph from 2025 on",
}
CREDENTIALS = "give credentials by the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID) or a role"
AGAIN = "restore the connection to the object store, then run the same command again"


def endpoint() -> str:
    """Return AWS_ENDPOINT_URL_S3, else AWS_ENDPOINT_URL, else "" for Amazon's own store."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def region() -> str:
    """Return AWS_REGION, AWS_DEFAULT_REGION, the profile's region, or us-east-1."""
    given = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return given or _boto3().session.Session().region_name or "us-east-1"


def _boto3() -> Any:
    with extra("s3"):
        import boto3
    return boto3


@functools.cache
def boto(endpoint: str, region: str) -> Any:
    """Return the client of boto3. Raise EnvironmentFault without boto3."""
    session = _boto3().session.Session(region_name=region or None)
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard"},
        s3={"addressing_style": "path" if endpoint else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with store_errors(endpoint or "s3"):
        return session.client("s3", endpoint_url=endpoint or None, config=config)


def code_of(error: Any) -> str:
    """Return the store's code of a ClientError: `AccessDenied`, or a status such as `403`."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn boto3's errors into an EnvironmentFault that names the location."""
    _boto3()
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = code_of(error)
        raise EnvironmentFault(
            f"the object store refused {error.operation_name}",
            where=where,
            got=code,
            next_step=STORAGE_STEPS.get(code, AGAIN),
        ) from None
    except BotoCoreError as error:
        kind = type(error).__name__
        step = CREDENTIALS if "Credential" in kind or "Profile" in kind else AGAIN
        raise EnvironmentFault(
            "the object store can't be used", where=where, got=kind, next_step=step
        ) from None
