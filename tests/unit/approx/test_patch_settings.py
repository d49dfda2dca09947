"""The settings of a patch: JSON values with all defaults, and every problem reported at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from approx.methods.registry import METHODS
from approx.patches.patch_settings import Adapter, parse_settings, settings_of
from cluster.cli import patches
from sisa.core.errors import InvalidInput

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults_are_written_out_and_read_back_the_same(method: str) -> None:
    made = settings_of(method, {}, Adapter(), seed=7, sequence_len=64)
    again = parse_settings(json.loads(json.dumps(made, allow_nan=False))).to_json()
    assert again == made == json.loads(json.dumps(made))
    assert made["pace"]["seed"] == 7
    assert made["sequence_len"] == 64
    assert made["bounds"] == {
        "max_utility_drop": 0.1,
        "target_probability": 0.1,
        "check_every": 10,
        "patience": 3,
    }
    assert made["overlength"] == "refuse"
    assert "max_seconds" not in json.dumps(made)


def test_flat_values_find_their_blocks() -> None:
    values = {
        "alphas": [0.5],
        "num_epochs": 2,
        "lora_r": 2,
        "lora_target_modules": ["q_proj"],
        "max_utility_drop": None,
        "alpha": 0.5,
        "check_every": 3,
        "selection": "traced",
    }
    found = settings_of("task_arithmetic", values, Adapter())
    assert found["hyperparameters"] == {"alpha": 0.5, "alphas": [0.5]}
    assert found["selection"] == {"selection": "traced", "selected_share": 0.25}
    assert found["pace"]["num_epochs"] == 2
    assert found["adapter"] == {"lora_r": 2, "lora_alpha": 16, "lora_target_modules": ["q_proj"]}
    assert (found["bounds"]["max_utility_drop"], found["bounds"]["check_every"]) == (None, 3)


@pytest.mark.parametrize(
    ("method", "values", "where"),
    [
        ("gradient_descent", {"beta": 0.2}, {"method"}),
        ("gradient_descent", {"betta": 0.2}, {"method", "betta"}),
        ("npo", {"betta": 1, "speed": 2}, {"betta", "speed"}),
        (
            "npo",
            {"beta": 0, "retain_loss": "l2", "num_epochs": 0},
            {"beta", "retain_loss", "num_epochs"},
        ),
        ("npo", {"num_epochs": 10**9, "batch_size": 5000}, {"num_epochs", "batch_size"}),
        ("npo", {"lora_r": 0, "lora_alpha": "x"}, {"lora_r", "lora_alpha"}),
        ("npo", {"lora_r": True, "lora_target_modules": []}, {"lora_r", "lora_target_modules"}),
        ("npo", {"check_every": 0.5, "patience": 0}, {"check_every", "patience"}),
        ("npo", {"learning_rate": float("nan"), "max_steps": "x"}, {"learning_rate", "max_steps"}),
        ("npo", {"selection": "some", "selected_share": 0}, {"selection", "selected_share"}),
        ("npo", {"selected_share": "half"}, {"selected_share"}),
        ("rome", {"selection": "fisher"}, {"selection"}),
        ("task_arithmetic", {"max_utility_drop": None}, {"alpha"}),
        ("task_arithmetic", {"alphas": 5}, {"hyperparameters"}),
        ("gradient_ascent", {"beta": 1}, {"beta"}),
    ],
)
def test_everything_wrong_is_named_at_once(method: str, values: dict[str, Any], where: set[str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        settings_of(method, values, Adapter())
    assert {each.where for each in caught.value.problems} == where


def test_a_job_of_another_procedure_is_refused() -> None:
    made = settings_of("npo", {}, Adapter())
    for other in (made | {"procedure": 1}, {k: v for k, v in made.items() if k != "procedure"}):
        with pytest.raises(InvalidInput) as caught:
            parse_settings(other)
        assert [each.where for each in caught.value.problems] == ["procedure"]


@pytest.mark.parametrize("given", [{}, {"method": "npo", "pace": 5, "surplus": 1}])
def test_settings_of_another_form(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        parse_settings(given)


def test_assignments_of_the_command_line() -> None:
    with pytest.raises(InvalidInput) as caught:
        patches.assignments(["beta", "=1", "a=1", "a=2"])
    assert [each.where for each in caught.value.problems] == ["--set 1", "--set 2", "--set 4"]
