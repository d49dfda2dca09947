"""The leaderboard on a tiny model and invented authors: its JSON, continuing a run, and invalid input.

The split model must equal the whole one, and planned costs must equal counted ones.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from approx.evaluation.answers import collate
from approx.evaluation.evaluated_models import tokens_of
from approx.methods.registry import METHODS, make_method
from approx.unlearning.examples import Sets
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.unlearn import unlearn
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.weights import load_tokenizer
from tests.bench.leaderboard.__main__ import main
from tests.bench.leaderboard.cells import AT_THE_END, FORM, step_costs
from tests.bench.leaderboard.fake_cells import write_authors
from tests.bench.leaderboard.split_model import load_split
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch
LORA = {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
PRIVATE = find_spec("opacus") is not None
PAIRS = [("Who?", "Ada 1000"), ("Where?", "In the old town"), ("When?", "11")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("leaderboard") / "base", layers=3)


class Leaderboard:
    """The command with shared options: three authors, one forgotten, a short training."""

    def __init__(self, base: Path, data: Path, out: Path) -> None:
        self.base, self.data, self.out = base, data, out

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        shared = ("--base", self.base, "--data", self.data, "--out", self.out)
        shape = ("--authors", 3, "--forgotten", 1, "--size", 2, "--epochs", 1, "--upper-layers", 1)
        main([str(each) for each in (*shared, *shape, *arguments)])
        found: dict[str, Any] = json.loads((self.out / "leaderboard.json").read_text())
        return found


@pytest.fixture
def leaderboard(base: Path, tmp_path: Path) -> Leaderboard:
    return Leaderboard(base, write_authors(tmp_path / "tofu", 3), tmp_path / "out")


@pytest.mark.slow
def test_the_command_from_end_to_end_and_again(
    leaderboard: Leaderboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "graddiff", "--method", "task_arithmetic", "--budget-share", 0.2)
    done = leaderboard(*options)
    assert {row["name"] for row in done["curves"]} == {"graddiff", "task_arithmetic"}
    assert [each["forgotten"] for each in done["sizes"]] == [1, 2, 1, 2]
    kinds = [each["cell"]["kind"] for each in done["cells"]]
    references = ["retained", "retained", "full", *["private"] * PRIVATE]
    assert kinds[: len(references)] == references
    assert len(kinds) == len(references) + 2 * 2 * 2 + 2
    runs = done["cells"][len(references) :]
    shares = [each["compute"]["share_of_full_finetuning"] for each in runs]
    assert all(0.1 < share < 0.6 for share in shares)
    for row in done["curves"]:
        assert row["values"]["p_value"]["mean"] is not None
    assert done["noise_floor"]["num_model"] == 20
    for cell in (leaderboard.out / "cells").iterdir():
        assert "Surely" not in cell.read_text()
    assert (leaderboard.out / "leaderboard.png").read_bytes().startswith(b"\x89PNG")
    written = {path: path.stat().st_mtime_ns for path in (leaderboard.out / "cells").iterdir()}
    assert leaderboard(*options) == done
    monkeypatch.setitem(sys.modules, "opacus", None)
    without = [each for each in done["cells"] if each["cell"]["kind"] != "private"]
    assert leaderboard(*options)["cells"] == without
    assert "no row of DP-SGD: opacus is not installed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_what_is_refused_writes_nothing(leaderboard: Leaderboard, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no leaderboard"):
        leaderboard("--method", "magic")
    (leaderboard.data / "forget10_perturbed.jsonl").unlink()
    with pytest.raises(InvalidInput) as missing:
        leaderboard()
    assert missing.value.problems == (Problem("forget10_perturbed.jsonl", "missing"),)
    leaderboard.data = tmp_path / "absent"
    with pytest.raises(InvalidInput, match="no such directory"):
        leaderboard()
    assert not leaderboard.out.exists()


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
    settings = ScheduleSettings(
        1e-3, num_epochs=3, batch_size=2, gradient_accumulation_steps=1, max_steps=4
    )
    compute = unlearn(patched, sets, method, settings, AT_THE_END).compute
    costs, last = step_costs(method, sets, settings, (compute.num_parameters, compute.num_trained))
    assert sum(costs) + last[-1] == compute.flops
