"""A split model equals the whole one, and the planned cost of a method is the counted one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from approx.evaluation.answers import collate
from approx.evaluation.evaluated_models import tokens_of
from approx.methods.registry import METHODS, make_method
from approx.unlearning.examples import Sets
from approx.unlearning.unlearn import unlearn
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.weights import load_tokenizer
from tests.bench.tofu_full.budgets import AT_THE_END, nearest_steps, step_costs, uncut
from tests.bench.tofu_full.design import FORM
from tests.bench.tofu_full.split_model import load_split
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch
LORA = {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
PAIRS = [("Who?", "Ada 1000"), ("Where?", "In the old town"), ("When?", "11")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("split") / "base", layers=3)


def test_a_base_that_can_not_be_split_is_refused(base: Path) -> None:
    for upper in (0, 3, 9):
        with pytest.raises(InvalidInput, match="split"):
            load_split(base, upper)


@pytest.mark.parametrize("upper", [1, 2])
def test_the_upper_model_over_remembered_states_is_the_whole_one(base: Path, upper: int) -> None:
    """Also for rows that end alike, that come again, padded otherwise, and under a patch."""
    split = load_split(base, upper)
    patched = attach(split.upper, lora_config(LORA, split.upper), None, init_seed=1)
    for each in patched.parameters():
        if each.requires_grad:
            torch.nn.init.normal_(each, std=0.3)
    tokens = tokens_of(PAIRS, FORM, load_tokenizer(base))
    for rows, pad in (([0, 1, 2], 0), ([2], 0), ([0, 2], 5), ([1], 7), ([0, 1, 2], 7)):
        batch = collate([tokens[row] for row in rows])
        for ids_T1, row in zip(batch.ids_BT1, rows, strict=True):
            ids_T1[len(tokens[row].input_ids) :] = pad
        ids_BT = batch.ids_BT1[:, :-1]
        with torch.inference_mode():
            expected = split.whole(input_ids=ids_BT, use_cache=False).logits
            found = patched(input_ids=ids_BT, use_cache=False).logits
        real_BT = batch.mask_BT
        assert torch.allclose(found[real_BT], expected[real_BT], atol=1e-4)
    with torch.no_grad():
        unpatched = split.upper(input_ids=ids_BT, use_cache=False).logits
        assert torch.allclose(unpatched, found, atol=1e-4)
        with patched.disable_adapter():
            plain = patched(input_ids=ids_BT, use_cache=False).logits
    assert not torch.allclose(plain[real_BT], found[real_BT], atol=1e-2)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rome", "memit"}))  # edits take no steps
def test_the_cost_that_is_planned_is_the_cost_that_is_counted(base: Path, name: str) -> None:
    split = load_split(base, 1)
    model = split.whole if name == "rmu" else split.upper  # whose layer is traced through all layers
    patched = attach(model, lora_config(LORA, model), None, init_seed=1)
    tokens = tokens_of([*PAIRS, ("Why?", "No"), ("How?", "So it is")], FORM, load_tokenizer(base))
    sets = Sets(
        tokens[:3], tokens[3:], tokens_of([(q, "Hm") for q, _ in PAIRS], FORM, load_tokenizer(base))
    )
    method = make_method(name, {"alpha": 1.0} if name == "task_arithmetic" else {})
    settings = replace(uncut(1e-3, batch_size=2, seed=0), num_epochs=3, max_steps=4)
    compute = unlearn(patched, sets, method, settings, AT_THE_END).compute
    costs, last = step_costs(method, sets, settings, (compute.num_parameters, compute.num_trained))
    assert sum(costs) + last[-1] == compute.flops


def test_steps_come_as_near_to_the_budget_as_they_can() -> None:
    costs, last = [4.0] * 10, [1.0] * 10
    assert nearest_steps(costs, last, 0.0) == 1
    for budget in (9.0, 12.0, 21.0, 37.5):
        steps = nearest_steps(costs, last, budget)
        assert abs(4.0 * steps + 1.0 - budget) == min(abs(4.0 * n + 1.0 - budget) for n in range(1, 11))
