"""Churn bands: the slices of a risk, invalid bands, and risks as records bring them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sisa.config.runfile import parse_run_file
from sisa.core.digest import Keyed
from sisa.core.domain import Record, Risk
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.planning.bands import Bands, risk_problems
from sisa.planning.layout import Assigner, Layout
from tests.fakes.ports import fake_record

BANDS = Bands(thresholds=(0.01, 0.1), classes={"staff": 0.0, "trial": 0.3}, unknown=0.05)
RUN = {"datasets": [{"path": "a.jsonl"}], "output_dir": "model"}
risks = st.none() | st.floats(0, 2) | st.sampled_from(["staff", "trial"])


def record(number: int, risk: Risk, subject: str | None = None) -> Record:
    return replace(fake_record(number, subject), deletion_risk=risk)


def parsed(bands: Any) -> Any:
    data = {**RUN, "sisa": {"slices": 3, "bands": bands}}
    return parse_run_file(yaml.safe_dump(data), "run.yaml")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6, unique=True), st.integers(0, 20), risks)
def test_bands_share_out_all_slices_in_order(edges: list[float], more: int, risk: Risk) -> None:
    bands = Bands(thresholds=tuple(sorted(edges)), classes=BANDS.classes)
    num_slices = bands.num_bands + more
    owned = [bands.slices(each, num_slices) for each in (0.0, *bands.thresholds)]
    if bands.thresholds[0] == 0:
        owned[0] = range(bands.slices(0.0, num_slices).start)
    assert [slice_ for each in owned for slice_ in each] == list(range(num_slices))
    assert all(len(each) >= 1 for each in owned)
    assert bands.slices(risk, num_slices) in owned


@given(risks, risks, st.integers(3, 12))
def test_a_likelier_deletion_never_stands_earlier(one: Risk, other: Risk, num_slices: int) -> None:
    def value(risk: Risk) -> float:
        return BANDS.unknown if risk is None else BANDS.classes[risk] if isinstance(risk, str) else risk

    low, high = sorted((one, other), key=value)
    assert BANDS.slices(low, num_slices).start <= BANDS.slices(high, num_slices).start


@given(risks, st.integers(0, 500), st.sampled_from([None, "ada"]))
def test_a_risk_chooses_the_slice_within_its_band_and_never_the_shard(
    risk: Risk, number: int, subject: str | None
) -> None:
    keyed = Keyed(b"1" * 32)
    banded = Assigner(keyed, Layout(8, 9, BANDS))
    plain = Assigner(keyed, Layout(8, 9))
    shard, slice_ = banded.place(record(number, risk, subject))
    assert shard == plain.place(record(number, None, subject))[0]
    assert slice_ in BANDS.slices(risk, 9)
    assert plain.place(record(number, risk, subject)) == plain.place(record(number, None, subject))


def test_a_risk_is_content_and_none_leaves_the_digest_as_it_was() -> None:
    digests = {
        Assigner(Keyed(b"1" * 32), Layout(1, 1)).record_digest(record(1, risk))
        for risk in (None, 0.0, 0.3, "trial")
    }
    assert len(digests) == 4
    assert len(json.loads(record(1, None).canonical())) == 4


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({}, "sisa.bands.thresholds missing; expected a list"),
        ({"thresholds": []}, "bands need a threshold"),
        ({"thresholds": [0.2, 0.1]}, "thresholds must ascend"),
        ({"thresholds": [0.1, 0.1]}, "thresholds must ascend"),
        ({"thresholds": [-0.1]}, "sisa.bands.thresholds[0] expected a number of at least 0, got -0.1"),
        ({"thresholds": [True]}, "sisa.bands.thresholds[0] expected a number"),
        ({"thresholds": [0.1], "classes": {"a": -1.0}}, "sisa.bands.classes.a expected a number of at"),
        ({"thresholds": [0.1], "quantiles": 4}, "unknown key; known here: thresholds, classes, unknown"),
        ([0.1], "expected a mapping or null"),
        ({"thresholds": [0.1, 0.2, 0.3]}, "4 bands, more than the 3 slices"),
    ],
)
def test_impossible_bands_are_refused(bands: Any, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parsed(bands)
    (problem,) = caught.value.problems
    assert message in f"{problem.where.partition(': ')[2]} {problem.what}"


def test_risks_are_read_from_lines_and_from_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = tmp_path / "a.jsonl"
    lines.write_text(
        '{"id": "r0", "text": "x", "deletion_risk": 1}\n{"id": "r1", "text": "y"}\n'
        '{"id": "r2", "text": "z", "deletion_risk": "trial"}\n'
    )
    table = tmp_path / "b.parquet"
    pq.write_table(
        pa.table({"id": ["p0", "p1"], "text": ["x", "y"], "deletion_risk": [0.25, None]}), table
    )
    found = {each.id: each.deletion_risk for each in read_records([lines, table])}
    assert found == {"r0": 1.0, "r1": None, "r2": "trial", "p0": 0.25, "p1": None}
    assert isinstance(found["r0"], float)


def test_unnamed_classes_and_two_risks_of_a_subject_are_reported_together_by_position() -> None:
    given = [record(0, "vip"), record(1, 0.1, "ada"), record(2, 0.2, "ada"), record(3, 0.1, "ada")]
    found = [(each.where, each.what) for each in risk_problems(BANDS, given)]
    assert [where for where, _ in found] == ["record 1", "record 3"]
    assert "not a class" in found[0][1]
    assert "record 2" in found[1][1]
    assert not any("ada" in what or "vip" in what for _, what in found)
    assert [each.where for each in risk_problems(None, given)] == ["record 3"]
