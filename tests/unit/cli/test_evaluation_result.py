"""An evaluation in words: forget quality with n, D and noise floor, and no text of an answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from approx.attacks.registry import ATTACKS
from approx.benchmarks.headline import finding, headline
from approx.benchmarks.tofu_measures import Aggregates, ForgetSet
from approx.evaluation.asking import FinishedLog
from approx.evaluation.question_log import LogRow
from approx.metrics.auc import Auc
from approx.metrics.forget_quality import forget_quality
from approx.metrics.model_utility import NINE
from approx.metrics.privleak import PrivLeak
from cluster.cli.evaluation.attacks import ATTACK_NAMES
from cluster.cli.evaluation.tofu import measured_on_tofu

ROW = LogRow("forget01", 0, 0.7, 3, "Secret answer", 0.9, (1.0,), 1.0, "Secret words")
MODEL = FinishedLog("model\x1b[31m", "d" * 64, Path("logs/model.jsonl"), {"kind": "chat"}, [ROW])
AUC = Auc(0.75, 0.5, 1.0, 0.95, 40, 40)
FOUND = Aggregates(
    num_questions={"retain": 3, "forget01": 40},
    truth_ratio="geometric",
    nine=dict.fromkeys(NINE, 0.5),
    model_utility=0.5,
    forget=ForgetSet(0.9, 0.8, 0.7, 0.6, 0.05, 0.4),
    forget_quality=forget_quality([1.0, 2.0], [1.0, 3.0], [1.5, 2.5]),
    aggregate=0.6,
    attacks={"loss": AUC},
    attacks_against_reference=None,
)
FIRST = headline({"depth": finding("depth", [[[0.5, 0.25]]], [[[1.0, 1.0]]], "below")})


def test_a_measured_model_in_words_and_json_quotes_no_answer() -> None:
    result = measured_on_tofu("forget01", [(MODEL, FOUND, FIRST)], [MODEL])
    body = json.loads(json.dumps(result.json))
    assert (result.exit_code, body["models"][0]["model_utility"]) == (0, 0.5)
    assert body["models"][0]["forget_quality"]["noise_floor"]["num_reference"] == 2
    for words in (
        "n = 2 and 2, D = 0.5000; noise floor of two references p = ",
        "loss AUC 0.750 [0.500, 1.000]",
        "truth ratio: geometric",
        "knowing nothing scores",
        "against the reference: not measured",
        "depth                0.3750, beside 1.0000: -0.6250",
        "LOST",
        "comes_back           not measured: needs questions in other words",
    ):
        assert words in result.text
    assert "Secret" not in json.dumps(body) + result.text
    assert "\x1b" not in result.text


def test_an_auc_far_below_one_half_and_privleak_in_words() -> None:
    below = {"loss": Auc(0.0, 0.0, 0.0, 0.95, 40, 40), "zlib": AUC}
    leak = PrivLeak(92.0, 80.0, 100.0, 0.95, 0.04, 0.5, 40, 40)
    over = replace(FOUND, attacks=below, privleak=leak)
    text = measured_on_tofu("forget01", [(MODEL, over, FIRST)], [MODEL]).text
    assert "loss: every member scores below every non-member: over-unlearned" in text
    assert "PrivLeak +92.0% [+80.0, +100.0]" in text
    plain = measured_on_tofu("forget01", [(MODEL, FOUND, FIRST)], [MODEL]).text
    assert "over-unlearned" not in plain


def test_what_was_not_measured_says_what_it_needs() -> None:
    alone = replace(FOUND, forget_quality=None, aggregate=None, attacks=None)
    text = measured_on_tofu("forget01", [(MODEL, alone, FIRST)], []).text
    assert "forget quality not measured: give --reference" in text
    assert "forget against holdout: not measured: give --holdout" in text
    one_judge = replace(FOUND, forget_quality=forget_quality([1.0], [2.0]))
    text = measured_on_tofu("forget01", [(MODEL, one_judge, FIRST)], []).text
    assert "noise floor of two references not measured: give a second --reference" in text


def test_the_help_names_every_attack() -> None:
    assert ", ".join(ATTACKS) == ATTACK_NAMES
