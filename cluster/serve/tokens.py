"""Authenticate callers, and check their scopes: every endpoint names the scope that it needs.

    @requests_router.post("/requests")
    def submit(caller: MaySubmit) -> ...

A token is 256 random bits, shown once. `MODEL/tokens.json` (mode 0600) keeps its SHA-256; a slow hash
would help only for words that people choose. The file is read for every request, so that a new or a
revoked token counts at once, in every replica. A bearer is compared with every token, each in constant
time. When a token was last used is not stored.

A service without the file listens on loopback alone, and its caller is `local`, who may do everything.
Once the file exists, tokens are demanded, even if all of them have expired.

>>> sorted(ROLES["officer"] - ROLES["operator"])
['access', 'decide']
>>> sorted(ROLES["operator"] - ROLES["officer"])
['erase', 'operate']
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from cluster.serve.problems import Refusal
from sisa.config.config import ServiceBlock
from sisa.core.block import Block
from sisa.core.errors import ConfigConflict, IntegrityError, InvalidInput
from sisa.flows.wiring.upper_houses import TOKENS
from sisa.model import Model
from sisa.store.blobs import files

Scope = Literal["answer", "read", "submit", "decide", "erase", "access", "operate"]
Role = Literal["reader", "officer", "operator"]

SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
_READER: frozenset[Scope] = frozenset({"answer", "read"})
ROLES: Mapping[Role, frozenset[Scope]] = {
    "reader": _READER,
    "officer": _READER | {"submit", "decide", "access"},
    "operator": _READER | {"submit", "erase", "operate"},
}
OF_THE_WHOLE: frozenset[Scope] = frozenset({"erase", "operate"})  # not for tokens of some shards

PREFIX = "sisa_"  # scanners for leaked secrets recognise it
TOKEN_BYTES = 32
MAX_TOKEN_CHARS = 128
DAYS = 90
FAILURES_PER_MINUTE = 30  # of one address; then 429 instead of 401
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True)
class Caller:
    """The sender of an HTTP request: a token's name and role, its scopes, and its shards."""

    name: str
    role: str
    scopes: frozenset[Scope]
    shards: frozenset[int] | None = None  # None: all
    partition: str = ""  # `Model.partition`, by which the shards are numbered

    def view(self, model: Model) -> Model:
        """Return the model as this caller may see it; its errors reveal nothing of other shards."""
        return model if self.shards is None else model.within(self.shards, self.partition)


LOCAL = Caller("local", "local", SCOPES)


class AccessToken(Block):
    """A token in tokens.json; a revoked one has no digest."""

    name: str
    role: Role
    scopes: tuple[Scope, ...]
    shards: tuple[int, ...] | None
    partition: str
    made_at: str
    expires_at: str
    revoked_at: str | None = None
    sha256: str | None

    def state(self, now: datetime) -> Literal["active", "expired", "revoked"]:
        """Return whether it is valid."""
        if self.sha256 is None:
            return "revoked"
        return "active" if now < datetime.fromisoformat(self.expires_at) else "expired"

    @property
    def caller(self) -> Caller:
        """Return the caller who sends it."""
        shards = None if self.shards is None else frozenset(self.shards)
        return Caller(self.name, self.role, frozenset(self.scopes), shards, self.partition)


class _File(Block):
    tokens: tuple[AccessToken, ...] = ()


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Tokens:
    """The tokens of a model, with limits on the calls of each and on failed attempts."""

    def __init__(
        self,
        directory: Path,
        per_minute: int = ServiceBlock().rate_per_minute,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        owner: str | None = None,
    ) -> None:
        """Take a model's directory; `per_minute` limits the calls of each token to this process.

        `owner` is the SHA-256 of the token in `service.json`, which only the owner of the directory can
        read: its caller is `LOCAL`, without a limit. If it is empty, there is no such file: a token is
        always demanded.
        """
        self._directory, self._path, self._now, self._owner = directory, directory / TOKENS, now, owner
        self._rate = MovingWindowRateLimiter(MemoryStorage())
        self._calls = RateLimitItemPerMinute(per_minute, namespace="calls")
        self._failures = RateLimitItemPerMinute(FAILURES_PER_MINUTE, namespace="failures")
        self._demanded = owner == "" or self._path.exists()

    def demanded(self) -> bool:
        """Return whether callers need a token: there is a file, or was one; losing it admits nobody."""
        self._demanded = self._demanded or self._path.exists()
        return self._demanded

    def listed(self) -> list[tuple[AccessToken, str]]:
        """Return all tokens with their states, by name."""
        now = self._now()
        return sorted(((each, each.state(now)) for each in self._read()), key=lambda e: e[0].name)

    def check_listening(self, host: str) -> None:
        """Raise ConfigConflict if others than this machine could call and no token is active."""
        if is_loopback(host) or any(state == "active" for _, state in self.listed()):
            return
        raise ConfigConflict(
            "the service would listen to other machines, and no token is active",
            where="service.host",
            expected="127.0.0.1, ::1 or localhost, or tokens",
            got=host,
            next_step="`sisa token add -m DIR NAME --role reader` makes one",
        )

    def add(
        self,
        name: str,
        role: Role,
        *,
        scopes: Collection[Scope] = (),
        shards: Collection[int] | None = None,
        partition: str = "",
        days: int = DAYS,
    ) -> tuple[AccessToken, str]:
        """Make a token and return it with its text, which is not stored.

        `scopes` narrow the role. Raise InvalidInput, or ConfigConflict for a name that is in use.
        """
        chosen = frozenset(scopes) or ROLES[role] - (OF_THE_WHOLE if shards is not None else frozenset())
        _check(name, role, chosen, shards)
        text, now = PREFIX + secrets.token_urlsafe(TOKEN_BYTES), self._now()
        made = AccessToken(
            name=name,
            role=role,
            scopes=tuple(sorted(chosen)),
            shards=None if shards is None else tuple(sorted(set(shards))),
            partition=partition if shards is not None else "",
            made_at=_shown(now),
            expires_at=_shown(now + timedelta(days=days)),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        )
        with self._changing() as held:
            for each in held:
                if each.name.casefold() == name.casefold() and each.state(now) == "active":
                    raise ConfigConflict(
                        "a token of this name is in use",
                        got=each.name,
                        next_step="revoke it first, or choose another name: a name is one person's",
                    )
            held[:] = [each for each in held if each.name.casefold() != name.casefold()]
            held.append(made)
        return made, text

    def revoke(self, name: str) -> AccessToken:
        """End a token at once. Raise InvalidInput for an unknown name."""
        with self._changing() as held:
            for at, each in enumerate(held):
                if each.name.casefold() == name.casefold() and each.sha256 is not None:
                    ended = {"sha256": None, "revoked_at": _shown(self._now())}
                    held[at] = each.model_copy(update=ended)
                    return held[at]
        raise InvalidInput("no token of this name can be revoked", next_step="`sisa token list`")

    def caller(self, bearer: str) -> Caller | None:
        """Return the caller of a token; None if it is unknown, expired or revoked."""
        if not bearer.isascii() or len(bearer) > MAX_TOKEN_CHARS:
            return None
        given, now, found = hashlib.sha256(bearer.encode()).hexdigest(), self._now(), None
        if self._owner and hmac.compare_digest(given, self._owner):
            return LOCAL
        for each in self._read():
            same = hmac.compare_digest(each.sha256 or "", given)
            if same and each.state(now) == "active":
                found = each.caller
        return found

    def check_rate(self, caller: Caller) -> None:
        """Raise Refusal (429 with Retry-After) for a token that calls too often."""
        if caller is not LOCAL:
            self._hit(self._calls, caller.name, "this token has sent too many requests")

    def fail(self, address: str) -> None:
        """Count a failed attempt. Raise Refusal as `check_rate` for an address that fails too often."""
        self._hit(self._failures, address, "too many failed attempts")

    def _hit(self, limit: RateLimitItem, whose: str, what: str) -> None:
        if not self._rate.hit(limit, whose):
            wait_s = max(
                1, math.ceil(self._rate.get_window_stats(limit, whose).reset_time - time.time())
            )
            headers = {"Retry-After": str(wait_s)}
            expected = f"at most {limit.amount} a minute"
            raise Refusal(429, what, "rate_limit_exceeded", expected=expected, headers=headers)

    def _read(self) -> tuple[AccessToken, ...]:
        """Return all tokens. Raise IntegrityError if others may have written the file."""
        try:
            with self._path.open("rb") as file:
                found, data = os.fstat(file.fileno()), file.read()
        except FileNotFoundError:
            return ()
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or found.st_uid not in (os.getuid(), 0):
            raise _damaged(self._path, "a file that others can write")
        try:
            return _File.model_validate_json(data).tokens
        except ValueError:
            raise _damaged(self._path, "something else") from None

    @contextmanager
    def _changing(self) -> Iterator[list[AccessToken]]:
        """Yield a list of all tokens, and write it at the end; one process at a time."""
        with files.disk_errors(self._directory), files.opened_directory(self._directory) as handle:
            files.take_lock(handle, self._directory, "is changing this model's tokens")
            held = list(self._read())
            yield held
            body = {"tokens": [each.model_dump(mode="json") for each in held]}
            files.write_atomic(self._path, json.dumps(body, indent=1).encode() + b"\n")


def _check(name: str, role: Role, scopes: frozenset[Scope], shards: Collection[int] | None) -> None:
    if not _NAME.fullmatch(name) or name.casefold() == LOCAL.name:
        raise InvalidInput(
            "a token can't have this name",
            expected=f"1 to 64 letters, digits and ._@- in ASCII, and not `{LOCAL.name}`",
        )
    if beyond := scopes - ROLES[role]:
        raise InvalidInput(
            f"a token of role {role} can't have these scopes",
            expected=f"among {', '.join(sorted(ROLES[role]))}",
            got=", ".join(sorted(beyond)),
        )
    if shards is not None and (whole := scopes & OF_THE_WHOLE):
        raise InvalidInput(
            "a token for some shards can't have scopes that concern the whole model",
            got=", ".join(sorted(whole)),
            next_step="leave them out, or --shards",
        )
    if shards is not None and not shards:
        raise InvalidInput("a token for some shards needs one", next_step="name a shard")


def _shown(time_: datetime) -> str:
    return time_.isoformat(timespec="seconds")


def _damaged(path: Path, got: str) -> IntegrityError:
    return IntegrityError(
        "the tokens can't be used",
        where=str(path),
        expected="a file as `sisa token add` writes it, which its owner alone can write",
        got=got,
        next_step="restore it, or remove it and add tokens again",
    )


_bearer = HTTPBearer(auto_error=False, description="A token that `sisa token add` printed.")


def admitted(
    request: Request,
    needed: SecurityScopes,
    given: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> Caller:
    """Return the caller, who has the scopes of an endpoint. Raise Refusal: 401, 403 or 429."""
    tokens: Tokens | None = request.app.state.service.tokens
    if tokens is None or not tokens.demanded():
        caller = _local(request)
    else:
        caller = _known(tokens, request, given.credentials if given else "")
    request.state.caller = caller
    if not caller.scopes.issuperset(needed.scopes):
        expected = f"a token with scope {needed.scope_str}"
        raise Refusal(403, "the token does not allow this", expected=expected)
    return caller


MayAnswer = Annotated[Caller, Security(admitted, scopes=["answer"])]
MayRead = Annotated[Caller, Security(admitted, scopes=["read"])]
MaySubmit = Annotated[Caller, Security(admitted, scopes=["submit"])]
MayDecide = Annotated[Caller, Security(admitted, scopes=["decide"])]
MayErase = Annotated[Caller, Security(admitted, scopes=["erase"])]
MayAccess = Annotated[Caller, Security(admitted, scopes=["access"])]
MayOperate = Annotated[Caller, Security(admitted, scopes=["operate"])]


def _known(tokens: Tokens, request: Request, bearer: str) -> Caller:
    caller = tokens.caller(bearer)
    if caller is None:
        tokens.fail(request.client.host if request.client else "")
        step = "send `Authorization: Bearer TOKEN`"
        challenge = {"WWW-Authenticate": "Bearer"}
        raise Refusal(401, "no valid token", "invalid_api_key", next_step=step, headers=challenge)
    tokens.check_rate(caller)
    return caller


def _local(request: Request) -> Caller:
    """Return the caller on this machine. Raise Refusal for a page of another site in a browser here."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise Refusal(403, "a page of another site sent this", next_step="use a token")
    return LOCAL
