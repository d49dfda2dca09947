"""Patches in words: every result is marked approximate, whatever its report lacks, in safe words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import patches
from cluster.cli.cli import run
from cluster.render.result import Result
from sisa.core.patches import WRITTEN, Patch, PatchJob, VaultSet
from sisa.flows.patches.patching import Unlearnt

REPORT: dict[str, Any] = {
    "approximate": True,
    "method": "npo",
    "hyperparameters": {"beta": 0.1},
    "settings": {"num_epochs": 3},
    "ending": "finished",
    "why": "all steps were taken",
    "step": 3,
    "num_steps": 3,
    "compute": {
        "seconds": 1.5,
        "flops_estimated": 10**12,
        "peak_memory_bytes": 2**30,
    },
    "metrics_before": {"forget_probability": 0.9, "forget_extraction_floor": 0.1, "retain_utility": 0.5},
    "metrics_after": {"forget_probability": None, "forget_extraction_floor": 0.1, "retain_utility": 0.4},
    "limits": ["An estimate."],
    "outcome": "forgotten",
    "still_known": {"before": 4, "after": 0, "of": 4},
    "sets": {
        "num_forget": 100,
        "num_forget_measured": 64,
        "num_retain": 40,
        "num_judged_measured": 12,
        "retain": "written by the base",
    },
    "robustness": {
        "num_texts": 16,
        "relearning": {"0": 0.05, "3": 0.2, "20": 0.7},
        "steps_until_half": 12.5,
        "control": {"of": "the reference", "0": 0.04, "3": 0.1, "20": 0.6},
        "rounding": {"8": 0.05, "4": 0.06},
        "rewording": {"before": 0.5, "after": 0.03},
    },
    "composition": {
        "num_records": 2,
        "base": None,
        "shards": {
            "num_records": 2,
            "answer_probability_before": 0.8,
            "answer_probability_after": 0.7,
            "agreement": 0.95,
            "kl": 0.01,
        },
    },
}
JOB = PatchJob("b", (), ("f" * 64,), WRITTEN, {"method": "npo"}, "p")
PATCH = Patch(1, JOB, "active", "then", "now", "m", "a", 9, report=REPORT)
KEPT = VaultSet("f" * 64, "forget", 4, "asked\x1b[31m", "now", "s", 9, request_id="req-1")


def read(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(result.json))
    assert found["approximate"] is True
    assert "approximate" in result.text
    return found


def test_a_patch_that_was_made_is_measured_in_words() -> None:
    result = patches.unlearnt(Unlearnt(PATCH, False, REPORT, 1, 0, 6, 0.125), Path("model"))
    found = read(result)
    assert (found["patch"]["version"], found["patch"]["key"]) == (1, PATCH.key)
    assert "report" not in found["patch"]
    assert (result.exit_code, found["slices_trained"], found["sets_erased"]) == (0, 6, 1)
    for words in (
        "approximate: patch 1 (npo",
        "probability 0.9000 -> undefined",
        "utility 0.5000 -> 0.4000",
        "still known: 0 of 4 probed texts (before: 4): forgotten",
        "forget set (64 of 100 texts)",
        "1e+12 operations, peak",
        "0.0500; relearnt for 3 and 20 steps 0.2000 and 0.7000",
        "(a control that never knew, the reference: 0.1000 and 0.6000)",
        "rounded to 8 bits 0.0500, 4 bits 0.0600",
        "half of what the patch took is back after 12.5 steps",
        "asked in other words 0.5000 -> 0.0300",
        "probability 0.8000 -> 0.7000",
        "same likeliest token 95.0%",
        "12.5% of the tokens of their answers changed",
        "retrained over it: 6 slices",
        "sisa approx show -m model 1",
    ):
        assert words in result.text


def test_a_report_read_from_json_lists_attacks_in_the_same_order() -> None:
    """The ledger's JSON has sorted keys: "20" before "3", and "4" before "8"."""
    stored = json.loads(json.dumps(REPORT, sort_keys=True))
    text = patches.patch_shown(replace(PATCH, report=stored), ()).text
    assert "relearnt for 3 and 20 steps 0.2000 and 0.7000" in text
    assert "rounded to 8 bits 0.0500, 4 bits 0.0600" in text


def test_what_is_still_known_is_reported_and_ends_with_7() -> None:
    left = {"outcome": "held back by the bound", "still_known": {"before": 4, "after": 2, "of": 4}}
    report = {**REPORT, **left, "patch_made": True}
    done = Unlearnt(replace(PATCH, report=report), False, report, 0, 1)
    result = patches.unlearnt(done, Path("model"))
    assert result.exit_code == 7
    assert "still known: 2 of 4 probed texts (before: 4): held back by the bound" in result.text
    assert "on top of this patch" in result.text
    assert "--max-utility-drop" in result.text


def test_a_run_that_diverged_is_tried_again_at_a_lower_rate() -> None:
    left = {"outcome": "still known", "still_known": {"before": 4, "after": 4, "of": 4}}
    report = {**REPORT, **left, "ending": "diverged", "patch_made": False}
    result = patches.unlearnt(Unlearnt(None, False, report, 0, 1), Path("model"))
    assert "a lower learning_rate" in result.text
    assert "this patch" not in result.text
    assert "revert" not in result.text


def test_a_reference_stands_beside_each_measure() -> None:
    report = {**REPORT, "metrics_reference": {"forget_probability": 0.004, "retain_utility": 0.5}}
    text = patches.patch_shown(replace(PATCH, report=report), ()).text
    assert "probability 0.9000 -> undefined (reference 0.0040)" in text
    assert "utility 0.5000 -> 0.4000 (reference 0.5000)" in text


def test_a_setting_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--selection", "fisher", "--set", "selection=all"]
    assert run(["approx", "unlearn", "-m", "no-model", "--forget", "no-file", *both]) == 2
    assert "selection: give the option or --set, not both" in capsys.readouterr().err


@pytest.mark.parametrize("patch", [None, PATCH])
def test_out_of_time_is_6_and_says_how_to_go_on(patch: Patch | None) -> None:
    result = patches.unlearnt(Unlearnt(patch, True, {**REPORT, "step": 2}, 0, 1), Path("model"))
    assert (result.exit_code, read(result)["unfinished"]) == (6, True)
    assert "sisa approx unlearn -m model" in result.text
    assert "after step 2 of 3" in result.text


@pytest.mark.parametrize("report", [{}, REPORT])
def test_nothing_good_is_2(report: dict[str, Any]) -> None:
    result = patches.unlearnt(Unlearnt(None, False, report, 1, 0), Path("model"))
    assert (result.exit_code, read(result)["patch"]) == (2, None)
    assert result.text.startswith("approximate: NO patch was made")


def test_the_list_says_what_is_held_and_what_shards_are_trained_over() -> None:
    erased = replace(KEPT, held=False, request_id="")
    result = patches.patches_listed(
        [PATCH, replace(PATCH, version=2, state="wanted")], [KEPT, erased], [PATCH.key]
    )
    found = read(result)
    assert [each["state"] for each in found["patches"]] == ["active", "wanted"]
    assert (found["vault"][0]["held"], found["over"]) == (True, [PATCH.key])
    assert "held, encrypted" in result.text
    assert "erased, since" in result.text
    assert "of req-1, consent: asked[31m" in result.text
    assert "shards are trained over it" in result.text
    assert read(patches.patches_listed([], [], []))["patches"] == []
    assert patches.patches_listed([], [], []).text == "approximate: no patches"


def test_one_patch_is_shown_with_its_settings_and_limits() -> None:
    result = patches.patch_shown(PATCH, ())
    assert read(result)["report"] == json.loads(json.dumps(REPORT))
    assert "npo: beta 0.1, num_epochs 3" in result.text
    assert "- An estimate." in result.text
    wanted = patches.patch_shown(replace(PATCH, state="wanted", report={}), ())
    assert "not made yet" in wanted.text
    assert read(wanted)["shards_trained_over_it"] is False


def test_what_is_taken_back_and_released() -> None:
    gone = patches.reverted([replace(PATCH, state="reverted"), replace(PATCH, state="dropped")])
    assert [each["state"] for each in read(gone)["reverted"]] == ["reverted", "dropped"]
    assert "given up before it was made" in gone.text
    released = patches.released([KEPT])
    assert read(released)["released"][0]["name"] == KEPT.name
    assert "1 set of 4 texts erased" in released.text
