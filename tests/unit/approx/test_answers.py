"""Log-probabilities of answer tokens: padding and prompt never count; values computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from approx.evaluation import answers
from approx.evaluation.answers import answer_logprobs_BT, collate, mean_logprobs_B, sum_logprobs_B
from sisa.lm.base.tokens import NO_LOSS, Tokens

pytestmark = pytest.mark.torch
VOCAB = 7


@st.composite
def examples(draw: st.DrawFn) -> list[Tokens]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        ids = draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=6))
        start = draw(st.integers(1, len(ids) - 1))
        found.append(Tokens(ids, [NO_LOSS] * start + ids[start:]))
    return found


def logits_of(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, length, VOCAB, generator=torch.Generator().manual_seed(seed))


@given(examples(), st.integers(0, 3))
def test_padding_and_prompt_never_count(found: list[Tokens], seed: int) -> None:
    """Each row alone gives what it gives among others, whatever logits its padding has."""
    batch = collate(found, pad_id=0)
    logits = logits_of(len(found), batch.ids_BT1.shape[1], seed)
    together = sum_logprobs_B(logits, batch)
    for row, each in enumerate(found):
        alone = collate([each], pad_id=0)
        single = sum_logprobs_B(logits[row : row + 1, : len(each.input_ids)], alone)
        torch.testing.assert_close(single[0], together[row])
        by_hand = 0.0
        for at in range(1, len(each.input_ids)):
            if each.labels[at] != NO_LOSS:
                by_hand += float(torch.log_softmax(logits[row, at - 1], -1)[each.input_ids[at]])
        assert math.isclose(float(single[0]), by_hand, rel_tol=1e-5, abs_tol=1e-5)


def test_uniform_logits_give_the_logarithm_of_the_vocabulary() -> None:
    batch = collate([Tokens([1, 2, 3], [NO_LOSS, 2, 3])], pad_id=0)
    flat = torch.zeros(1, 3, VOCAB)
    assert math.isclose(float(mean_logprobs_B(flat, batch)[0]), -math.log(VOCAB), rel_tol=1e-6)
    assert answer_logprobs_BT(flat, batch).shape == (1, 2)


def test_half_precision_logits_are_summed_in_single() -> None:
    batch = collate([Tokens([1, 2], [NO_LOSS, 2])], pad_id=0)
    assert sum_logprobs_B(logits_of(1, 2).bfloat16(), batch).dtype == torch.float32


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="without an answer"):
        collate([Tokens([1, 2], [NO_LOSS, NO_LOSS])], pad_id=0)
    with pytest.raises(ValueError, match="no examples"):
        collate([], pad_id=0)


def test_the_example_in_the_docstring_holds() -> None:
    import doctest

    assert doctest.testmod(answers).failed == 0
