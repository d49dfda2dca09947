"""DP-SGD on a tiny base: clipping by brute force, epsilon as opacus counts it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.bench.private_training import (
    PrivacySettings,
    clipped_sum,
    epsilon_of,
    train_privately,
)
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch
opacus = pytest.importorskip("opacus.accountants")
LORA = {"lora_target_modules": ["q_proj"], "lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.0}
EXAMPLES = [Tokens([1, 10 + n, 31 + n, 32], [NO_LOSS, NO_LOSS, 31 + n, 32]) for n in range(6)]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    pin_threads(1)
    base = AutoModelForCausalLM.from_pretrained(make_tiny_base(tmp_path), dtype=torch.float32)
    return attach(base.requires_grad_(False), lora_config(LORA, base), None, init_seed=1).eval()


def test_epsilon_is_that_of_the_accountant_step_by_step() -> None:
    settings = PrivacySettings(noise_multiplier=1.5, batch_size=2, num_steps=30, delta=1e-4)
    accountant = opacus.create_accountant("rdp")
    for _ in range(30):
        accountant.step(noise_multiplier=1.5, sample_rate=2 / 40)
    assert epsilon_of(settings, 40) == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-9)
    quieter = PrivacySettings(noise_multiplier=0.8, batch_size=2, num_steps=30, delta=1e-4)
    assert epsilon_of(quieter, 40) > epsilon_of(settings, 40)


def test_each_gradient_is_cut_before_the_sum(model: Any) -> None:
    parameters = [each for each in model.parameters() if each.requires_grad]
    whole = []
    for example in EXAMPLES[:3]:
        model.zero_grad()
        ids = torch.tensor([example.input_ids])
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0], dim=-1)
        (-(logprobs[1, ids[0, 2]] + logprobs[2, ids[0, 3]]) / 2).backward()  # type: ignore[no-untyped-call]
        whole.append(torch.cat([each.grad.flatten() for each in parameters]))
    model.zero_grad()
    limit = float(whole[0].norm()) * 0.9
    expected = sum(each * min(1.0, limit / float(each.norm())) for each in whole)
    found = torch.cat([each.flatten() for each in clipped_sum(model, EXAMPLES[:3], parameters, limit)])
    torch.testing.assert_close(found, expected)


def test_a_private_run_is_seeded_and_changes_the_patch_alone(model: Any) -> None:
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    settings = PrivacySettings(batch_size=3, num_steps=4)
    assert train_privately(model, EXAMPLES, settings) == epsilon_of(settings, len(EXAMPLES))
    first = {name: each.detach().clone() for name, each in model.named_parameters()}
    changed = {name for name, each in first.items() if not torch.equal(each, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(before[name])
    train_privately(model, EXAMPLES, settings)
    assert all(torch.equal(each, first[name]) for name, each in model.named_parameters())


def test_impossible_settings_are_refused(model: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        PrivacySettings(noise_multiplier=0, num_steps=0, delta=-1)
    assert [each.where for each in caught.value.problems] == ["noise_multiplier", "delta", "num_steps"]
    with pytest.raises(InvalidInput) as caught:
        train_privately(model, EXAMPLES, PrivacySettings(batch_size=7, delta=2.0))
    assert [each.where for each in caught.value.problems] == ["batch_size", "delta"]
