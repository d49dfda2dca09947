"""Reported retraining without a model: counts against flows over fakes, forms against counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from sisa.core.domain import Record, RecordRow
from sisa.flows.ingest import train
from sisa.flows.requests import Terms, carry_out, submit
from sisa.planning.bands import Bands
from sisa.planning.plan import Schedule
from tests.bench.command import NUM_AUTHORS
from tests.bench.deletion.counted import (
    Arrangement,
    Author,
    CountedModel,
    expected_share,
    until_base,
)
from tests.bench.deletion.retrained import (
    ARRANGEMENTS,
    BY_LABEL,
    BY_SCORE,
    HALF,
    KEYS,
    LABELLED,
    LAST,
    authors,
    base_table,
    depth_table,
    draw,
    measure,
    table,
)
from tests.bench.deletion.serving import deletions_until_base
from tests.fakes.ports import SECRET, fake_model, fake_record

BANDS = Bands(thresholds=(0.5,))


@pytest.mark.parametrize("gone", [(1,), (0, 5, 6)])
@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
@pytest.mark.parametrize(("bands", "orders"), [(None, 1), (BANDS, 1), (None, 2), (BANDS, 3)])
def test_counts_are_what_a_deletion_from_a_context_of_fakes_retrains(
    schedule: Schedule, bands: Bands | None, orders: int, gone: tuple[int, ...]
) -> None:
    arrangement = Arrangement("small", 3, 4, schedule, bands, orders)
    everyone = [Author(number, 2, 0.9 if number % 3 == 0 else 0.1) for number in range(24)]
    counted = CountedModel.trained(arrangement, everyone, SECRET)
    context = fake_model(3, arrangement.recipe, bands=bands).context
    records = {each.number: records_of(each) for each in everyone}
    train(context, [record for its in records.values() for record in its])
    held = context.stores.ledger.checkpoints()
    assert sum(each.record_epochs for each in held) == counted.record_epochs_of_all_orders
    named = [
        context.settings.assigner.id_digest(record.id) for number in gone for record in records[number]
    ]
    rows = [each for each in context.stores.ledger.lookup(named).values() if isinstance(each, RecordRow)]
    (done,) = carry_out(
        context, [submit(context, rows, (), Terms(external_id="T", approver="a person"))]
    )
    wanted = counted.without(gone)
    assert done.record_epochs_retrained == wanted.record_epochs
    assert done.record_epochs_others == wanted.record_epochs_others
    assert done.serving_depth == pytest.approx(wanted.depth_of_all)


def records_of(author: Author) -> list[Record]:
    """Return an author's records, with the author's name and risk."""
    subject, numbers = author.record().subject_id, range(author.records)
    made = [fake_record(10 * author.number + n, subject) for n in numbers]
    return [replace(each, deletion_risk=author.risk) for each in made]


@pytest.mark.parametrize("schedule", ["cumulative", "sequential"])
def test_the_form_for_one_of_many_is_sisas(schedule: Schedule) -> None:
    many = {n: Author(n, 1) for n in range(5_000)}
    found = expected_share(Arrangement("SISA", 8, 8, schedule), many, [0])
    of_shard = 2 / 3 + 1 / (3 * 8) if schedule == "cumulative" else (8 + 1) / (2 * 8)
    assert found == pytest.approx(of_shard / 8, rel=1e-3)


@pytest.mark.parametrize("bands", [None, BY_LABEL, BY_SCORE])
def test_the_form_is_the_mean_of_counts(bands: Bands | None) -> None:
    arrangement, everyone = Arrangement("banded", 8, 8, bands=bands), authors(3, bands)
    by, last = {each.number: each for each in everyone}, range(NUM_AUTHORS - LABELLED, NUM_AUTHORS)
    models = [CountedModel.trained(arrangement, everyone, bytes([key]) * 32) for key in range(20)]
    for sets in ([(number,) for number in last], [last[:10], last[10:]]):
        shares = [
            each.without(gone).record_epochs / each.record_epochs for each in models for gone in sets
        ]
        assert fmean(shares) == pytest.approx(expected_share(arrangement, by, sets[0]), rel=0.15)


def test_scores_leave_the_last_slice_to_the_labelled() -> None:
    arrangement = next(each for each in ARRANGEMENTS if each.bands == BY_SCORE)
    layout, everyone = arrangement.layout, authors(1, BY_SCORE)
    last = [each.number for each in everyone if 7 in layout.slices(each.risk)]
    assert last == list(range(NUM_AUTHORS - LABELLED, NUM_AUTHORS))
    assert {len(layout.slices(each.risk)) for each in everyone} == {1}


def test_a_stream_ends_at_the_base_about_when_the_form_says() -> None:
    arrangement = Arrangement("tiny", 2, 4, orders=2)
    found = fmean(until_base(arrangement, 1_000, seed) for seed in range(150))
    assert found == pytest.approx(deletions_until_base(2, 4, 2), rel=0.15)


def test_everything_is_reported(tmp_path: Path) -> None:
    few = ARRANGEMENTS[:4]
    found = measure(None, keys=1, seeds=1, timed_records=0, arrangements=few)
    assert [row["name"] for row in found["shares"]] == [each.name for each in few]
    assert len(list(table(found))) == 2 + sum(each.orders == 1 for each in few)
    assert len(list(base_table(found))) == 2 + len(found["until_base"])
    assert all("/" in line for line in list(depth_table(found))[2:])
    draw(found, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 1_000


def test_what_was_measured_keeps_its_bounds() -> None:
    found = json.loads(Path(__file__).with_name("retrained.json").read_text(encoding="utf-8"))
    assert (found["keys"], found["data"]) == (KEYS, "TOFU (full)")
    shares = {
        (row["name"], row["shards"], row["orders"]): {
            name: (each["measured"], each["closed_form"]) for name, each in row["shares"].items()
        }
        for row in found["shares"]
    }
    for one, form in shares["SISA as published", 8, 1].values():
        assert one == pytest.approx(form, rel=0.03)
    assert max(shares[name, 8, 1]["one_labelled"][0] for name in (HALF, LAST)) <= 0.02
    assert max(each["forget10"][0] for (_, shards, _), each in shares.items() if shards == 50) <= 0.22
    for row in found["until_base"]:
        assert row["simulated"] == pytest.approx(row["formula"], rel=0.03)
        assert abs(row["planner"] - row["formula"]) < 3 * row["planner_error"]
