"""The training forward on other families of models: the losses and gradients of peft's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sisa.lm.base.tokens import NO_LOSS, Tokens

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.5,
}
FAMILIES = {  # whether the head is plain, and whether records may lie end to end
    "gpt2": (True, True),
    "gpt_neox": (True, True),
    "gemma2": (False, False),
    "cohere": (False, True),
    "granite": (False, True),
    "mistral": (True, True),
    "qwen3": (True, True),
    "bloom": (True, False),
}
LORA = {"lora_r": 2, "lora_alpha": 8, "lora_dropout": 0.0}
ROWS = [[3, 7, 1, 9, 2], [5, 6, 11, 30, 8, 2, 4, 9], [12, 1, 2]]
BATCH = [Tokens(ids, [NO_LOSS, *ids[1:3], *([NO_LOSS] * (len(ids) - 4)), *ids[3:][-1:]]) for ids in ROWS]


def wrapped(family: str) -> tuple[Any, Any]:
    """Return a base of random weights, and itself with adapters whose B is not zero."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sisa.lm.base.adapter import attach, lora_config

    own: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    own |= {"logits_scaling": 4.0} if family == "granite" else {}
    sizes = AutoConfig.for_model(family, **SIZES, **own)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(sizes, dtype=torch.float32).eval().requires_grad_(False)
    modules = ["c_attn", "c_fc", "c_proj"] if family == "gpt2" else "all-linear"
    config = lora_config({**LORA, "lora_target_modules": modules}, base)
    model = attach(base, config, None, init_seed=1)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.3, generator=torch.Generator().manual_seed(5))
    return base, model


def theirs(model: Any) -> Any:
    """Compute the loss row by row, with all logits and peft's forward."""
    import torch

    total: Any = 0.0
    for each in BATCH:
        logits = model(input_ids=torch.tensor([each.input_ids]), use_cache=False).logits[0, :-1]
        labels = torch.tensor(each.labels[1:])
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return total


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("piece", [2, 256])
def test_loss_and_gradients_of_a_family(
    family: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from sisa.lm.train import losses
    from sisa.lm.train.lora_linear import use_fused_linear
    from sisa.lm.train.losses import Form, loss_form, summed_losses

    base, model = wrapped(family)
    trained = [each for each in model.parameters() if each.requires_grad]
    expected = theirs(model)
    slopes = torch.autograd.grad(expected, trained)
    form = loss_form(base, longest=8)
    assert form == Form(*FAMILIES[family])
    use_fused_linear(model)
    monkeypatch.setattr(losses, "PIECE", piece)
    for each in {form, replace(form, packed=False)}:
        found = summed_losses(model, [BATCH], each)[0]
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        for ours, slope in zip(torch.autograd.grad(found, trained), slopes, strict=True):
            assert torch.allclose(ours, slope, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "others", "expected"),
    [
        ("llama", {}, True),
        ("mistral", {"sliding_window": 64}, True),
        ("mistral", {"sliding_window": 8}, False),
        ("mamba", {}, False),
        ("falcon_h1", {}, False),
        ("gpt_oss", {}, False),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_records_may_lie_end_to_end(
    family: str, others: dict[str, Any], expected: bool, dtype: str
) -> None:
    """Not where states of the next record hear of the one before, or attention is of another kind."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sisa.lm.train.packing import packs

    sizes = AutoConfig.for_model(family, **SIZES, **others)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(sizes, dtype=getattr(torch, dtype)).eval()
    assert packs(base, longest=32) == expected


def test_positions_that_do_not_begin_anew_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sisa.lm.train import packing

    base, _ = wrapped("gpt2")
    assert packing.packs(base, longest=32)
    monkeypatch.setattr(packing, "positions", lambda lengths, _: torch.arange(sum(lengths))[None])
    assert not packing.packs(base, longest=32)


def test_a_record_end_to_end_with_another_has_the_bits_that_it_has_beside_any() -> None:
    import torch

    from sisa.lm.train.packing import attending, positions

    base, _ = wrapped("llama")
    decoder, lengths = base.get_decoder(), (3, 5, 4)
    rows = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(3))
    rows[1, 3:8] = rows[0, 3:8]
    with attending(base, lengths), torch.no_grad():
        one, other = (
            decoder(
                input_ids=row[None], position_ids=positions(lengths, row.device), use_cache=False
            ).last_hidden_state[0]
            for row in rows
        )
    alone = decoder(input_ids=rows[:1, 3:8], use_cache=False).last_hidden_state[0]
    assert torch.equal(one[3:8], other[3:8])
    assert not torch.equal(one[:3], other[:3])
    assert torch.allclose(one[3:8], alone, atol=1e-5)
    assert {each.config._attn_implementation for each in base.modules() if hasattr(each, "config")} == {
        "sdpa"
    }


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("rows", [[5], [3, 1]])
def test_the_adapted_products_slopes_are_those_of_differences(dropped: bool, rows: list[int]) -> None:
    import torch

    from sisa.lm.train.lora_linear import _Adapted

    drawn = torch.Generator().manual_seed(0)

    def of(*shape: int, trained: bool = True) -> Any:
        found = torch.randn(*shape, generator=drawn, dtype=torch.float64)
        return found.requires_grad_(trained)

    low = of(sum(rows), 4) if dropped else None
    weight, bias = of(3, 4, trained=False), of(3, trained=False)
    adapters = [each for _ in rows for each in (of(2, 4), of(3, 2))]
    asked: Any = (of(5, 4), low, weight, bias, 1.5, rows, *adapters)
    assert torch.autograd.gradcheck(_Adapted.apply, asked)
