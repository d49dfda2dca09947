"""Invalid sets and settings, order and rate as functions of the settings, outcomes, and refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from approx.methods import method
from approx.methods.distillation import whp
from approx.methods.method import Alternative
from approx.methods.preference import altpo
from approx.methods.registry import METHODS, make_method
from approx.patches.patch_report import outcome
from approx.patches.texts import overlaps
from approx.unlearning.compute import Compute
from approx.unlearning.examples import Sets, check_sets
from approx.unlearning.schedule import Pace, learning_rate_at, plan_steps
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge
from approx.unlearning.written.preferred import Writing, with_preferred
from approx.unlearning.written.refusals import REFUSALS, refuse_all
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens, tokenize

pytestmark = pytest.mark.torch


def example(*ids: int) -> Tokens:
    return Tokens(list(ids), [NO_LOSS, *ids[1:]])


def problems_of(sets: Sets, name: str, values: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(InvalidInput) as caught:
        check_sets(sets, make_method(name, values))
    return [each.where for each in caught.value.problems]


def test_empty_sets() -> None:
    assert problems_of(Sets([]), "npo") == ["forget", "retain"]
    assert problems_of(Sets([]), "gradient_ascent") == ["forget"]
    assert problems_of(Sets([example(1, 2)]), "kl_minimisation") == ["retain"]
    check_sets(Sets([example(1, 2)]), make_method("npo", {"retain_weight": 0.0}))


def test_missing_preferred_answers_and_subjects() -> None:
    two = [example(1, 2), example(1, 3)]
    for_edits = Sets(two, [example(5, 6)], [example(1, 9), example(1, 8)], subjects=[0])
    assert problems_of(for_edits, "rome") == ["subjects"]
    assert problems_of(Sets(two), "dpo") == ["preferred"]
    assert problems_of(Sets(two, preferred=[example(1, 9)]), "dpo") == ["preferred"]
    check_sets(Sets(two, preferred=[example(1, 9), example(1, 8)]), make_method("dpo"))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what writes preferred answers; return the kinds that were written."""
    kinds: list[str] = []

    def record(kind: Alternative, found: Any) -> Any:
        def write(*_: Any) -> Any:
            kinds.append(kind)
            return found

        return write

    monkeypatch.setattr(method, "refuse_all", record("refusals", []))
    alternates = SimpleNamespace(alternates=[], cost=None)
    monkeypatch.setattr(altpo, "write_alternates", record("alternates", alternates))
    labelled = SimpleNamespace(examples=[], num_tokens=0)
    monkeypatch.setattr(whp, "write_generic_labels", record("generic labels", labelled))
    monkeypatch.setattr(whp, "learn_by_heart", lambda *_: Compute(0, 0, 0, 0))
    return kinds


@pytest.mark.parametrize("name", METHODS)
def test_a_method_reads_the_answers_that_it_prefers(written: list[str], name: str) -> None:
    made = make_method(name)
    with_preferred(made, Writing(None, None, [], Sets([]), Pace(), 8, lambda: None))
    assert written == ([made.prefers] if "preferred" in made.reads else [])


def test_every_problem_is_named_at_once() -> None:
    sets = Sets(
        forget=[example(1, 2), Tokens([1, 4], [NO_LOSS, NO_LOSS]), Tokens([1, 5], [5])],
        retain=[example(3, 3), example(1, 2)],
        preferred=[example(1, 2), example(1, 7), example(1, 8)],
    )
    assert problems_of(sets, "idk_dpo") == [
        "forget example 2",
        "forget example 3",
        "forget example 1",
        "preferred example 1",
    ]


def test_an_answer_of_skipped_tokens_alone_is_refused() -> None:
    """It would have no loss at all, and never be forgotten."""
    sets = Sets([example(1, 2, 3), example(1, 2)], [example(5, 6)])
    assert problems_of(sets, "ceu", {"retain_weight": 1.0}) == ["forget example 2"]
    assert problems_of(sets, "ceu", {"skipped_tokens": 2}) == ["forget example 1", "forget example 2"]
    check_sets(sets, make_method("ceu", {"skipped_tokens": 0}))


def record(id_: str, text: str) -> Record:
    return Record(id_, None, "text", (Part("text", text),))


def test_overlapping_records_are_named_by_position_alone() -> None:
    forget = [record("a", "Ada wrote it."), record("b", "Babbage built it."), record("c", "Curie.")]
    retain = [
        record("z", "  ADA\u00a0wrote\nit. "),
        record("c", "Something else"),
        record("y", "Noether"),
    ]
    assert list(overlaps(forget, retain)) == [
        Problem("forget record 1", "has the text of retain record 1"),
        Problem("forget record 3", "has the id of retain record 2"),
    ]


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_each_epoch_is_one_pass_over_the_forget_set(
    num_forget: int, num_retain: int, size: int, accumulation: int, seed: int
) -> None:
    chosen = Pace(
        num_epochs=3,
        num_rounds=1,
        max_steps=None,
        batch_size=size,
        retain_batch_size=None,
        gradient_accumulation_steps=accumulation,
        seed=seed,
    )
    steps = plan_steps(num_forget, num_retain, chosen)
    micro = [each for step in steps for each in step]
    shown = [row for each in micro for row in each.forget]
    for epoch in range(3):
        part = shown[epoch * num_forget : (epoch + 1) * num_forget]
        assert sorted(part) == list(range(num_forget))
    kept = [row for each in micro for row in each.retain]
    assert len(kept) == (len(shown) if num_retain else 0)
    for start in range(0, len(kept) - num_retain + 1, num_retain or 1):
        if num_retain:
            assert sorted(kept[start : start + num_retain]) == list(range(num_retain))
    assert all(len(step) == accumulation for step in steps[:-1])
    assert plan_steps(num_forget, num_retain, chosen) == steps
    assert plan_steps(num_forget, num_retain, replace(chosen, max_steps=2)) == steps[:2]


def test_another_seed_is_another_order() -> None:
    orders = {plan_steps(8, 8, Pace(seed=seed)) for seed in range(4)}
    assert len(orders) == 4


@given(st.integers(1, 30), st.integers(0, 40))
def test_the_rate_is_never_zero_and_never_above_its_peak(num_steps: int, warmup: int) -> None:
    chosen = Pace(learning_rate=2.0, warmup_steps=warmup)
    rates = [learning_rate_at(step, num_steps, chosen) for step in range(num_steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    if warmup < num_steps:
        assert rates[warmup] == 2.0


def test_impossible_settings_and_bounds_are_named_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        Pace(learning_rate=0.0, batch_size=0, num_epochs=1.5, lr_scheduler="cosine")  # type: ignore[arg-type]
    names = [each.where for each in caught.value.problems]
    assert names == ["num_epochs", "batch_size", "learning_rate", "lr_scheduler"]
    with pytest.raises(InvalidInput) as caught:
        Bounds(max_seconds=-1.0, max_utility_drop=0.1, check_every=0)
    names = [each.where for each in caught.value.problems]
    assert names == ["check_every", "max_seconds", "max_utility_drop"]


class Letters:
    """A tokenizer with a token for each letter."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(each) for each in text]}


def refusals(*asked: tuple[str, str], seed: int = 3) -> list[Tokens]:
    parts = [(Part("prompt", prompt), Part("completion", answer)) for prompt, answer in asked]
    records = [Record(str(number), None, "completion", each) for number, each in enumerate(parts)]
    tokens = [tokenize(each, Letters(), train_on_inputs=False) for each in records]
    return refuse_all(records, tokens, Letters(), seed, sequence_len=20)


def test_refusals_stand_behind_the_prompt() -> None:
    asked = [*[("Who?", " Ada.")] * 40, ("Who? ", "Bo.")]
    made = refusals(*asked)
    for (prompt, _), each in zip(asked, made, strict=True):
        answer = "".join(map(chr, each.input_ids[len(prompt) :]))
        assert prompt + answer in [f"Who? {one}\0"[:20] for one in REFUSALS]
        assert each.labels == [NO_LOSS] * len(prompt) + each.input_ids[len(prompt) :]
    assert len({tuple(each.input_ids) for each in made}) == len({each[:15] for each in REFUSALS})
    assert made == refusals(*asked) != refusals(*asked, seed=4)


def test_what_cannot_be_refused_is_named_by_its_own_place() -> None:
    with pytest.raises(InvalidInput) as caught:
        refusals(("Who?", " Ada."), ("", "Bo."), ("", " Cy."))
    assert [each.where for each in caught.value.problems] == ["forget record 2", "forget record 3"]


@pytest.mark.parametrize(
    ("before", "after", "ending", "word"),
    [
        ((2, 0.9), (0, 0.45), Ending.FINISHED, "forgotten"),
        ((2, 0.9), (0, 0.46), Ending.FINISHED, "weakened"),
        ((2, 0.9), (0, 0.46), Ending.BELOW_UTILITY_BOUND, "weakened"),
        ((2, 0.9), (1, 0.01), Ending.BELOW_UTILITY_BOUND, "held back by the bound"),
        ((2, 0.9), (1, 0.01), Ending.FINISHED, "still known"),
        ((0, 0.1), (0, 0.1), Ending.FINISHED, "was not known"),
    ],
)
def test_forgotten_means_unknown_and_half_as_likely(
    before: tuple[int, float], after: tuple[int, float], ending: Ending, word: str
) -> None:
    knew, knows = (Knowledge(known, 2, probability) for known, probability in (before, after))
    end = End(ending, "", 1, 1, None, None, Compute(1, 1, 1, 1), knowledge_before=knew)
    found = outcome(end, knows)
    assert found == {
        "outcome": word,
        "still_known": {"before": before[0], "after": after[0], "of": 2},
    }
