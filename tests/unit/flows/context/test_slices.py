"""The records of slices are embedded in parts, and each part is reported."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sisa.core.events import EmbeddingProgress, Event
from sisa.flows.context import slices
from tests.fakes.ports import fake_model, fake_record


@pytest.mark.parametrize(("at_once", "parts"), [(5, [5, 10]), (7, [7]), (14, []), (20, [])])
def test_parts_of_an_embedding_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, at_once: int, parts: list[int]
) -> None:
    seen: list[Event] = []
    context = replace(fake_model().context, report=seen.append)
    records = [fake_record(number) for number in range(7)]  # each a text and a prompt
    whole = slices.embed_records(context, records)
    monkeypatch.setattr(slices, "EMBEDDED_AT_ONCE", at_once)
    found = slices.embed_records(context, records)
    assert seen == [EmbeddingProgress(done, 14) for done in parts]
    assert all(map(np.array_equal, found, whole))
    assert slices.embed_records(context, []) == []
