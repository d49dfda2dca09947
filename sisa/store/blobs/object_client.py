"""Connections to an object store, one of each kind per process, and its errors as this project's.

Failures of network, server or permission become an EnvironmentFault that names the location and the
store's code, never its text. Both libraries first retry what may pass by itself (throttling, server
errors, lost connections); AWS_MAX_ATTEMPTS says how often. Credentials and profile come from the
machine's AWS chain and are not stored here.

>>> host_of("http://127.0.0.1:9000")
('http', '127.0.0.1:9000')
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from sisa.core.errors import EnvironmentFault

CONNECT_S, READ_S = 10, 60
DEFAULT_ATTEMPTS = 3
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
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return named or _boto3().session.Session().region_name or "us-east-1"


def host_of(url: str) -> tuple[str, str]:
    """Return an endpoint's scheme and host, as pyarrow takes them."""
    parts = urlsplit(url if "://" in url else f"https://{url}")
    return parts.scheme, parts.netloc


def _boto3() -> Any:
    try:
        return importlib.import_module("boto3")
    except ImportError:
        raise EnvironmentFault(
            "storage on s3:// needs boto3, which is not installed",
            expected="the extra `s3` of this project",
            next_step="pip install 'deletion-ready-model[s3]', on every node",
        ) from None


@functools.cache
def boto(endpoint: str, region: str) -> Any:
    """Return the client of boto3. Raise EnvironmentFault without boto3."""
    session = _boto3().session.Session(region_name=region or None)
    from botocore.config import Config

    options = {"addressing_style": "path" if endpoint else "auto"}
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard"},
        s3=options,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    with store_errors(endpoint or "s3"):
        return session.client("s3", endpoint_url=endpoint or None, config=config)


@functools.cache
def arrow(endpoint: str, region: str) -> Any:
    """Return the file system of pyarrow."""
    from pyarrow import fs

    scheme, host = host_of(endpoint) if endpoint else ("https", None)
    attempts = int(os.environ.get("AWS_MAX_ATTEMPTS") or DEFAULT_ATTEMPTS)
    return fs.S3FileSystem(
        region=region or None,
        scheme=scheme,
        endpoint_override=host,
        connect_timeout=CONNECT_S,
        request_timeout=READ_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )


def code_of(error: Any) -> str:
    """Return the store's code of a ClientError: `AccessDenied`, or a status such as `403`."""
    return str(error.response.get("Error", {}).get("Code", ""))


@contextlib.contextmanager
def store_errors(where: str) -> Iterator[None]:
    """Turn the libraries' errors into an EnvironmentFault that names the location."""
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
        raise _unreached(where, kind, step) from None
    except OSError as error:  # from pyarrow; its message contains the code
        code = _arrow_code(str(error))
        step = STORAGE_STEPS["AccessDenied"] if code == "ACCESS_DENIED" else AGAIN
        raise _unreached(where, code, step) from None


def _unreached(where: str, got: str, step: str) -> EnvironmentFault:
    return EnvironmentFault("the object store can't be used", where=where, got=got, next_step=step)


def _arrow_code(message: str) -> str:
    """Return the error code in pyarrow's message, without the rest of it.

    >>> _arrow_code("When reading 'x': AWS Error ACCESS_DENIED during HeadObject operation: none")
    'ACCESS_DENIED'
    """
    _, found, rest = message.partition("AWS Error ")
    return rest.split(" ", 1)[0] if found else "an operating-system error"
