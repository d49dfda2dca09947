"""What vLLM may load and what it must let go of; the engine is a stand-in with AsyncLLM's methods.

`tests/integration/service/test_vllm.py` runs a real one where `VLLM` names it.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.serve import vllm_plugin
from cluster.serve.vllm_plugin import Evictions, ExportedAdapters, RevocationEndpoints
from sisa.verifier.envelope import Refused
from tests.fakes.vllm import BASE, StandIn, put

MOVES = st.lists(
    st.tuples(st.sampled_from(["put", "erase", "ask", "sweep", "unload"]), st.integers(0, 3)),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(moves=MOVES)
def test_after_a_sweep_the_engine_holds_nothing_but_what_is_exported(
    tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[str, int]]
) -> None:
    directory, engine = tmp_path_factory.mktemp("exports"), StandIn()
    evictions, exported = Evictions(ExportedAdapters(directory), engine, engine), {}
    for step, (move, shard) in enumerate([*moves, ("sweep", 0)]):
        if move == "put":
            exported[shard] = put(directory, shard, b"%d" % step)
        elif move == "erase":
            shutil.rmtree(directory / f"v1/shard-{shard:05}", ignore_errors=True)
            exported.pop(shard, None)
        elif move == "ask" and shard in exported:
            engine.ask(exported[shard])
        elif move == "unload" and engine.lora_requests:
            del engine.lora_requests[next(iter(engine.lora_requests))]  # vLLM's own: a name alone
        elif move == "sweep":
            before = set(engine.lora_requests)
            gone = asyncio.run(evictions.sweep())
            allowed = set(exported.values())
            assert set(engine.loaded.values()) <= allowed
            assert set(engine.lora_requests) == before & allowed
            assert set(engine.running.values()) & set(gone) == set()
            assert not engine.blocks & set(gone)
            standing = asyncio.run(evictions.standing())
            assert standing["nameless"] == []
            assert standing["held"] == standing["named"]


def test_a_name_is_the_digest_of_the_bytes_that_lie_there_now(tmp_path: Path) -> None:
    first = put(tmp_path, 0, b"one")
    adapters = ExportedAdapters(tmp_path)
    assert set(adapters.held()) == {first}
    second = put(tmp_path, 0, b"two")
    assert set(adapters.held()) == {second}
    (tmp_path / "v1/shard-00001").symlink_to(tmp_path / "v1/shard-00000")
    assert adapters.held() == {second: tmp_path / "v1/shard-00000"}
    assert adapters.is_for(tmp_path / "v1/shard-00000", BASE)
    assert not adapters.is_for(tmp_path / "v1/shard-00000", "another")
    renamed = ExportedAdapters(tmp_path, base="pypi:x==1")
    assert not renamed.is_for(tmp_path / "v1/shard-00000", BASE)


def test_a_revoked_adapter_leaves_and_a_doubtful_feed_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, revoked = put(tmp_path, 0, b"kept"), put(tmp_path, 1, b"revoked")
    feed = {"revoked": {}, "reinstated": [], "sequence": 1, "published": "2026-01-01T00:00:00Z"}
    feed["next_update"] = "2126-01-01T00:00:00Z"
    file = tmp_path / "feed.json"
    file.write_bytes(b"")
    monkeypatch.setattr(vllm_plugin, "verify_feed", lambda *_: feed)
    with pytest.raises(ValueError, match="public keys"):
        ExportedAdapters(tmp_path, feed=file)
    engine, keys = StandIn(), SimpleNamespace()
    adapters = ExportedAdapters(tmp_path, feed=file, keys=keys)  # type: ignore[arg-type]
    evictions = Evictions(adapters, engine, engine)
    for name in (kept, revoked):
        engine.ask(name)
    assert asyncio.run(evictions.sweep()) == []
    feed = {**feed, "revoked": {revoked: {"certificate": "", "date": ""}}, "sequence": 2}
    assert asyncio.run(evictions.sweep()) == [revoked]
    assert set(engine.loaded.values()) == set(engine.running.values()) == {kept}
    past = "2026-01-01T00:00:00Z"
    wrongs: list[dict[str, Any]] = [{"next_update": past}, {"sequence": 1}, {"revoked": {}}]
    for wrong in wrongs:
        feed, good = {**feed, **wrong}, feed
        with pytest.raises(Refused):
            adapters.held()
        assert asyncio.run(evictions.sweep()) == []
        feed = good
    assert set(adapters.held()) == {kept}


def test_the_routes_unload_whole_and_load_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, engine, app = put(tmp_path, 0, b"one"), StandIn(), FastAPI()
    monkeypatch.setenv(vllm_plugin.ADAPTERS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(vllm_plugin, "SWEEP_S", 3600)
    plugin = RevocationEndpoints()
    plugin.attach_router(app)
    app.state.openai_serving_models = engine

    async def started() -> None:
        await plugin.init_state(engine, app.state, None)
        app.state.sisa_sweeping.cancel()

    asyncio.run(started())
    client = TestClient(app)
    engine.ask(name)
    assert client.get("/v1/sisa/adapters").json()["held"] == [name]
    path = {"lora_name": "other", "lora_path": str(tmp_path)}
    assert client.post("/v1/load_lora_adapter", json=path).status_code == 400
    assert client.post("/adapters", json={"name": "other", "src": str(tmp_path)}).status_code == 400
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "other"}).status_code == 404
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).json() == {"left": [name]}
    assert (engine.loaded, engine.running, engine.blocks) == ({}, {}, set())
    engine.ask(name)
    shutil.rmtree(tmp_path / "v1")
    assert client.post("/v1/sisa/sweep").json() == {
        "left": [name], "named": [], "held": [], "nameless": [], "evicted": [name]
    }  # fmt: skip
    monkeypatch.delenv(vllm_plugin.ADAPTERS_VARIABLE)
    with pytest.raises(ValueError, match=vllm_plugin.ADAPTERS_VARIABLE):
        asyncio.run(plugin.init_state(engine, app.state, None))
