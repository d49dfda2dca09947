"""Tables of READMEs are those that `python -m tests.bench.tables` writes; results hold no text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sisa.config.config import keys
from tests.bench.tables import generated, reference, stale

RECORDED = [each for kind in ("*.json", "*.json.gz") for each in Path(__file__).parent.rglob(kind)]
LONGEST = 100  # characters of a text in results; answers of a benchmark are not among them


@pytest.mark.torch
def test_no_table_is_stale() -> None:
    assert list(stale()) == [], "run `python -m tests.bench.tables`"


def test_what_stands_between_the_marks_is_replaced() -> None:
    page = "Before.\n\n<!-- table: one -->\n| old |\n<!-- end of table -->\n\nAfter.\n"
    wanted = "Before.\n\n<!-- table: one -->\n\n| new |\n\n<!-- end of table -->\n\nAfter.\n"
    assert generated(page, {"one": lambda: iter(["| new |"])}) == wanted


def test_every_table_has_a_place() -> None:
    with pytest.raises(ValueError, match="two"):
        generated("<!-- table: one -->\n<!-- end of table -->\n", {"two": lambda: iter([])})


def test_the_reference_has_every_key_and_what_it_means() -> None:
    lines = list(reference())
    for name, info in keys().items():
        (line,) = (each for each in lines if each.startswith(f"| `{name}` |"))
        assert f"| {info.description} |" in line
    by_key = {line.split("`")[1]: line for line in lines[2:]}
    assert by_key["lora_r"].startswith("| `lora_r` | an integer from 1 to 4096 | `8` | ")
    assert by_key["lora_r"].endswith("| retrain |")
    assert by_key["base_model.scratch.directory"].endswith("| none |")
    assert (
        by_key["sisa.aggregation.min_score"].split(" | ")[1] == "a number from -2 to 2 or 'auto' or null"
    )


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a JSON value with the key that it is under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else ((key, each) for each in value):
            yield from texts(each, name)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_results_are_numbers_without_texts_and_paths(path: Path) -> None:
    data = path.read_bytes()
    for key, text in texts(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)):
        assert key == "why" or len(text) <= LONGEST  # a run says why it ended
        assert not text.startswith(("/", "~", "."))
