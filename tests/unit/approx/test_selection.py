"""What is selected: Fisher information against single gradients, traced layers, and their heads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from approx.attacks.attack import LORA
from approx.patches.selection import (
    Selected,
    SelectionSettings,
    adapted_modules,
    fisher_traces,
    select,
)
from approx.unlearning.causal_tracing import num_heads, trace_heads, trace_layers
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import attach, lora_config
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
    found = select(base, ("q_proj", "v_proj", "down_proj"), FORGET, RETAIN, of("fisher", 0.34)).modules
    pairs = zip(fisher_traces(base, names, FORGET), fisher_traces(base, names, RETAIN), strict=True)
    ratios = {name: one / other for name, (one, other) in zip(names, pairs, strict=True)}
    assert sorted(found) == sorted(sorted(ratios, key=lambda name: -ratios[name])[:3])


def test_a_module_that_no_answer_reaches_is_not_selected(base: Any) -> None:
    """Its gradient is none at all, and the scores of other modules keep their places."""
    model, names = copy.deepcopy(base), adapted_modules(base, "all-linear")
    model.model.layers[0].unused_proj = torch.nn.Linear(4, 4).requires_grad_(False)
    every = adapted_modules(model, "all-linear")
    found = dict(zip(every, fisher_traces(model, every, FORGET), strict=True))
    assert found.pop("model.layers.0.unused_proj") == 0.0
    assert found == dict(zip(names, fisher_traces(base, names, FORGET), strict=True))
    selected = select(model, "all-linear", FORGET, RETAIN, of("fisher", 0.2)).modules
    assert selected == select(base, "all-linear", FORGET, RETAIN, of("fisher", 0.2)).modules


def test_traced_selects_the_modules_of_the_strongest_layers(base: Any) -> None:
    found = select(base, "all-linear", FORGET, RETAIN, of("traced", 0.34)).modules
    effects = trace_layers(base, FORGET, RETAIN)
    layer = effects.index(max(effects))
    assert len(found) == 7
    assert all(name.startswith(f"model.layers.{layer}.") for name in found)


def test_heads_are_those_of_the_largest_effect_in_the_strongest_layers(base: Any) -> None:
    found = select(base, "all-linear", FORGET, RETAIN, of("heads", 0.5))
    effects = trace_layers(base, FORGET, RETAIN)
    layers = sorted(sorted(range(3), key=lambda at: -effects[at])[:2])
    outputs = [base.model.layers[layer].self_attn.o_proj for layer in layers]
    by_head = trace_heads(base, outputs, FORGET, RETAIN)
    assert len(by_head) == 2 * num_heads(base)
    best = sorted(range(len(by_head)), key=lambda at: -by_head[at])[: num_heads(base)]
    expected: dict[str, list[int]] = {}
    for at in sorted(best):
        for module in ("q_proj", "o_proj"):
            name = f"model.layers.{layers[at // num_heads(base)]}.self_attn.{module}"
            expected.setdefault(name, []).append(at % num_heads(base))
    assert found.heads == expected
    assert sorted(found.modules) == sorted(expected)


def test_an_adapter_that_is_confined_changes_the_selected_heads_alone(base: Any) -> None:
    names = [f"model.layers.1.self_attn.{each}" for each in ("q_proj", "o_proj")]
    whole = copy.deepcopy(base)
    model = attach(whole, lora_config({**LORA, "lora_target_modules": names}, whole), None, 1)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], 0.1)
    with Selected(names, dict.fromkeys(names, (1,))).confined(model):
        for _ in range(3):
            model(input_ids=torch.tensor([[1, 10, 20]])).logits.square().mean().backward()
            optimizer.step()
    width = base.model.layers[1].self_attn.q_proj.out_features // num_heads(base)
    queries, results = (
        model.get_base_model().get_submodule(each).get_delta_weight("default") for each in names
    )
    for change in (queries, results.T):
        changed = change.abs().sum(1).view(num_heads(base), width).gt(0)
        assert changed[1].all()
        assert not changed[[at for at in range(num_heads(base)) if at != 1]].any()
    model(input_ids=torch.tensor([[1, 10, 20]])).logits.square().mean().backward()
    assert model.get_base_model().get_submodule(names[1]).lora_A["default"].weight.grad.ne(0).all()


def test_heads_that_no_target_module_has_are_refused(base: Any) -> None:
    with pytest.raises(InvalidInput, match="q_proj or o_proj"):
        select(base, ("down_proj",), FORGET, RETAIN, of("heads", 0.5))


def of(kind: Any, share: float) -> SelectionSettings:
    return SelectionSettings(kind, share)


def test_all_leaves_the_adapter_as_it_is(base: Any) -> None:
    for wanted in ("all-linear", ("q_proj",)):
        assert select(base, wanted, [], [], SelectionSettings()) == Selected(wanted, everything=True)
    with pytest.raises(InvalidInput, match="selection"):
        SelectionSettings("none", 2.0)
