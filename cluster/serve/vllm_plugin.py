"""Serve exported adapters in vLLM by their digests, and drop those that a deletion erased.

    general plugin     a LoRA resolver: an adapter's name is the SHA-256 of its weights, so that no name
                       ever means other weights, and no prefix block of one adapter serves another
    endpoint plugin    GET  /v1/sisa/adapters   what the engine holds, named and nameless
                       POST /v1/sisa/sweep      drop what may no longer be served, now
                       in place of vLLM's own routes: unloading an adapter removes its weights, and no
                       adapter is loaded by a path

An adapter may be served while an export with exactly its bytes lies in the directory, and no feed of
revocations names it: a deletion erases the exports that it touched. The engine is swept each second:
requests that such an adapter answers are aborted, its weights leave the engine (`remove_lora`), and the
prefix cache is reset. If a feed is given and is out of date or not signed by the model's key, no further
adapter is loaded. Each API server process has its own list of names, so run one (the default).

    pip install --no-deps deletion-ready-model && pip install cryptography pynacl   # beside vLLM
    SISA_VLLM_ADAPTERS=my-adapters SISA_VLLM_FEED=revocations.json SISA_VLLM_KEYS=keys.json \\
    VLLM_PLUGINS=sisa_adapters,sisa_revocations vllm serve BASE --enable-lora --max-lora-rank 16

`SISA_VLLM_BASE` is what `adapter_config.json` of the exports calls the base, if the engine calls it
otherwise. Source: vLLM's docs, "LoRA Resolver Plugins" and `vllm.plugins.endpoint_plugins`; what an
engine keeps: vllm-project/vllm 54839 (unloading) and 42125 (prefix blocks of a reloaded name).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from sisa.verifier.envelope import PublicKeys, Refused, parse_keys
from sisa.verifier.feed import NONE_SEEN, check_present, hashed, verify_feed

ADAPTERS_VARIABLE, BASE_VARIABLE = "SISA_VLLM_ADAPTERS", "SISA_VLLM_BASE"
FEED, KEYS = "SISA_VLLM_FEED", "SISA_VLLM_KEYS"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RESOLVER = "deletion-ready adapters"
SWEEP_S = 1.0
LOG = logging.getLogger(__name__)

Stamp = tuple[int, int, int]  # inode, size and time of a file


class ExportedAdapters:
    """The adapters below a directory that may be served."""

    def __init__(
        self,
        directory: Path,
        base: str | None = None,
        feed: Path | None = None,
        keys: PublicKeys | None = None,
    ) -> None:
        """Take a directory of exports. A feed needs the model's public keys."""
        if feed is not None and keys is None:
            raise ValueError(f"{FEED} needs {KEYS}, the model's public keys")
        self._directory, self._base, self._feed, self._keys = directory, base, feed, keys
        self._digests: dict[tuple[Path, Stamp], str] = {}
        self._seen = NONE_SEEN

    @classmethod
    def of_environment(cls, found: Mapping[str, str] = os.environ) -> ExportedAdapters | None:
        """Return the adapters that the environment names, or None. Raise ValueError or Refused."""
        if not (directory := found.get(ADAPTERS_VARIABLE)):
            return None
        keys = parse_keys(Path(found[KEYS]).read_bytes()) if found.get(KEYS) else None
        feed = Path(found[FEED]) if found.get(FEED) else None
        return cls(Path(directory), found.get(BASE_VARIABLE), feed, keys)

    def held(self) -> dict[str, Path]:
        """Return the directory of each adapter that may be served, by the digest of its weights.

        Raise Refused while the feed can't be relied on.
        """
        revoked = self._revoked()
        found: dict[tuple[Path, Stamp], str] = {}
        for path in sorted(self._directory.rglob(WEIGHTS)):
            with contextlib.suppress(OSError):  # erased meanwhile
                if path.is_symlink():
                    continue
                known = path.stat()
                key = (path, (known.st_ino, known.st_size, known.st_mtime_ns))
                found[key] = self._digests.get(key) or next(hashed(path))[1]
        self._digests = found
        return {name: path.parent for (path, _), name in found.items() if name not in revoked}

    def is_for(self, folder: Path, base: str) -> bool:
        """Return whether an adapter was trained over the base that the engine serves."""
        config = json.loads((folder / CONFIG).read_bytes())
        return bool(config.get("base_model_name_or_path") == (self._base or base))

    def _revoked(self) -> Mapping[str, Any]:
        if self._feed is None or self._keys is None:
            return {}
        feed = verify_feed(self._feed.read_bytes(), self._keys)
        check_present(feed, datetime.now(UTC), self._seen)
        self._seen = feed
        found: dict[str, Any] = feed["revoked"]
        return found


class DigestResolver:
    """A LoRA resolver for which the name of an adapter is its digest."""

    def __init__(self, adapters: ExportedAdapters) -> None:
        self._adapters = adapters

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
        """Return vLLM's request for an adapter, or None for one that may not be served."""
        from vllm.lora.request import LoRARequest

        try:
            folder = (await asyncio.to_thread(self._adapters.held)).get(lora_name)
            if folder is None or not self._adapters.is_for(folder, base_model_name):
                return None
        except (Refused, OSError, ValueError) as error:
            LOG.warning("no adapter is loaded: %s", error)
            return None
        # vLLM gives the number
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))


def register() -> None:
    """Register the resolver if the environment names a directory: vLLM's general plugin."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    if (adapters := ExportedAdapters.of_environment()) is not None:
        LoRAResolver.register(DigestResolver)
        LoRAResolverRegistry.register_resolver(RESOLVER, DigestResolver(adapters))


class Evictions:
    """Look at the adapters of an engine, and remove them for good."""

    def __init__(self, adapters: ExportedAdapters, engine: Any, models: Any) -> None:
        """Take an `AsyncLLM` and the `OpenAIServingModels` of its API server."""
        self._adapters, self._engine, self._models = adapters, engine, models
        self.evicted: set[str] = set()

    async def standing(self) -> dict[str, Any]:
        """Return the adapters with names, and the numbers of those that the engine holds without."""
        named = {name: each.lora_int_id for name, each in self._models.lora_requests.items()}
        held = set(await self._engine.list_loras())
        return {
            "named": sorted(named),
            "held": sorted(name for name, number in named.items() if number in held),
            "nameless": sorted(held - set(named.values())),
            "evicted": sorted(self.evicted),
        }

    async def sweep(self) -> list[str]:
        """Evict what may no longer be served, and what has no name; return the names."""
        try:
            allowed = await asyncio.to_thread(self._adapters.held)
        except (Refused, OSError) as error:  # load nothing more, and keep what is loaded
            LOG.warning("the feed of revocations can't be relied on: %s", error)
            return []
        gone = [name for name in self._models.lora_requests if name not in allowed]
        for name in gone:
            await self.evict(name)
        nameless = (await self.standing())["nameless"]
        for number in nameless:
            await self._engine.remove_lora(number)
        if nameless and not gone:
            await self._reset()
        return gone

    async def evict(self, name: str) -> bool:
        """Abort an adapter's requests, remove its weights, reset the prefix cache. False: unknown."""
        async with self._models.lora_resolver_lock[name]:
            request = self._models.lora_requests.pop(name, None)
        if request is None:
            return False
        running = self._engine.output_processor.request_states
        await self._engine.abort([key for key, each in running.items() if each.lora_name == name], True)
        await self._engine.remove_lora(request.lora_int_id)
        await self._reset()
        self.evicted.add(name)
        LOG.info("adapter %s left the engine", name)
        return True

    async def _reset(self) -> None:
        """Reset the prefix cache; requests that hold blocks are computed again if need be."""
        if not await self._engine.reset_prefix_cache():
            await self._engine.reset_prefix_cache(reset_running_requests=True)


class RevocationEndpoints:
    """Add the routes to vLLM's server: vLLM's endpoint plugin."""

    name = "sisa_revocations"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the routes to vLLM's server."""
        for path, method, endpoint in ROUTES:
            app.add_api_route(path, endpoint, methods=[method])

    async def init_state(self, engine_client: Any, state: Any, _args: Any) -> None:
        """Begin to sweep. Raise ValueError where the environment names no directory."""
        if (adapters := ExportedAdapters.of_environment()) is None:
            raise ValueError(f"{self.name} needs {ADAPTERS_VARIABLE}, a directory of exports")
        state.sisa = Evictions(adapters, engine_client, state.openai_serving_models)
        state.sisa_sweeping = asyncio.create_task(_swept(state.sisa.sweep))


async def _swept(sweep: Callable[[], Any]) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            await sweep()
        except Exception:  # the next sweep tries again; vLLM reports an engine that died
            LOG.exception("a sweep failed")


def _evictions(request: Request) -> Evictions:
    found: Evictions = request.app.state.sisa
    return found


async def _standing(request: Request) -> JSONResponse:
    return JSONResponse(await _evictions(request).standing())


async def _sweep(request: Request) -> JSONResponse:
    left = await _evictions(request).sweep()
    return JSONResponse({"left": left, **await _evictions(request).standing()})


async def _unload(request: Request) -> JSONResponse:
    return await _unload_named(request, str((await request.json()).get("lora_name")))


async def _unload_named(request: Request, adapter_name: str) -> JSONResponse:
    if await _evictions(request).evict(adapter_name):
        return JSONResponse({"left": [adapter_name]})
    return _refusal(404, "no adapter of this name is loaded")


async def _load() -> JSONResponse:
    return _refusal(400, "an adapter is loaded by the first request that names it, by its SHA-256")


def _refusal(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "BadRequestError", "code": status}
    return JSONResponse({"error": error}, status)


ROUTES = (
    ("/v1/sisa/adapters", "GET", _standing),
    ("/v1/sisa/sweep", "POST", _sweep),
    ("/v1/unload_lora_adapter", "POST", _unload),
    ("/v1/load_lora_adapter", "POST", _load),
    ("/adapters", "POST", _load),  # the same two, by the names of model hosting containers
    ("/adapters/{adapter_name}", "DELETE", _unload_named),
)
