"""Log-probabilities of answer tokens: padding and prompt never count; values computed by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from approx.evaluation.answers import (
    answer_logprobs_BT,
    collate,
    gradient_squares,
    mean_logprobs_B,
    sum_logprobs_B,
)
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
    batch = collate(found)
    logits = logits_of(len(found), batch.ids_BT1.shape[1], seed)
    together = sum_logprobs_B(logits, batch)
    for row, each in enumerate(found):
        alone = collate([each])
        single = sum_logprobs_B(logits[row : row + 1, : len(each.input_ids)], alone)
        torch.testing.assert_close(single[0], together[row])
        by_hand = 0.0
        for at in range(1, len(each.input_ids)):
            if each.labels[at] != NO_LOSS:
                by_hand += float(torch.log_softmax(logits[row, at - 1], -1)[each.input_ids[at]])
        assert math.isclose(float(single[0]), by_hand, rel_tol=1e-5, abs_tol=1e-5)


def test_a_label_may_differ_from_the_token_that_follows() -> None:
    batch = collate([Tokens([5, 6, 4, 3], [NO_LOSS, 2, NO_LOSS, 3])])
    assert batch.ids_BT1.tolist() == [[5, 6, 4, 3]]
    assert batch.targets_BT.tolist() == [[2, 4, 3]]
    assert batch.answer_ids_N.tolist() == [2, 3]


def test_uniform_logits_give_the_logarithm_of_the_vocabulary() -> None:
    batch = collate([Tokens([1, 2, 3], [NO_LOSS, 2, 3])])
    flat = torch.zeros(1, 3, VOCAB)
    assert math.isclose(float(mean_logprobs_B(flat, batch)[0]), -math.log(VOCAB), rel_tol=1e-6)
    assert answer_logprobs_BT(flat, batch).shape == (1, 2)


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="without an answer"):
        collate([Tokens([1, 2], [NO_LOSS, NO_LOSS])])
    with pytest.raises(ValueError, match="no examples"):
        collate([])


class TwoParameters(torch.nn.Module):
    """A model of three words whose logits are (a, b * the word before, 0)."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(each)) for each in (0.3, -0.2))

    def forward(
        self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool
    ) -> SimpleNamespace:
        assert not use_cache
        ids = input_ids[:, logits_to_keep].float()
        return SimpleNamespace(logits=torch.stack([self.a + 0 * ids, self.b * ids, 0 * ids], dim=-1))


def test_the_gradient_of_an_answer_by_hand_and_by_autograd() -> None:
    """d loss / d logit is p - 1 at the true word and p elsewhere, averaged over the answer's tokens."""
    model = TwoParameters()
    found = gradient_squares(model, [Tokens([2, 1, 0], [NO_LOSS, 1, 0]), Tokens([1, 1], [NO_LOSS, 1])])

    def share(word: int, before: int) -> float:
        odds = [math.exp(0.3), math.exp(-0.2 * before), 1.0]
        return odds[word] / sum(odds)

    by_a = [(share(0, 2) + share(0, 1) - 1) / 2, share(0, 1)]
    by_b = [((share(1, 2) - 1) * 2 + share(1, 1)) / 2, share(1, 1) - 1]
    for squares, *gradient in zip(found, by_a, by_b, strict=True):
        assert squares == pytest.approx([each**2 for each in gradient])
    loss = torch.nn.functional.cross_entropy(
        torch.stack([model.a, model.b * 1, model.a * 0])[None], torch.tensor([1])
    )
    loss.backward()  # type: ignore[no-untyped-call]
    grads = [model.a.grad, model.b.grad]
    assert found[1] == pytest.approx([float(each**2) for each in grads if each is not None])
    again = gradient_squares(model, [Tokens([1, 1], [NO_LOSS, 1])])
    assert again == [found[1]]
    assert [model.a.grad, model.b.grad] == grads


def test_only_trained_tensors_count_and_of_a_frozen_model_all() -> None:
    model, example = TwoParameters(), Tokens([2, 1, 0], [NO_LOSS, 1, 0])
    (whole,) = gradient_squares(model, [example])
    model.a.requires_grad_(False)
    assert gradient_squares(model, [example]) == [whole[1:]]
    model.b.requires_grad_(False)
    assert gradient_squares(model, [example]) == [whole]
    assert not any(each.requires_grad for each in model.parameters())
