"""Which modules are selected: Fisher information against single gradients, and the traced layers."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import pytest
import torch

from approx.unlearning import selection
from approx.unlearning.causal_tracing import trace_layers
from approx.unlearning.selection import (
    SelectionSettings,
    adapted_modules,
    fisher_traces,
    select_modules,
)
from sisa.core.errors import InvalidInput
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch


def example(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens([*prompt, *answer], [NO_LOSS] * len(prompt) + answer)


FORGET = [example([1, 10 + n, 20], [31 + 3 * n, 32 + 3 * n, 90]) for n in range(3)]
RETAIN = [example([2, 50 + n], [60 + n, 70]) for n in range(2)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    pin_threads(1)
    directory: Path = make_tiny_base(tmp_path_factory.mktemp("base"), layers=3)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def by_brute_force(base: Any, name: str, examples: list[Tokens]) -> float:
    """Return the sum of the Fisher diagonal, one weight after another, by one backward an example."""
    weight = base.get_submodule(name).weight.requires_grad_(True)
    diagonal = torch.zeros_like(weight)
    for each in examples:
        ids = torch.tensor([each.input_ids])
        logprobs = torch.log_softmax(base(input_ids=ids).logits[0].double(), dim=-1)
        start = each.labels.index(next(label for label in each.labels if label != NO_LOSS))
        answer = [logprobs[at - 1, each.input_ids[at]] for at in range(start, len(each.input_ids))]
        (torch.stack(answer).mean()).backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        diagonal += weight.grad**2 / len(examples)
        weight.grad = None
    weight.requires_grad_(False)
    return float(diagonal.sum())


def test_fisher_information_equals_brute_force(base: Any) -> None:
    names = adapted_modules(base, "all-linear")
    assert len(names) == 3 * 7
    found = fisher_traces(base, names, FORGET)
    for name, each in zip(names, found, strict=True):
        if name.endswith(("q_proj", "down_proj")):
            assert each == pytest.approx(by_brute_force(base, name, FORGET), rel=1e-4)
    assert not any(each.requires_grad for each in base.parameters())
    assert all(each.grad is None for each in base.parameters())


def test_fisher_selects_what_matters_to_the_forget_set_alone(base: Any) -> None:
    names = adapted_modules(base, ("q_proj", "v_proj", "down_proj"))
    assert len(names) == 9
    found = select_modules(base, ("q_proj", "v_proj", "down_proj"), FORGET, RETAIN, of("fisher", 0.34))
    pairs = zip(fisher_traces(base, names, FORGET), fisher_traces(base, names, RETAIN), strict=True)
    ratios = {name: one / other for name, (one, other) in zip(names, pairs, strict=True)}
    assert sorted(found) == sorted(sorted(ratios, key=lambda name: -ratios[name])[:3])


def test_traced_selects_the_modules_of_the_strongest_layers(base: Any) -> None:
    found = select_modules(base, "all-linear", FORGET, RETAIN, of("traced", 0.34))
    effects = trace_layers(base, FORGET, RETAIN)
    layer = effects.index(max(effects))
    assert len(found) == 7
    assert all(name.startswith(f"model.layers.{layer}.") for name in found)


def of(kind: Any, share: float) -> SelectionSettings:
    return SelectionSettings(kind, share)


def test_all_leaves_the_adapter_as_it_is(base: Any) -> None:
    for wanted in ("all-linear", ("q_proj",)):
        assert select_modules(base, wanted, [], [], SelectionSettings()) == wanted
    with pytest.raises(InvalidInput, match="selection"):
        SelectionSettings("none", 2.0)  # type: ignore[arg-type]


def test_the_examples_hold() -> None:
    assert doctest.testmod(selection).failed == 0
