"""A BlobStore in an object store (S3 and compatible servers): blobs are objects under a prefix.

    PREFIX/NAME            a blob                    PREFIX/GROUP/PART     a part of a group

There is no rename, so a group is complete once its `manifest.json` exists. The manifest is put last, if
it does not exist yet (`If-None-Match`), and erased first; parts without it remain from an interrupted
write. One put is one request, so that no upload is left unfinished. Erasing removes every version and
delete marker of a name; where that is not allowed, a plain delete hides the name, and `purge` reports
what is kept. A lent area consists of empty objects; a worker replaces one if it still exists
(`If-Match`), and the driver copies it to its name. A pickled store holds neither keys nor tokens.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sisa.core.checkpoint_files import MANIFEST_FILE
from sisa.core.errors import EnvironmentFault, IntegrityError
from sisa.core.ports import KeptVersions
from sisa.store.blobs import s3_client
from sisa.store.blobs.files import TEMPORARY_PREFIX
from sisa.store.blobs.s3_client import code_of, store_errors

SCHEME = "s3://"
LAST = MANIFEST_FILE  # the part that completes a group
BATCH = 1000  # objects that one request may delete
ERASE_TRIES = 10
LENDERS = 16  # puts at once: a model may have thousands of stages
FEW_NAMES = 8  # up to which names are listed one by one; more: everything is listed
CONFLICT_TRIES, CONFLICT_PAUSE_S = 5, 0.2
READ_TRIES = 3
PLAIN = {"ContentType": "application/octet-stream"}
SERVED = {"checkpoint": {"ContentType": "text/plain; charset=utf-8", "CacheControl": "no-cache"}}
GONE = ("NoSuchKey", "NoSuchVersion", "404")
DENIED = ("AccessDenied", "AllAccessDisabled", "403")
NO_VERSIONS = ("NotImplemented", "MethodNotAllowed", "501", "405")  # from a server without versions


class Version(NamedTuple):
    """A version of an object, or a delete marker; readers get the `latest` one."""

    key: str
    id: str
    marker: bool
    latest: bool


@dataclass(frozen=True, slots=True)
class S3Blobs:
    """A BlobStore under a prefix of a bucket."""

    bucket: str
    prefix: str
    endpoint: str = ""
    region: str = ""
    lent: bool = False  # an area: a put replaces an empty object that the lender made

    @property
    def _boto(self) -> Any:
        return s3_client.boto(self.endpoint, self.region)

    def below(self, name: str) -> S3Blobs:
        return replace(self, prefix=self._key(name))

    def location(self, name: str = "") -> str:
        return f"{SCHEME}{self.bucket}/{self._key(name)}"

    def _key(self, name: str) -> str:
        return "/".join(each for each in (self.prefix, name) if each)

    def check_usable(self) -> None:
        """Try conditional puts, since some servers ignore them. Raise EnvironmentFault."""
        probe = f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
        try:
            first, again = self.put_new(probe, b""), self.put_new(probe, b"")
            if not first or again or self._put_if(probe, b"", IfMatch='"of-another"'):
                raise EnvironmentFault(
                    "the object store ignores conditional puts: two writers could overwrite each other",
                    where=self.location(),
                    expected="412 for If-None-Match on an object that exists, for If-Match on another",
                    next_step="use a store that supports both: AWS S3, MinIO, Ceph from 2025 on",
                )
        finally:
            self.erase([probe])

    def held(self) -> frozenset[str]:
        blobs: set[str] = set()
        groups: dict[str, set[str]] = {}
        for name, _ in self._list(""):
            group, slash, part = name.partition("/")
            if slash:
                groups.setdefault(group, set()).add(part)
            else:
                blobs.add(name)
        whole = {group if LAST in parts else TEMPORARY_PREFIX + group for group, parts in groups.items()}
        return frozenset(blobs | whole)

    def parts(self, group: str) -> frozenset[str]:
        return frozenset(name for name, _ in self.below(_group(group))._list(""))

    def num_bytes(self, name: str) -> int:
        name = _group(name)
        found = self._list(name)  # also of neighbours whose names begin alike
        return sum(
            size for each, size in found if not name or each == name or each.startswith(f"{name}/")
        )

    def _list(self, start: str) -> Iterator[tuple[str, int]]:
        """Yield (name, size) of all objects below whose names begin with `start`."""
        base = self._key("") + "/"
        with store_errors(self.location()):
            pages = self._boto.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=base + start):
                for each in page.get("Contents", ()):
                    if each["Size"] or not self.lent:
                        yield each["Key"].removeprefix(base), each["Size"]

    def get(self, name: str, what: str, num_bytes: int = -1) -> bytes:
        key = self._key(_group(name) if "/" in name else name)
        with store_errors(self.location(name)):
            from botocore import exceptions as boto

            cut_short = boto.IncompleteReadError, boto.ReadTimeoutError, boto.ResponseStreamingError
            for left in reversed(range(READ_TRIES)):
                try:
                    found = self._boto.get_object(Bucket=self.bucket, Key=key)["Body"]
                    with contextlib.closing(found):
                        return bytes(found.read(None if num_bytes < 0 else num_bytes))
                except boto.ClientError as error:
                    if code_of(error) not in GONE:
                        raise
                    break
                except cut_short:  # in the middle of the bytes, where boto3 does not try again
                    if not left:
                        raise
        raise IntegrityError(
            f"a {what} is missing",
            where=self.location(name),
            got="no object",
            next_step="restore the object from a backup, or train the model again",
        )

    def put(self, name: str, data: bytes) -> None:
        where = {"Bucket": self.bucket, "Key": self._key(name)}
        with store_errors(self.location(name)):
            if self.lent:  # replace the lender's object, if it still exists: the store does both at once
                where["IfMatch"] = self._boto.head_object(**where)["ETag"]
            self._boto.put_object(**where, Body=data, **SERVED.get(name, PLAIN))  # a log's is published

    def put_new(self, name: str, data: bytes) -> bool:
        """Store a blob unless one has that name, and return whether it was stored."""
        return self._put_if(name, data, IfNoneMatch="*")

    def _put_if(self, name: str, data: bytes, **condition: str) -> bool:
        """Store a blob on a condition: 412 means that it fails, 409 that another put is under way."""
        where = {"Bucket": self.bucket, "Key": self._key(name), **condition}
        with store_errors(self.location(name)):
            from botocore.exceptions import ClientError

            for left in reversed(range(CONFLICT_TRIES)):
                try:
                    self._boto.put_object(**where, Body=data)
                except ClientError as error:
                    if code_of(error) in ("PreconditionFailed", "412"):
                        return False
                    if code_of(error) not in ("ConditionalRequestConflict", "409") or not left:
                        raise
                    time.sleep(CONFLICT_PAUSE_S * (CONFLICT_TRIES - left))
                else:
                    return True
        return False

    def put_group(self, name: str, parts: Mapping[str, bytes]) -> None:
        """Store a group, its manifest last; another writer of the same name puts the same parts."""
        if LAST in self.parts(name):
            return
        for part, data in parts.items():
            if part != LAST:
                self.put(f"{name}/{part}", data)
        if self.lent:
            self.put(f"{name}/{LAST}", parts[LAST])
        else:
            self.put_new(f"{name}/{LAST}", parts[LAST])

    def lend(self, area: str, names: Collection[str]) -> S3Blobs:
        lent, boto = self.below(area), self._boto

        def put(name: str) -> None:
            boto.put_object(Bucket=self.bucket, Key=lent._key(name), Body=b"")

        with store_errors(lent.location()), ThreadPoolExecutor(LENDERS) as pool:
            list(pool.map(put, sorted(names)))
        return replace(lent, lent=True)

    def accept(self, area: str, name: str) -> None:
        lent = replace(self.below(area), lent=True)
        if parts := lent.parts(name):
            if LAST not in parts or LAST in self.parts(name):
                return  # half a group, or one that is here already
            moved = [f"{name}/{part}" for part in sorted(parts, key=lambda part: part == LAST)]
        else:
            moved = [name] if lent.num_bytes(name) else []
        with store_errors(self.location(name)):
            for each in moved:
                source = {"Bucket": self.bucket, "Key": lent._key(each)}
                self._boto.copy_object(Bucket=self.bucket, Key=self._key(each), CopySource=source)

    def erase(self, names: Collection[str]) -> None:
        halves = {_group(each) for each in names if each.startswith(TEMPORARY_PREFIX)}
        doomed = {*names, *(each for each in halves if LAST not in self.parts(each))}
        if len(doomed) > FEW_NAMES:
            self._erase("", doomed)
        else:
            for name in sorted(doomed):
                self._erase(name, {name})

    def clear(self) -> None:
        self._erase("", None)

    def _erase(self, start: str, names: Collection[str] | None) -> None:
        """Erase the named objects whose names begin with `start`, or all of them."""
        base = self._key("") + "/"

        def doomed(key: str) -> bool:
            name = key.removeprefix(base)
            return names is None or name in names or name.partition("/")[0] in names

        with contextlib.suppress(_Refused):
            for _ in range(ERASE_TRIES):  # a worker may put a version between listing and deleting
                versions = [each for each in self._versions(start) if doomed(each.key)]
                if not versions:
                    return
                if self._delete(versions):
                    break
        self._hide([key for name, _ in self._list(start) if doomed(key := self._key(name))])

    def purge(self, *, dry_run: bool = False) -> tuple[KeptVersions, ...]:
        try:
            old = [each for each in self._versions("") if not each.latest]
        except _Refused as error:
            why = f"whether it keeps old versions is unknown: {error}"
            return () if self._never_had_versions() else (KeptVersions(self.location(), why),)
        refused = {} if dry_run else self._delete(old)
        kept: dict[str, list[str]] = {}
        for each in old:
            if dry_run or each in refused:
                name = each.key.removeprefix(self._key("") + "/").partition("/")[0]
                kept.setdefault(name, []).append(refused.get(each, "not purged yet"))
        return tuple(
            KeptVersions(self.location(name), f"{len(why)} old versions: {', '.join(sorted(set(why)))}")
            for name, why in sorted(kept.items())
        )

    def _versions(self, start: str) -> list[Version]:
        """Return all versions and delete markers, manifests first. Raise _Refused if that is denied."""
        from botocore.exceptions import ClientError

        found: list[Version] = []
        with store_errors(self.location()):
            pages = self._boto.get_paginator("list_object_versions")
            try:
                for page in pages.paginate(Bucket=self.bucket, Prefix=f"{self._key('')}/{start}"):
                    for each in page.get("Versions", ()):
                        latest = bool(each["IsLatest"])
                        found.append(Version(each["Key"], each["VersionId"], False, latest))
                    for each in page.get("DeleteMarkers", ()):
                        found.append(Version(each["Key"], each["VersionId"], True, False))
            except ClientError as error:
                if code_of(error) in (*DENIED, *NO_VERSIONS):
                    raise _Refused(code_of(error)) from None
                raise
        return sorted(found, key=lambda each: (not _is_last(each.key), each.latest))

    def _never_had_versions(self) -> bool:
        from botocore.exceptions import ClientError

        with store_errors(self.location()):
            try:
                return not self._boto.get_bucket_versioning(Bucket=self.bucket).get("Status")
            except ClientError as error:
                return code_of(error) in NO_VERSIONS

    def _delete(self, versions: Collection[Version]) -> dict[Version, str]:
        """Delete versions, then the markers over them; return the refused ones with their codes."""
        refused: dict[Version, str] = {}
        for marker in (False, True):  # a marker stays as long as the version that it hides
            stuck = {each.key for each in refused}
            doomed = [each for each in versions if each.marker == marker and each.key not in stuck]
            errors = self._delete_objects([{"Key": each.key, "VersionId": each.id} for each in doomed])
            codes = {(each["Key"], each.get("VersionId", "")): each["Code"] for each in errors}
            for each in doomed:
                code = codes.get((each.key, each.id)) or codes.get((each.key, ""), "")
                if code and code not in GONE:
                    refused[each] = code
        return refused

    def _hide(self, keys: Collection[str]) -> None:
        """Hide what still exists by plain deletes. Raise EnvironmentFault if one is refused."""
        ordered = sorted(keys, key=lambda key: not _is_last(key))
        errors = self._delete_objects([{"Key": key} for key in ordered])
        if codes := sorted({each["Code"] for each in errors} - set(GONE)):
            raise EnvironmentFault(
                "the object store refused to delete objects",
                where=self.location(),
                got=f"{len(errors)} refused: {', '.join(codes)}",
                next_step="allow s3:DeleteObject, or lift the lock, then run the same command again",
            )

    def _delete_objects(self, doomed: list[dict[str, str]]) -> list[dict[str, str]]:
        errors: list[dict[str, str]] = []
        with store_errors(self.location()):
            for at in range(0, len(doomed), BATCH):
                batch = {"Objects": doomed[at : at + BATCH], "Quiet": True}
                errors += self._boto.delete_objects(Bucket=self.bucket, Delete=batch).get("Errors", [])
        return errors


def bucket_at(uri: str) -> S3Blobs:
    """Return the store at `s3://BUCKET[/PREFIX]`; the server comes from this machine's environment."""
    bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
    return S3Blobs(bucket, prefix.strip("/"), s3_client.endpoint(), s3_client.region())


class _Refused(Exception):
    """The store does not allow listing versions."""


def _is_last(key: str) -> bool:
    return key.endswith(f"/{LAST}")


def _group(name: str) -> str:
    """Return the group that a name of `held` stands for."""
    return name.removeprefix(TEMPORARY_PREFIX)
