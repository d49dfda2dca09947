"""`sisa eval attacks` on tiny models: its JSON and words, a log that continues, and invalid input."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from approx.attacks.registry import ATTACKS
from approx.evaluation.evaluated_models import open_evaluated
from approx.evaluation.questions import PromptForm
from approx.metrics.probability import probability
from tests.models.patch_bench import KNOWN, STRANGERS
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Done, Tiny, command

pytestmark = pytest.mark.torch
FEW = ("--samples", 2, "--max-new-tokens", 4, "--prompt", "completion")


class Attack:
    """Run the command on the texts of the two people that the base knows."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys, self.folder = capsys, folder
        self.data = self.file("known", KNOWN)
        self.unseen = self.file("unseen", STRANGERS)

    def file(self, name: str, rows: Any) -> Path:
        pairs = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in pairs))
        return path

    def __call__(self, *arguments: Any) -> Done:
        shared = ("--data", self.data, "--out", self.folder / "logs", *FEW)
        return command(self.capsys, "eval", "attacks", *shared, *arguments)


@pytest.fixture
def attack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Attack:
    return Attack(capsys, tmp_path)


def test_every_attack_is_made_once_and_the_log_continues(
    attack: Attack, knowing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    also = ("--also", f"aliases={attack.data}")
    sets = ("--holdout", attack.unseen, "--others", attack.unseen, *also)
    models = ("-m", knowing, "--reference", knowing.parent / "plain", "--before", knowing)
    done = attack(*models, *sets)
    assert done.code == 0
    (model,) = done.json["models"]
    assert model["not_made"] == {"linear_probe": "needs 4 texts or more: --data"}
    curves = dict(model["curves"])
    assert set(curves) == {"as_it_is", *ATTACKS} - {"membership", "linear_probe"}
    asked = len(KNOWN) - len(KNOWN) // 4
    assert curves.pop("other_questions")["num_texts"] == len(KNOWN)
    assert curves.pop("depth")["means"]["all"] == 0, "nothing was forgotten"
    assert {each["num_texts"] for each in curves.values()} == {asked}
    assert model["linear_probe"] is None
    assert model["curves"]["as_it_is"]["means"]["0"] == pytest.approx(done.json["known_before"])
    assert model["curves"]["relearning"]["steps_until_half"] == 0
    assert model["curves"]["quantisation"]["steps_until_half"] is None
    assert list(model["curves"]["relearning"]["means"]) == ["0", "3", "20"]
    assert {"reference", "gradient_norm"} < set(model["membership"])
    assert model["membership"]["loss"]["value"] == 1.0
    assert "still knows" in model["membership"]["loss"]["reading"]
    assert model["privleak"]["value"] < -50
    log = Path(model["log"])
    lines = log.read_bytes().splitlines(keepends=True)
    assert not any(row["completion"].strip() in log.read_text() for row in KNOWN)
    log.write_bytes(b"".join(lines[:-2]) + lines[-2][:9])
    assert attack(*models, *sets).json == done.json
    assert log.read_bytes() == b"".join(lines)

    from cluster.cli.cli import run

    shown = ["--data", attack.data, "--out", attack.folder / "logs", *FEW, *models, *sets]
    assert run(["eval", "attacks", *map(str, shown)]) == 0
    out = capsys.readouterr().out
    for said in ("probability as it is", "half is back after 0.0 steps", "PrivLeak -", "loss AUC 1.000"):
        assert said in out


def test_a_deletion_ready_model_is_attacked_by_prompts(attack: Attack, tiny: Tiny) -> None:
    done = attack("-m", tiny.directory)
    assert done.code == 0
    (model,) = done.json["models"]
    assert set(model["not_made"]) == {
        "relearning", "relearning_out_of_domain", "quantisation", "membership", "depth",
        "linear_probe", "other_questions",
    }  # fmt: skip
    assert set(model["curves"]) == {"as_it_is", *ATTACKS} - set(model["not_made"])
    pairs = [(row["prompt"], row["completion"]) for row in KNOWN][len(KNOWN) // 4 :]
    scores = open_evaluated(str(tiny.directory)).score(pairs, PromptForm("completion"), 4)
    wanted = fmean(probability(each.loss) for each in scores)
    assert model["curves"]["as_it_is"]["means"]["0"] == pytest.approx(wanted, abs=1e-5)


def test_the_depth_score_needs_models_of_one_base(
    attack: Attack, knowing: Path, tiny_base: Path
) -> None:
    others = ("--reference", tiny_base, "--before", knowing, "--attack", "depth")
    more = ("--attack", "linear_probe", "--taught", attack.unseen)
    (model,) = attack("-m", knowing, *others, *more).json["models"]
    assert "one base" in model["not_made"]["depth"]
    assert set(model["linear_probe"]) == {"layer 0", "layer 1"}


def test_what_is_refused(attack: Attack, tiny_base: Path, tmp_path: Path) -> None:
    unknown = attack("-m", tmp_path / "is not opened", "--attack", "shouting")
    assert (unknown.code, unknown.error["got"]) == (2, "shouting")
    other = make_tiny_base(tmp_path / "other")
    held = json.loads((other / "tokenizer.json").read_text())
    words = held["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (other / "tokenizer.json").write_text(json.dumps(held))
    mismatched = attack("-m", tiny_base, "--reference", other)
    assert (mismatched.code, mismatched.error["type"]) == (2, "InvalidInput")
    assert "another tokenizer" in mismatched.error["message"]
    (other / "chat_template.jinja").unlink(missing_ok=True)
    for file in ("tokenizer_config.json", "tokenizer.json"):
        held = json.loads((other / file).read_text())
        held.pop("chat_template", None)
        (other / file).write_text(json.dumps(held))
    untold = attack("-m", other, "--prompt", "chat")
    assert (untold.code, len(untold.problems)) == (2, len(KNOWN) - len(KNOWN) // 4)
    attack.data.write_text('{"question": "Who?"}\n')
    assert attack("-m", tiny_base).code == 2
    assert attack("-m", tiny_base, "--also", "aliases").code == 2
    assert attack("-m", tiny_base, *(("--also", f"aliases={attack.unseen}") * 2)).code == 2
    asked = attack.file("known", KNOWN)
    overlap = attack("-m", tiny_base, "--holdout", asked, "--taught", attack.unseen)
    assert overlap.error["message"] == "sets that must be apart overlap"
    assert len(overlap.problems) == len(KNOWN)


def test_an_attack_that_is_named_twice_is_made_once(attack: Attack, tiny_base: Path) -> None:
    twice = ("-m", tiny_base, *(("--attack", "rewording") * 2))
    once = attack(*twice)
    assert once.code == 0
    assert attack(*twice).json == once.json, "the log can be read again"


def test_a_reference_that_is_named_twice_is_one(attack: Attack, tiny_base: Path, knowing: Path) -> None:
    twice = ("-m", knowing, *(("--reference", tiny_base) * 2), "--holdout", attack.unseen)
    (model,) = attack(*twice, "--attack", "membership").json["models"]
    assert "reference" in model["membership"]
    assert "lira" not in model["membership"], "which needs two"


def test_a_model_without_finite_scores_is_refused_wherever_it_stands(
    attack: Attack, tiny_base: Path, tmp_path: Path
) -> None:
    broken = without_numbers(tiny_base, tmp_path / "broken")
    for models, where in (
        (("-m", broken), "broken, as_it_is"),
        (("-m", tiny_base, "--before", broken), "broken"),
        (("-m", tiny_base, "--reference", broken, "--holdout", attack.unseen), "--reference"),
    ):
        done = attack(*models, "--attack", "membership")
        assert (done.code, done.error["type"]) == (2, "InvalidInput")
        assert "not finite" in done.error["message"]
        assert done.error["where"].endswith(where)


def without_numbers(base: Path, to: Path) -> Path:
    """Return a copy of a model one of whose weights is not a number."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to
