"""Say who calls, and what they may do: `may(scope)` is a dependency of every endpoint.

    @requests_router.post("/requests")
    def submit(caller: Annotated[Caller, Depends(may("submit"))]) -> ...

A service without tokens listens on loopback alone, and its caller is `local`, who may do everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from fastapi import Request

from cluster.serve.app import Refusal, service_of

Scope = Literal["answer", "read", "submit", "decide", "erase", "access", "operate"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))


@dataclass(frozen=True)
class Caller:
    """Who sent a request: a token's name and role, what it may do, and the shards it may read."""

    name: str
    role: str
    scopes: frozenset[Scope]
    shards: frozenset[int] | None = None  # None: all


LOCAL = Caller("local", "local", SCOPES)


class Tokens(Protocol):
    """The tokens that a service accepts."""

    def caller(self, bearer: str) -> Caller | None:
        """Return whose token this is; None if nobody's."""


def may(scope: Scope) -> Callable[[Request], Caller]:
    """Return the dependency that admits callers with a scope. It raises Refusal: 401 or 403."""

    def admitted(request: Request) -> Caller:
        tokens = service_of(request).tokens
        caller = LOCAL if tokens is None else tokens.caller(_bearer(request))
        if caller is None:
            step = "send `Authorization: Bearer TOKEN`"
            challenge = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, "no valid token", "invalid_api_key", next_step=step, headers=challenge)
        request.state.caller = caller
        if scope not in caller.scopes:
            raise Refusal(403, "the token does not allow this", expected=f"a token with scope {scope}")
        return caller

    return admitted


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""
