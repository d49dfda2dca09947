"""Answers that are cut and continued in one tree are those of rows apart; nothing is read twice."""

from __future__ import annotations

import random
from dataclasses import astuple
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from approx.evaluation.answers import answered, continue_greedily, score_examples
from approx.evaluation.cut_answers import CutAnswer, Pairs, continue_apart, continue_together

pytestmark = pytest.mark.torch
ENDS = (3, 4)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, **heads, initializer_range=0.4)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def pairs_of(seed: int) -> list[tuple[list[int], list[int]]]:
    draw = random.Random(seed)
    opening = [draw.randrange(40) for _ in range(3)]
    return [
        ([*opening, *draw.choices(range(40), k=size)], draw.choices(range(40), k=draw.randint(1, 20)))
        for size in range(draw.randint(1, 5))
    ]


def cuts_of(pairs: Pairs) -> list[list[int]]:
    return [[len(answer) * share // 3 for share in range(3)] for _, answer in pairs]


def check_equal(found: list[CutAnswer], expected: list[CutAnswer]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.continued == other.continued
        for score, its in zip((one.score, *one.scores), (other.score, *other.scores), strict=True):
            assert score.correct == its.correct
            for values, others in zip(astuple(score), astuple(its), strict=True):
                assert values == pytest.approx(others, abs=1e-3)


def test_keys_that_heads_share_are_not_copied(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [([5, 6], [7, 8, 9]), ([5, 7], [1, 2])]
    monkeypatch.delattr("transformers.integrations.sdpa_attention.repeat_kv")
    assert continue_together(model, pairs, cuts_of(pairs), ENDS)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("seed", range(12))
def test_rows_of_one_tree_are_those_of_rows_apart(model: Any, seed: int) -> None:
    pairs = pairs_of(seed)
    found = continue_together(model, pairs, cuts_of(pairs), ENDS)
    check_equal(found, continue_apart(model, pairs, cuts_of(pairs), ENDS))
    for (_, answer), cuts, each in zip(pairs, cuts_of(pairs), found, strict=True):
        assert [len(ids) for ids in each.continued] == [len(answer)] * len(cuts)
        assert not any(set(ids[cut:]) & set(ENDS) for ids, cut in zip(each.continued, cuts, strict=True))


def test_an_answer_beside_others_is_continued_as_alone(model: Any) -> None:
    pairs = [pair for seed in range(3) for pair in pairs_of(seed)]
    alone = [continue_together(model, [pair], cuts_of([pair]), ENDS)[0] for pair in pairs]
    check_equal(continue_together(model, pairs, cuts_of(pairs), ENDS), alone)


def test_one_forward_reads_an_answer_that_is_known_by_heart(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [5, 6, 7]
    (answer,) = continue_greedily(model, [prompt], ENDS, 12, min_new_tokens=12)
    (own,) = score_examples(model, [answered(prompt, answer)])
    watched = Mock(wraps=model.forward)
    monkeypatch.setattr(model, "forward", watched)
    (found,) = continue_together(model, [(prompt, answer)], [[0, 4, 8]], ENDS)
    assert (found.continued, watched.call_count) == ([answer] * 3, 1)
    assert found.scores == [found.score] * 3
    assert found.score.logprobs == pytest.approx(own.logprobs, abs=1e-4)
