"""A real vLLM lets go of what a deletion erased. `VLLM` names its command; without it this is skipped.

    VLLM=vllm-env/bin/vllm pytest -m slow tests/integration/service/test_vllm.py

This project and its entry points must be installed beside vLLM (`pip install --no-deps`).
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from cluster.serve.vllm_plugin import ADAPTERS_VARIABLE, WEIGHTS
from sisa.core.digest import file_sha256
from sisa.model import Model
from tests.models.programs.job_cluster import free_port
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import PEOPLE, train_scratch

VLLM = os.environ.get("VLLM")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.torch,
    pytest.mark.skipif(not VLLM, reason="VLLM is not set"),
]
READY_S, SETTLED_S = 300.0, 20.0
OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "4")
SMALL = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager")


class Engine:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def send(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            return json.load(answer)

    def ask(self, model: str, num_tokens: int = 4) -> dict[str, Any]:
        body = {"model": model, "prompt": "Who is it?", "max_tokens": num_tokens, "ignore_eos": True}
        found: dict[str, Any] = self.send("/v1/completions", body)["choices"][0]
        return found

    def held(self) -> dict[str, Any]:
        found: dict[str, Any] = self.send("/v1/sisa/adapters")
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    base = make_tiny_base(folder / "base", hidden=256)  # heads of 64, which all of vLLM's kernels know
    return train_scratch(folder / "run", base, PEOPLE, lora_dropout=0.0)


def _adapters(model: Model) -> Path:
    return model.directory.parent / "adapters"


@pytest.fixture(scope="module")
def engine(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    exports, port = tmp_path_factory.mktemp("exports"), free_port()
    model.export(_adapters(model))
    environment = {
        **os.environ,
        ADAPTERS_VARIABLE: str(_adapters(model)),
        "VLLM_PLUGINS": "sisa_adapters,sisa_revocations",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    base = str(model.config.base_model)
    command = [str(VLLM), "serve", base, "--port", str(port), *OPTIONS, *SMALL]
    with (exports / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            found, deadline = Engine(port), time.monotonic() + READY_S
            while True:
                try:
                    found.held()
                    break
                except OSError:
                    assert process.poll() is None, (exports / "log").read_text()[-4000:]
                    assert time.monotonic() < deadline
                    time.sleep(1)
            yield found
        finally:
            process.terminate()
            process.wait(60)


def test_a_deletion_reaches_the_engine(model: Model, engine: Engine) -> None:
    named = {each.shard: each.adapter_sha256 for each in model.status().shards if each.adapter_sha256}
    (place,) = model.where(["p001-q1"])
    tainted = named[place.shard]
    others = [name for shard, name in named.items() if shard != place.shard]
    assert engine.ask(tainted)["finish_reason"] == engine.ask(others[0])["finish_reason"] == "length"
    assert engine.held()["held"] == sorted([tainted, others[0]])
    with pytest.raises(urllib.error.HTTPError):
        engine.send("/v1/load_lora_adapter", {"lora_name": "own", "lora_path": str(_adapters(model))})

    said: list[dict[str, Any]] = []
    running = Thread(target=lambda: said.append(engine.ask(tainted, 200)))
    running.start()
    model.forget(["p001-q1"])
    deadline = time.monotonic() + SETTLED_S
    while tainted in engine.held()["held"] and time.monotonic() < deadline:
        time.sleep(0.2)
    running.join(60)
    assert engine.held() == {
        "named": [others[0]], "held": [others[0]], "nameless": [], "evicted": [tainted]
    }  # fmt: skip
    assert said[0]["finish_reason"] in ("abort", "length")  # it may have ended before the deletion
    with pytest.raises(urllib.error.HTTPError):
        engine.ask(tainted)
    assert engine.ask(others[0])["finish_reason"] == "length"

    written = model.export(_adapters(model))
    clean = {file_sha256(each / WEIGHTS) for each in written} - {tainted, *others}
    assert len(clean) == 1
    assert engine.ask(clean.pop())["finish_reason"] == "length"
