"""Run a real S3 server in its own process: moto's, on a free port of the loopback.

It keeps everything in memory and ends with the tests. It accepts any credentials; with `enforced`, only
those of a user with limited permissions. Unlike Amazon, moto lists objects as soon as they are put.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from sisa.store.blobs.s3_blobs import S3Blobs

START_S = 60.0


@dataclass(frozen=True)
class Server:
    """Describe the server by its address."""

    url: str

    def client(self, service: str = "s3") -> Any:
        """Return a client that the code under test does not share."""
        return _client(self.url, service)

    def bucket(self, name: str, *, versions: bool = False, lock: bool = False) -> str:
        """Make a bucket, one that keeps versions, or one that also allows object locks."""
        self.client().create_bucket(Bucket=name, ObjectLockEnabledForBucket=lock)
        if versions:
            enabled = {"Status": "Enabled"}
            self.client().put_bucket_versioning(Bucket=name, VersioningConfiguration=enabled)
        return name

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Return all objects that readers get."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        keys = [each["Key"] for page in pages for each in page.get("Contents", ())]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def versions(self, bucket: str) -> dict[tuple[str, str], bytes | None]:
        """Return all versions by key and version; the value of a delete marker is None."""
        client = self.client()
        found: dict[tuple[str, str], bytes | None] = {}
        for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket):
            for each in page.get("Versions", ()):
                place = {"Bucket": bucket, "Key": each["Key"], "VersionId": each["VersionId"]}
                found[each["Key"], each["VersionId"]] = client.get_object(**place)["Body"].read()
            for each in page.get("DeleteMarkers", ()):
                found[each["Key"], each["VersionId"]] = None
        return found

    @contextlib.contextmanager
    def enforced(self, name: str, denied: list[str]) -> Iterator[Mapping[str, str]]:
        """Require credentials until the block ends; yield those of a user without these permissions."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        allow = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
        deny = {"Effect": "Deny", "Action": denied, "Resource": "*"}
        policy = {"Version": "2012-10-17", "Statement": [allow, deny]}
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        self._ask_for_credentials("0")
        try:
            yield {
                "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
                "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
            }
        finally:
            self._ask_for_credentials("inf")

    def _ask_for_credentials(self, after: str) -> None:
        plain = {"Content-Type": "text/plain"}  # a form's data would be parsed
        address = f"{self.url}/moto-api/reset-auth"
        request = urllib.request.Request(address, data=after.encode(), headers=plain)  # noqa: S310
        with urllib.request.urlopen(request, timeout=10):  # noqa: S310
            pass


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """Start the server, wait until it answers, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env=clean, stdout=quiet, stderr=quiet)
    try:
        server = Server(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_S
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail("the S3 server does not start")
                time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()


@functools.cache
def _client(url: str, service: str) -> Any:
    import boto3

    nobody = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client(service, endpoint_url=url, region_name="us-east-1", **nobody)


@functools.cache
def _shared_bucket(server: Server, versions: bool) -> str:
    return server.bucket("versioned" if versions else "plain", versions=versions)


def fresh_blobs(server: Server, *rooms: str, versions: bool = True) -> S3Blobs:
    """Return an unused prefix, by default in a bucket that keeps versions."""
    place = S3Blobs(_shared_bucket(server, versions), uuid.uuid4().hex, server.url, "us-east-1")
    for room in rooms:
        place = place.below(room)
    return place


def environment(server: Server) -> dict[str, str]:
    """Return the variables that point the code under test at the server, with invented credentials."""
    return {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "2",
    }
