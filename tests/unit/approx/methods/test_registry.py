"""Methods by name, what they need, which values are invalid, and arithmetic on task vectors."""

from __future__ import annotations

import re
import sys
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from approx.methods.editing.edit_run import second_moment
from approx.methods.editing.memit import Memit, least_squares_update
from approx.methods.editing.rome import Rome, rank_one_update
from approx.methods.method import Family
from approx.methods.registry import METHODS, make_method
from approx.methods.task_arithmetic import negate_patch
from approx.unlearning.target import check_fresh_patch
from sisa.core.errors import InvalidInput

pytestmark = pytest.mark.torch


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        make_method("gradient_descent")
    assert set(caught.value.expected.removeprefix("one of ").split(", ")) == set(METHODS)


def test_unknown_hyperparameters_are_refused_all_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        make_method("npo", {"beta": 0.1, "bta": 1, "gama": 2})
    assert [each.where for each in caught.value.problems] == ["bta", "gama"]
    with pytest.raises(InvalidInput, match="no such hyper-parameters"):
        make_method("gradient_ascent", {"beta": 1.0})


@pytest.mark.parametrize(
    ("name", "values", "where"),
    [
        ("npo", {"beta": 0.0}, ["beta"]),
        ("npo", {"beta": -1.0, "forget_weight": 0, "retain_weight": -2, "retain_loss": "l2"}, None),
        ("simnpo", {"gamma": float("nan")}, ["gamma"]),
        ("dpo", {"beta": float("inf")}, ["beta"]),
        ("idk_dpo", {"beta": True}, ["beta"]),
        ("graddiff", {"retain_weight": 0.0}, ["retain_weight"]),
        ("kl_minimisation", {"beta": "1"}, ["beta"]),
        ("wga", {"beta": 0.0, "retain_weight": -1}, ["beta", "retain_weight"]),
        ("satimp", {"beta1": -1.0, "beta2": "1"}, ["beta1", "beta2"]),
        ("ceu", {"skipped_tokens": -1}, ["skipped_tokens"]),
        ("ceu", {"skipped_tokens": 0.5, "forget_weight": 0}, ["forget_weight", "skipped_tokens"]),
        ("undial", {"beta": 0.0, "retain_loss": "l2"}, ["beta", "retain_loss"]),
        ("idk_nll", {"forget_weight": 0.0}, ["forget_weight"]),
        ("whp", {"forget_weight": 0.0, "alpha": -5}, ["alpha", "forget_weight"]),
        ("pdu", {"dual_step_size": -1, "retain_loss_eps": None}, ["retain_loss_eps", "dual_step_size"]),
        ("altpo", {"reference_free": 1, "num_alternates": 0}, ["reference_free", "num_alternates"]),
        ("altpo", {"num_alternates": 1.5, "beta": 0}, ["beta", "num_alternates"]),
        ("rmu", {"layer": -1, "steering_coefficient": 0}, ["steering_coefficient", "layer"]),
        (
            "rmu",
            {"layer": 1.5, "adaptive": 1, "control_seed": "x"},
            ["adaptive", "control_seed", "layer"],
        ),
        (
            "rome",
            {"layer": True, "value_steps": 0, "value_rate": 0},
            ["value_rate", "value_steps", "layer"],
        ),
        ("memit", {"num_layers": 0, "moment_weight": 0}, ["moment_weight", "num_layers"]),
        ("task_arithmetic", {"alpha": -0.1}, ["alpha"]),
        ("task_arithmetic", {"alphas": ()}, ["alphas"]),
        ("task_arithmetic", {"alphas": (0.5, 0.0)}, ["alphas[1]"]),
    ],
)
def test_values_that_a_loss_is_not_defined_for(
    name: str, values: dict[str, Any], where: list[str] | None
) -> None:
    with pytest.raises(InvalidInput) as caught:
        make_method(name, values)
    expected = where or ["beta", "forget_weight", "retain_weight", "retain_loss"]
    assert [each.where for each in caught.value.problems] == expected


@pytest.mark.parametrize(
    ("name", "values", "reads", "compares"),
    [
        ("graddiff", {"retain_loss": "kl"}, {"forget", "retain"}, {"retain"}),
        ("npo", {"retain_weight": 0, "retain_loss": "kl"}, {"forget"}, {"forget"}),
        ("npo", {"retain_loss": "kl"}, {"forget", "retain"}, {"forget", "retain"}),
        ("undial", {"retain_weight": 1}, {"forget", "retain"}, {"forget"}),
        ("pdu", {"retain_weight": 0}, {"forget", "retain"}, set()),
        ("altpo", {"reference_free": True}, {"forget", "preferred", "retain"}, set()),
    ],
)
def test_what_a_method_needs_follows_its_values(
    name: str, values: dict[str, Any], reads: set[str], compares: set[str]
) -> None:
    method = make_method(name, values)
    assert set(method.reads) == reads
    assert set(method.compares) == compares


def test_an_edit_writes_to_no_layer_before_one_is_chosen() -> None:
    assert (Rome(layer=1).layers, Memit(layer=1).layers) == (range(1, 2), range(2))
    for method in (Rome(), Memit()):
        with pytest.raises(ValueError, match="chosen"):
            _ = method.layers


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_names_its_family_and_paper(name: str) -> None:
    kind = METHODS[name]
    assert kind.family in get_args(Family)
    authors, year, title = re.fullmatch(r"(\D+) (\d{4}), (.+)", kind.paper).groups()  # type: ignore[union-attr]
    source = " ".join(str(sys.modules[kind.__module__].__doc__).split())
    assert f"{authors} {year}" in source
    assert title.split(":")[0].lower() in source.lower()


def patch(seed: int, *, fresh: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(3, 2) if fresh else torch.randn(3, 2, generator=generator)
    return {"m.lora_A.d": torch.randn(2, 4, generator=generator), "m.lora_B.d": second}


@given(st.integers(0, 100), st.floats(0.01, 2.0))
def test_a_negated_patch_changes_the_weights_by_the_negative(seed: int, alpha: float) -> None:
    tuned = patch(seed, fresh=False)
    found = negate_patch(patch(seed + 1, fresh=True), tuned, alpha)
    expected = -alpha * (tuned["m.lora_B.d"] @ tuned["m.lora_A.d"])
    torch.testing.assert_close(found["m.lora_B.d"] @ found["m.lora_A.d"], expected)


def test_a_patch_with_alpha_zero_is_the_fresh_one_bit_for_bit() -> None:
    fresh = patch(0, fresh=True)
    fresh["m.lora_A.d"][0, 0] = -0.0
    found = negate_patch(fresh, patch(1, fresh=False), 0.0)
    for name, each in fresh.items():
        assert torch.equal(found[name].view(torch.int32), each.view(torch.int32))
        assert found[name].data_ptr() != each.data_ptr()


def test_a_used_patch_is_refused() -> None:
    check_fresh_patch(patch(0, fresh=True))
    with pytest.raises(InvalidInput, match="fresh"):
        check_fresh_patch(patch(0, fresh=False))


def drawn(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a matrix [5, 6], three keys, changes of their values, and texts for a second moment."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 6), (3, 6), (3, 5), (40, 6))
    return tuple(torch.randn(each, generator=generator, dtype=torch.float64) for each in shapes)  # type: ignore[return-value]


@given(st.integers(0, 10_000))
def test_after_a_rank_one_update_the_key_has_its_new_value(seed: int) -> None:
    matrix, (key, *_), (change, *_), texts = drawn(seed)
    moment = second_moment(texts)
    a, b = rank_one_update(key, change, moment)
    assert a.shape == (1, 6)
    assert b.shape == (5, 1)
    torch.testing.assert_close((matrix + b @ a) @ key, matrix @ key + change)
    along = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    along -= torch.outer(along @ key, key) / (key @ key)  # keeps the key's value
    cost = [((b @ a + each) @ moment @ (b @ a + each).T).trace() for each in (0 * along, along, -along)]
    assert cost[0] <= min(cost[1:])


@given(st.integers(0, 10_000), st.floats(0.01, 100.0))
def test_many_edits_equal_a_direct_least_squares_solve(seed: int, weight: float) -> None:
    """Append to the keys a square root of the moment, whose values must not change."""
    _, keys, changes, texts = drawn(seed)
    moment = second_moment(texts)
    root = torch.linalg.cholesky(weight * moment).T
    system, wanted = (
        torch.cat([keys, root]),
        torch.cat([changes, torch.zeros(6, 5, dtype=torch.float64)]),
    )
    direct = torch.linalg.lstsq(system, wanted).solution.T
    a, b = least_squares_update(keys, changes, moment, weight)
    assert a.shape == (3, 6)
    torch.testing.assert_close(b @ a, direct)


def test_a_second_moment_is_the_mean_of_outer_products() -> None:
    keys = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    expected = torch.tensor([[5.0, 1.0], [1.0, 2.0]], dtype=torch.float64) + 0.01 * 3.5 * torch.eye(2)
    torch.testing.assert_close(second_moment(keys), expected.double())
