"""Stand in for vLLM's engine, and put exports where it finds them."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.serve.vllm_plugin import CONFIG, WEIGHTS
from sisa.core.digest import sha256_hex

BASE = "some/base"


@dataclass
class StandIn:
    """The parts of an AsyncLLM and of OpenAIServingModels that the plugin meets.

    As in vLLM, a request of an adapter that the engine does not hold loads it from its path again.
    """

    loaded: dict[int, str] = field(default_factory=dict)
    running: dict[str, str] = field(default_factory=dict)  # request: adapter
    blocks: set[str] = field(default_factory=set)  # adapters of prefix blocks
    lora_requests: dict[str, Any] = field(default_factory=dict)
    lora_resolver_lock: Any = field(default_factory=lambda: defaultdict(asyncio.Lock))
    count: int = 0

    @property
    def output_processor(self) -> Any:
        states = {key: SimpleNamespace(lora_name=name) for key, name in self.running.items()}
        return SimpleNamespace(request_states=states)

    async def abort(self, keys: list[str], internal: bool) -> None:
        assert internal
        for each in keys:
            del self.running[each]

    async def remove_lora(self, number: int) -> bool:
        return self.loaded.pop(number, None) is not None

    async def list_loras(self) -> set[int]:
        return set(self.loaded)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        if self.running and not reset_running_requests:
            return False
        self.blocks.clear()
        return True

    def ask(self, name: str) -> None:
        self.count += 1
        self.lora_requests.setdefault(name, SimpleNamespace(lora_int_id=self.count))
        self.loaded[self.lora_requests[name].lora_int_id] = name
        self.running[f"request {self.count}"] = name
        self.blocks.add(name)


def put(directory: Path, shard: int, content: bytes) -> str:
    folder = directory / f"v1/shard-{shard:05}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_text(json.dumps({"base_model_name_or_path": BASE}))
    return sha256_hex(content)
