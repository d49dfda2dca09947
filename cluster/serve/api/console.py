"""Serve the console at `/console`, and two endpoints that it needs: `/shards` and `/requests/plan`.

The page, its style and its script are package data, without a build step. They hold no data and need no
token; everything they show comes from the service's API, with the caller's token. The policy lets a
browser load and call this service alone, forbids scripts in markup, and makes it refuse data as HTML
(Trusted Types). The style is that of the officer's page (`cluster/render/templates/look.css`).

>>> [each for each in POLICY.split("; ") if each.startswith("script")]
["script-src 'self'"]
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from cluster.render.deletions import forget_plan
from cluster.serve.api.requests import RecordsNamed
from cluster.serve.domain import TheService
from cluster.serve.problems import Refusal
from cluster.serve.tokens import MayRead, MaySubmit

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PAGES = {
    "index.html": ("cluster.serve", "console", "text/html"),
    "console.css": ("cluster.serve", "console", "text/css"),
    "console.js": ("cluster.serve", "console", "text/javascript"),
    "look.css": ("cluster.render", "templates", "text/css"),
}
_OF_SHARD = ("shard", "records", "head", "depth", "served", "served_depth", "num_stages", "converged")

console_router = APIRouter(tags=["console"])


@console_router.get("/console", include_in_schema=False)
@console_router.get("/console/{name}", include_in_schema=False)
def console_page(name: str = "index.html") -> Response:
    """Return a file of the console."""
    if name not in PAGES:
        raise Refusal(404, "the console has no such file")
    package, folder, kind = PAGES[name]
    return Response(files(package).joinpath(folder, name).read_bytes(), 200, HEADERS, kind)


@console_router.get("/shards", summary="Every slice of every shard, and the heads that are served")
def shards(service: TheService, caller: MayRead) -> dict[str, Any]:
    """Return which slices are clean, retrained, rolled back, restricted or empty."""
    rows = [
        {
            **{name: getattr(shard, name) for name in _OF_SHARD},
            "slices": [asdict(each) for each in slices],
        }
        for shard, slices in caller.view(service.model).shards()
    ]
    return {"model": service.model.id, "shards": rows}


@console_router.post("/requests/plan", summary="What a request would erase and retrain")
def plan_request(named: RecordsNamed, service: TheService, caller: MaySubmit) -> dict[str, Any]:
    """Return the cost of a deletion, and exact copies and near-duplicates of its records."""
    model = caller.view(service.model)
    planned = model.plan_forget(named.ids, subject=named.subject)
    copies, near = model.alike(named.ids, subject=named.subject)
    return forget_plan(planned).json | {"copies": copies, "near": [asdict(each) for each in near]}
