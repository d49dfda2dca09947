"""The tables of the READMEs are those that `python -m tests.bench.tables` writes."""

from __future__ import annotations

import pytest

from sisa.config.config import keys
from tests.bench.tables import generated, reference, stale


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
