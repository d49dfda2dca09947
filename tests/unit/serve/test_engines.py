"""What engines hold of a model, asked over real HTTP of the plugin's routes with a stand-in engine."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from cluster.cli.cli import run
from cluster.serve.engines import EngineHolds, engines_hold
from cluster.serve.runner import carry_out_requests
from cluster.serve.vllm_plugin import Evictions, ExportedAdapters, RevocationEndpoints
from sisa.config.config import EngineSource, ServiceBlock
from tests.fakes.vllm import StandIn, put
from tests.models.programs.local_server import served


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


def engine_app(engine: StandIn, exports: Path, token: str) -> FastAPI:
    app = FastAPI()
    RevocationEndpoints().attach_router(app)
    app.state.sisa = Evictions(ExportedAdapters(exports), engine, engine)

    @app.middleware("http")
    async def guarded(request: Request, call_next: Any) -> Any:  # as vLLM's --api-key
        if request.headers.get("authorization") != f"Bearer {token}":
            return JSONResponse({}, 401)
        return await call_next(request)

    return app


def model(url: str, exported: list[str], token_file: Path | None) -> Any:
    exports = [SimpleNamespace(adapter_sha256=each, standing=None) for each in exported]
    exports.append(SimpleNamespace(adapter_sha256="stale", standing="gone"))
    block = ServiceBlock(engines=(EngineSource(url=url, token_file=token_file),))
    return SimpleNamespace(
        status=lambda: SimpleNamespace(exports=exports), config=SimpleNamespace(service=block)
    )


def test_an_erased_adapter_is_named_until_the_engine_sweeps(tmp_path: Path, engine: StandIn) -> None:
    exports, token = tmp_path / "exports", tmp_path / "token"
    kept, erased = put(exports, 0, b"kept"), put(exports, 1, b"erased")
    for each in (kept, erased):
        engine.ask(each)
    token.write_text("secret\n")
    with served(engine_app(engine, exports, "secret")) as url:
        asked = model(url, [kept], token)
        (exports / "v1/shard-00001/adapter_model.safetensors").unlink()
        (found,) = engines_hold(asked)
        assert found == EngineHolds(url, tuple(sorted([kept, erased])), (erased,))
        assert not found.clean
        (found,) = engines_hold(asked, sweep=True)
        assert found == EngineHolds(url, (kept,))
        assert found.clean
        del engine.lora_requests[kept]
        (found,) = engines_hold(asked)
        assert (found.nameless, found.clean) == (1, False)
        (found,) = engines_hold(model(url, [kept], None))
        assert (found.fault, found.clean) == ("HTTPError 401", False)
        (found,) = engines_hold(model(url, [kept], tmp_path / "no-token"))
        assert (found.fault, found.clean) == ("FileNotFoundError", False)
    (found,) = engines_hold(asked)
    assert (found.held, found.clean) == ((), False)
    assert "URLError" in found.fault
    assert asyncio.run(engine.list_loras()) == {1}


def test_a_token_follows_no_redirect(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    got, elsewhere = list[str](), FastAPI()

    @elsewhere.get("/{path:path}")
    async def take(path: str) -> Response:
        got.append(path)
        return JSONResponse({"held": [], "named": [], "nameless": []})

    with served(elsewhere) as target:
        moved = FastAPI()
        moved.get("/{path:path}")(lambda path: RedirectResponse(f"{target}/{path}"))
        with served(moved) as url:
            (found,) = engines_hold(model(url, [], tmp_path / "token"))
    assert (found.fault, got) == ("HTTPError 307", [])


def test_a_model_without_engines_is_not_read() -> None:
    block = SimpleNamespace(service=ServiceBlock())
    bare: Any = SimpleNamespace(status=lambda: pytest.fail("its status was read"), config=block)
    assert engines_hold(bare, sweep=True) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://user@host/", "ftp://x", "http://a b"])
def test_an_engine_has_a_plain_web_address(url: str) -> None:
    with pytest.raises(ValueError, match="url"):
        EngineSource(url=url)


def test_the_command_fails_while_an_engine_holds_what_was_erased(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [EngineHolds("http://one", ("aa", "bb"), ("bb",), 1), EngineHolds("http://two", ("aa",))]
    swept: list[bool] = []

    def holds(_model: Any, *, sweep: bool) -> list[EngineHolds]:
        swept.append(sweep)
        return found

    monkeypatch.setattr("cluster.serve.engines.engines_hold", holds)
    monkeypatch.setattr("cluster.cli.serve.opened", lambda _directory: nullcontext())
    assert run(["engines", "-m", str(tmp_path)]) == 7
    assert capsys.readouterr().out.splitlines() == [
        "http://one: holds 2 adapters, 1 of them erased; 1 more without a name",
        "http://two: holds 1 adapter, 0 of them erased; 0 more without a name",
        "  erased: bb",
    ]
    del found[0]
    assert run(["engines", "-m", str(tmp_path), "--sweep", "--json"]) == 0
    (each,) = json.loads(capsys.readouterr().out)["engines"]
    assert (each["url"], each["clean"], swept) == ("http://two", True, [False, True])


def test_the_runner_has_engines_sweep_after_a_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    swept: list[bool] = []
    held = EngineHolds("http://one", fault="URLError")

    def holds(_model: Any, *, sweep: bool) -> list[EngineHolds]:
        swept.append(sweep)
        return [held]

    monkeypatch.setattr("cluster.serve.runner.engines_hold", holds)
    done: list[str] = []
    now = SimpleNamespace(choice="run now")
    calls = {"queue": lambda: None, "plan_run": lambda: now, "run": lambda: tuple(done)}
    busy = cast(Any, SimpleNamespace(directory=tmp_path, **calls))
    assert carry_out_requests(busy) == ()
    assert swept == []
    done.append("request")
    assert len(carry_out_requests(busy)) == 1
    assert swept == [True]
    assert "http://one holds 0 erased adapters URLError" in caplog.text
