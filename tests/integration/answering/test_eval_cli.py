"""`sisa eval tofu` on tiny models: its JSON, its logs, invalid input, and Ray against serial.

A model against itself has forget quality 1 and AUC 0.5 everywhere.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from approx.evaluation.question_log import read_log
from tests.fakes.benchmarks import SPLIT, write_made_up, write_published
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Done, Tiny, command

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("other") / "base", seed=1)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_made_up(tmp_path / "tofu")


class Evaluate:
    """Run the command as all tests do: few new tokens, one prompt form, logs in one directory."""

    def __init__(self, capsys: pytest.CaptureFixture[str], data: Path, out: Path) -> None:
        self.capsys, self.data, self.out = capsys, data, out

    def __call__(self, *arguments: Any, executor: str = "serial", tokens: int = 6) -> Done:
        shared = ("--data", self.data, "--split", SPLIT, "--out", self.out, "--executor", executor)
        form = ("--prompt", "completion", "--max-new-tokens", tokens)
        return command(self.capsys, "eval", "tofu", *shared, *form, *arguments)


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> Evaluate:
    return Evaluate(capsys, data, tmp_path / "logs")


def test_a_model_against_itself(evaluate: Evaluate, tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    done = evaluate("-m", tiny_base, "--reference", copy, "--reference", tiny_base)
    assert done.code == 0
    (model,) = done.json["models"]
    quality = model["forget_quality"]
    assert (quality["p_value"], quality["statistic"], quality["num_model"]) == (1.0, 0.0, 2)
    assert quality["noise_floor"]["p_value"] == 1.0
    for attack in model["attacks_against_reference"].values():
        assert (attack["value"], attack["low"], attack["high"]) == (0.5, 0.5, 0.5)
    assert model["attacks"] is None
    headline = model["headline"]
    assert headline["lost"] == []
    assert headline["findings"]["utility"]["value"] == pytest.approx(model["model_utility"])
    assert {each["away"]["value"] for each in headline["findings"].values()} == {0}
    assert model["forget"]["extraction_strength"] >= model["forget"]["extraction_floor"] > 0


def test_the_json_contract(evaluate: Evaluate, tiny_base: Path, other_base: Path) -> None:
    done = evaluate("-m", tiny_base, "--reference", other_base)
    assert set(done.json) == {"split", "models", "references"}
    (model,), (reference,) = done.json["models"], done.json["references"]
    named = {"model", "digest", "log", "settings"}
    assert set(reference) == named
    assert set(model) == named | {
        *("num_questions", "truth_ratio", "nine", "model_utility", "forget", "forget_quality"),
        *("aggregate", "attacks", "attacks_against_reference", "privleak", "headline"),
    }
    assert len(model["nine"]) == 9
    assert set(model["forget_quality"]) == {
        *("p_value", "statistic", "num_model", "num_reference", "noise_floor"),
    }
    lines = Path(model["log"]).read_text().splitlines()
    assert len(lines) == 1 + sum(model["num_questions"].values())
    assert json.loads(lines[0])["settings"] == model["settings"]
    assert "11 of 11 questions" in done.err


def test_logs_alone_need_no_data(
    capsys: pytest.CaptureFixture[str], evaluate: Evaluate, tiny_base: Path, other_base: Path
) -> None:
    first = evaluate("-m", tiny_base, "--reference", other_base)
    logs = [each["log"] for name in ("models", "references") for each in first.json[name]]
    shutil.rmtree(evaluate.data)
    alone = ("--data", evaluate.data, "--executor", "serial")
    again = command(capsys, "eval", "tofu", *alone, "-m", logs[0], "--reference", logs[1])
    assert again.code == 0
    assert again.json["split"] == SPLIT
    (before,), (after,) = first.json["models"], again.json["models"]
    assert after == before | {"model": Path(logs[0]).name}
    holdout = command(capsys, "eval", "tofu", *alone, "-m", logs[0], "--holdout", "unseen.jsonl")
    assert holdout.code == 2


def test_a_published_log_is_a_model_and_a_reference(
    capsys: pytest.CaptureFixture[str], evaluate: Evaluate, tiny_base: Path, tmp_path: Path
) -> None:
    first = evaluate("-m", tiny_base, "--reference", tiny_base)
    _, rows = read_log(Path(first.json["models"][0]["log"]))
    published = write_published(tmp_path / "eval_log_aggregated.json", rows)
    again = evaluate("-m", tiny_base, "--reference", published)
    assert again.json["models"][0]["forget_quality"] == first.json["models"][0]["forget_quality"]
    alone = command(capsys, "eval", "tofu", "-m", published, "--reference", published)
    (found,) = alone.json["models"]
    assert found["nine"] == first.json["models"][0]["nine"]
    assert found["num_questions"]["forget"] == 2
    held = json.loads(published.read_text())
    del held["eval_log_forget.json"]["avg_gt_loss"]["1"]
    published.write_text(json.dumps(held))
    damaged = command(capsys, "eval", "tofu", "-m", published)
    assert (damaged.code, damaged.error["type"]) == (4, "IntegrityError")
    assert str(published) in damaged.error["where"]


def test_a_deletion_ready_model_is_evaluated(evaluate: Evaluate, tiny: Tiny) -> None:
    done = evaluate("-m", tiny.directory, "--reference", tiny.base, tokens=3)
    assert done.code == 0
    (model,) = done.json["models"]
    assert model["model"] == str(tiny.directory)
    assert model["digest"] != done.json["references"][0]["digest"]
    rows = [json.loads(line) for line in Path(model["log"]).read_text().splitlines()[1:]]
    retained = next(row for row in rows if row["set"] == "retain" and row["idx"] == 0)
    question = json.loads((evaluate.data / "retain_perturbed.jsonl").read_text().splitlines()[0])
    expected = tiny.open().generate(question["question"], max_new_tokens=3, kind="completion").text
    assert retained["generation"] == expected


def test_a_deletion_makes_another_model_of_it(evaluate: Evaluate, tiny: Tiny) -> None:
    before = evaluate("-m", tiny.directory, tokens=3).json["models"][0]
    tiny.open().forget(subject="p001")
    after = evaluate("-m", tiny.directory, tokens=3).json["models"][0]
    assert after["digest"] != before["digest"]
    assert after["log"] != before["log"]


def test_a_holdout_gives_attacks(evaluate: Evaluate, tiny_base: Path, tmp_path: Path) -> None:
    unseen = tmp_path / "unseen.jsonl"
    unseen.write_text('{"question": "q1", "answer": "a b"}\n{"question": "q2", "answer": "c"}\n')
    (model,) = evaluate("-m", tiny_base, "--holdout", unseen).json["models"]
    assert set(model["attacks"]) == {"loss", "zlib", "min_k", "min_k_plus_plus"}
    assert model["num_questions"]["holdout"] == 2
    assert (model["forget_quality"], model["aggregate"]) == (None, None)


def test_what_is_refused(evaluate: Evaluate, tiny_base: Path, tmp_path: Path) -> None:
    log = evaluate("-m", tiny_base).json["models"][0]["log"]
    other = evaluate("-m", tiny_base, "--reference", log, tokens=7)
    assert (other.code, other.error["type"]) == (2, "ConfigConflict")
    fewer = evaluate("-m", tiny_base, "--reference", log, "--questions", 1)
    assert (fewer.code, fewer.error["type"]) == (2, "InvalidInput")
    (evaluate.data / "retain_perturbed.jsonl").unlink()
    missing = evaluate("-m", tiny_base)
    assert (missing.code, missing.problems) == (2, [("retain_perturbed.jsonl", "missing")])
    absent = evaluate("-m", tmp_path / "absent")
    assert absent.code == 2


def test_the_model_before_adds_relearning_and_depth(
    evaluate: Evaluate, tiny_base: Path, other_base: Path
) -> None:
    path = evaluate.data / f"{SPLIT}_perturbed.jsonl"
    path.write_text(path.read_text() * 2)
    done = evaluate("-m", tiny_base, "--reference", other_base, "--before", tiny_base)
    findings = done.json["models"][0]["headline"]["findings"]
    assert findings["relearning"]["away"]["num"] == 3
    assert "half of it is back after 0.0 steps" in findings["relearning"]["measure"]
    assert (findings["depth"]["value"], findings["depth"]["lost"]) == (0, True)
    log = done.json["models"][0]["log"]
    alone = evaluate("-m", log, "--before", tiny_base)
    assert alone.code == 2


def test_a_deletion_ready_reference_has_no_weights_to_attack(evaluate: Evaluate, tiny: Tiny) -> None:
    path = evaluate.data / f"{SPLIT}_perturbed.jsonl"
    path.write_text(path.read_text() * 2)
    models = ("-m", tiny.base, "--reference", tiny.directory, "--before", tiny.base)
    headline = evaluate(*models, tokens=3).json["models"][0]["headline"]
    assert headline["findings"]["relearning"]["target"] is None
    assert "one set of weights" in headline["not_measured"]["depth"]


@pytest.mark.ray
def test_on_ray_the_same_comes_out(
    evaluate: Evaluate, tiny_base: Path, other_base: Path, tmp_path: Path
) -> None:
    serial = evaluate("-m", tiny_base, "-m", other_base, tokens=3)
    evaluate.out = tmp_path / "by-ray"
    by_ray = evaluate("-m", tiny_base, "-m", other_base, executor="ray", tokens=3)
    assert "11 of 11 questions" in by_ray.err
    (evaluate.data / "absent").mkdir()
    failed = evaluate("-m", tiny_base, "-m", evaluate.data / "absent", executor="ray", tokens=3)
    assert (failed.code, failed.error["type"]) == (2, "InvalidInput")
    for one, other in zip(serial.json["models"], by_ray.json["models"], strict=True):
        assert one["digest"] == other["digest"]
        assert one["model_utility"] == pytest.approx(other["model_utility"], abs=1e-5)
        assert one["forget"] == pytest.approx(other["forget"], abs=1e-5)
