"""Causal tracing on a tiny model of which one layer alone was trained to give some answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from approx.evaluation.answers import collate
from approx.methods.method import mean_nll
from approx.unlearning.causal_tracing import num_heads, trace_heads, trace_layers, trace_states
from approx.unlearning.hidden_states import hidden_at
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch


def example(prompt: list[int], answer: list[int]) -> Tokens:
    return Tokens([*prompt, *answer], [NO_LOSS] * len(prompt) + answer)


ANSWERED = [example([1, 10 + n, 20, 21], [31 + 3 * n, 32 + 3 * n]) for n in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pin_threads(1)
    return make_tiny_base(tmp_path_factory.mktemp("base"), layers=3)


def load(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False).eval()


def planted(base: Path, layer: int) -> Any:
    """Return a model whose other layers are as they were drawn."""
    model, batch = load(base), collate(ANSWERED)
    trained = list(model.model.layers[layer].mlp.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        mean_nll(model(input_ids=batch.ids_BT1).logits, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.requires_grad_(False)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tracing_finds_a_planted_layer(base: Path, layer: int) -> None:
    state = torch.get_rng_state()
    model = planted(base, layer)
    effects = trace_layers(model, ANSWERED)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(effects) == 3
    others = [each for at, each in enumerate(effects) if at != layer]
    assert effects[layer] > 0.9 > 0.5 > max(others)
    assert trace_layers(model, ANSWERED) == effects
    assert trace_layers(model, ANSWERED, ANSWERED) == [0.0] * 3, "what is kept is subtracted"


def test_a_state_carries_what_the_layers_up_to_it_found(base: Path) -> None:
    """The prompts differ at position 1, and the answers are read from it in layer 1 or above."""
    effects = trace_states(planted(base, 1), ANSWERED, [1] * len(ANSWERED))
    assert effects[0] > 0.1 > abs(effects[2])
    assert abs(effects[2]) < 1e-6, "no layer reads what the last one leaves before the answer"
    last = trace_states(planted(base, 1), ANSWERED, [3] * len(ANSWERED))
    assert last[2] > 0.1


def test_tracing_finds_a_planted_head(base: Path) -> None:
    """All of a layer's attention was trained, but only one head's results are read."""
    model, layer = load(base), 1
    attention = model.model.layers[layer].self_attn
    width, head = attention.head_dim, 2
    others = [at for at in range(attention.o_proj.in_features) if at // width != head]
    with torch.no_grad():
        attention.o_proj.weight[:, others] = 0
    batch, trained = collate(ANSWERED), list(attention.requires_grad_(True).parameters())
    attention.o_proj.weight.register_hook(lambda grad: grad.index_fill(1, torch.tensor(others), 0))
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        mean_nll(model(input_ids=batch.ids_BT1).logits, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    effects = trace_heads(
        model.requires_grad_(False), [each.self_attn.o_proj for each in model.model.layers], ANSWERED
    )
    assert len(effects) == 3 * num_heads(model)
    planted_at = layer * num_heads(model) + head
    assert effects.index(max(effects)) == planted_at
    assert effects[planted_at] > 2 * max(each for at, each in enumerate(effects) if at != planted_at)


def test_a_plain_text_can_be_traced(base: Path) -> None:
    texts = [Tokens(list(range(5, 15)), list(range(5, 15)))]
    assert all(abs(each) < 10 for each in trace_layers(planted(base, 1), texts))


def test_the_states_of_a_layer_are_those_of_a_whole_pass(base: Path) -> None:
    model, batch = load(base), collate(ANSWERED)
    whole = model(input_ids=batch.ids_BT1, output_hidden_states=True).hidden_states
    columns, hooks = torch.tensor([0, 3]), [len(each._forward_hooks) for each in model.modules()]
    for layer in (0, 1):
        assert torch.equal(hidden_at(model, layer, batch.ids_BT1, columns), whole[layer + 1][:, columns])
    assert [len(each._forward_hooks) for each in model.modules()] == hooks
