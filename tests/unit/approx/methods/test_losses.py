"""The losses of approximate unlearning on drawn logits, as against formulas written a second way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from approx.evaluation.answers import AnswerBatch, collate
from approx.methods.method import Method, Role, mean_kl, mean_nll
from approx.methods.registry import METHODS, make_method
from approx.unlearning.target import Rows
from approx.unlearning.written.generic_labels import generic_label
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.unit.approx.methods.second_way import second_way, slope_BTV

pytestmark = pytest.mark.torch
VOCAB = 5
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),
    ("graddiff", {"retain_loss": "kl", "forget_weight": 0.5, "retain_weight": 3.0}),
    ("kl_minimisation", {"beta": 0.7}),
    ("dpo", {"beta": 0.5, "retain_weight": 2.0, "retain_loss": "kl"}),
    ("npo", {"beta": 1.3, "retain_weight": 0.0, "forget_weight": 2.0}),
    ("npo", {"retain_loss": "kl"}),
    ("simnpo", {"beta": 2.5, "gamma": 0.4, "forget_weight": 1.0, "retain_weight": 0.0}),
    ("wga", {"beta": 0.5, "forget_weight": 2.0, "retain_loss": "kl"}),
    ("satimp", {"beta1": 1.5, "beta2": 0.5, "retain_weight": 0.0}),
    ("ceu", {"skipped_tokens": 0, "retain_weight": 1.0}),
    ("undial", {"beta": 1.5, "retain_weight": 2.0, "retain_loss": "kl"}),
    ("whp", {"retain_weight": 1.0}),
    ("pdu", {"retain_weight": 3.0}),
    ("rmu", {"adaptive": False, "steering_coefficient": 2.0, "control_seed": 3, "retain_weight": 0}),
    ("altpo", {"length_normalised": True, "retain_loss": "kl"}),
    ("altpo", {"reference_free": True, "length_normalised": True, "beta": 2.0}),
]


@st.composite
def batches(draw: st.DrawFn, num_rows: int) -> AnswerBatch:
    found = []
    for _ in range(num_rows):
        ids = draw(st.lists(st.integers(1, VOCAB - 1), min_size=2, max_size=7))
        start = draw(st.integers(1, len(ids) - 1))
        found.append(Tokens(ids, [NO_LOSS] * start + ids[start:]))
    return collate(found)


@st.composite
def rows_of_roles(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> dict[Role, Rows]:
    num_rows = draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.1, 1.0, 3.0]))
    found: dict[Role, Rows] = {}
    roles: tuple[Role, ...] = ("forget", "preferred", "retain")
    for role in roles:
        batch = draw(batches(num_rows if role != "retain" else draw(st.integers(1, 3))))
        shape = (*batch.ids_BT1.shape, VOCAB)
        pair = (scale * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2))
        found[role] = Rows(batch, *pair)
    return found


def usable(name: str, values: dict[str, Any], given_rows: Mapping[Role, Rows]) -> Method:
    """Return a method whose loss is defined on some rows; others are not drawn."""
    method = make_method(name, values)
    assume(int(given_rows["forget"].batch.num_tokens_B.min()) >= method.min_answer_tokens)
    return method


@pytest.mark.parametrize(("name", "values"), VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-11)])
@given(data=st.data())
@settings(max_examples=20)
def test_losses_agree_with_a_formula_written_a_second_way(
    name: str, values: dict[str, Any], dtype: torch.dtype, tolerance: float, data: st.DataObject
) -> None:
    """A loss gets no more than its method says that it reads and compares."""
    given_rows = data.draw(rows_of_roles(dtype))
    method = usable(name, values, given_rows)
    needed = {role: given_rows[role] for role in method.reads}
    for role in method.reads - method.compares:
        needed[role] = Rows(given_rows[role].batch, given_rows[role].current_BTV)
    found, expected = float(method.loss(needed).total), second_way(method, given_rows)
    assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)


def with_other_padding_and_prompt(of: Rows) -> Rows:
    """Return the same rows with other logits outside answer tokens, and one more column of padding."""
    positions = of.batch.mask_BT.shape[1]
    counted = of.batch.mask_BT.unsqueeze(-1)

    def changed(logits: torch.Tensor) -> torch.Tensor:
        noise = torch.full_like(logits[:, :positions], 77.0)
        noise[..., 0] = -40.0
        kept = torch.where(counted, logits[:, :positions], noise)
        return torch.cat([kept, torch.full_like(logits[:, :2], 1e4)], dim=1)

    ids, targets, mask = of.batch.ids_BT1, of.batch.targets_BT, of.batch.mask_BT
    wider = AnswerBatch(
        torch.cat([ids, ids[:, :1]], dim=1),
        torch.cat([targets, targets[:, :1]], dim=1),
        torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1),
    )
    return Rows(wider, changed(of.current_BTV), changed(of.compared_BTV))


@pytest.mark.parametrize(("name", "values"), VARIANTS)
@given(given_rows=rows_of_roles(torch.float64))
@settings(max_examples=10)
def test_prompt_and_padding_never_count(
    name: str, values: dict[str, Any], given_rows: dict[Role, Rows]
) -> None:
    method = usable(name, values, given_rows)
    other = {role: with_other_padding_and_prompt(each) for role, each in given_rows.items()}
    torch.testing.assert_close(method.loss(other).total, method.loss(given_rows).total)


def test_a_kl_does_not_even_see_an_infinite_logit_of_padding() -> None:
    batch = collate([Tokens([0, 1, 1], [NO_LOSS, 1, 1]), Tokens([0, 1], [NO_LOSS, 1])])
    logits = torch.zeros(2, 3, 2)
    logits[1, 1:] = float("nan")
    logits.requires_grad_()
    loss = mean_kl(torch.zeros(2, 3, 2), logits, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss == 0
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@given(rows_of_roles())
def test_a_model_has_no_kl_from_itself(given_rows: dict[Role, Rows]) -> None:
    """To the bit."""
    same = {role: Rows(e.batch, e.current_BTV, e.current_BTV) for role, e in given_rows.items()}
    retain = make_method("kl_minimisation").loss(same).retain
    assert retain is not None
    assert float(retain) == 0.0


@given(rows_of_roles(torch.float64))
def test_npo_becomes_gradient_ascent_at_the_start(given_rows: dict[Role, Rows]) -> None:
    """With current = reference its gradient is that of the summed log-probability, mean over rows."""
    forget, batch = given_rows["forget"], given_rows["forget"].batch
    same = Rows(batch, forget.current_BTV, forget.current_BTV)
    ascent = slope_BTV(make_method("gradient_ascent"), same) * batch.mask_BT.sum() / len(batch.mask_BT)
    torch.testing.assert_close(slope_BTV(make_method("npo", {"retain_weight": 0.0}), same), ascent)


# Their target may be above what the model says, hidden states say nothing, and edits look at one set.
NOT_ALWAYS = ("task_arithmetic", "undial", "pdu", "rmu", "rome", "memit")


@pytest.mark.parametrize(("name", "values"), [each for each in VARIANTS if each[0] not in NOT_ALWAYS])
@given(given_rows=rows_of_roles(torch.float64))
@settings(max_examples=15)
def test_a_small_step_forgets(name: str, values: dict[str, Any], given_rows: dict[Role, Rows]) -> None:
    """Down the gradient, the forget answers get less likely, and what a retain or preferred term looks
    at does not lose to first order."""
    method = usable(name, values, given_rows)
    leaves = {role: each.current_BTV.clone().requires_grad_() for role, each in given_rows.items()}
    live: dict[Role, Rows] = {
        role: Rows(each.batch, leaves[role], each.reference_BTV) for role, each in given_rows.items()
    }
    method.loss(live).total.backward()  # type: ignore[no-untyped-call]
    for role in method.reads:
        gradient = leaves[role].grad
        assert gradient is not None
        assume(float(gradient.norm()) > 1e-8)  # as of a token whose weight has vanished
        before = leaves[role].detach()
        after = before - 1e-4 * gradient / gradient.norm().clamp_min(1e-12)
        batch = live[role].batch
        change = float(mean_nll(after, batch) - mean_nll(before, batch))
        if role == "forget":
            assert change > 0
        elif role == "preferred" or getattr(method, "retain_loss", "kl") == "nll":
            assert change < 0
        else:
            compared = live[role].compared_BTV
            assert mean_kl(compared, after, batch) <= mean_kl(compared, before, batch)


@given(rows_of_roles(torch.float64))
@settings(max_examples=15)
def test_undial_forgets_from_the_reference_on(given_rows: dict[Role, Rows]) -> None:
    forget, before = given_rows["forget"], given_rows["forget"].current_BTV
    after = before - 1e-3 * slope_BTV(make_method("undial"), Rows(forget.batch, before, before))
    assert mean_nll(after, forget.batch) > mean_nll(before, forget.batch)


@given(rows_of_roles())
def test_half_precision_logits_are_taken_as_they_are_and_summed_in_single(
    given_rows: dict[Role, Rows],
) -> None:
    """A loss on bfloat16 logits is to the bit the loss on the same numbers in float32."""
    half = {
        role: Rows(e.batch, e.current_BTV.bfloat16(), e.compared_BTV.bfloat16())
        for role, e in given_rows.items()
    }
    single = {
        role: Rows(e.batch, e.current_BTV.float(), e.compared_BTV.float()) for role, e in half.items()
    }
    for name in METHODS:
        method = make_method(name, {"skipped_tokens": 0} if name == "ceu" else {})
        found = method.loss(half).total
        assert found.dtype == torch.float32
        assert torch.equal(found, method.loss(single).total)


@given(st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_generic_labels_equal_a_brute_force_computation(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before, after = 3 * torch.randn(2, 6, generator=generator, dtype=torch.float64)
    barred = seed % 6
    best, largest = -1, -math.inf
    for word, (b, r) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        value = b - alpha * (r - b) if r > b else b
        if word != barred and value > largest:
            best, largest = word, value
    assert generic_label(before, after, alpha, {barred}) == best
