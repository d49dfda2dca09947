"""Unlearning on a tiny model that has learnt a few answers by heart.

Covered are every method, the bounds of a run, continuing to the same bits, and invalid input.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from approx.evaluation.answers import collate
from approx.methods.ascent.gradient_ascent import GradientAscent
from approx.methods.method import Losses, Method, Role, mean_nll
from approx.methods.registry import METHODS, make_method
from approx.methods.rmu import Rmu
from approx.patches.patch_measures import MEASURE_LIMITS
from approx.patches.patch_report import REPORT_LIMITS, ApproxReport
from approx.patches.patch_settings import Adapter, parse_settings, settings_of
from approx.patches.selection import Selected
from approx.unlearning.causal_tracing import choose_layer, trace_layers
from approx.unlearning.examples import Sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.schedule import Pace
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge, StepLog
from approx.unlearning.target import Rows, Target
from approx.unlearning.unlearn import unlearn
from sisa.core.errors import ConfigConflict, IntegrityError, InvalidInput
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.numerics import pin_threads
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.crash import Crash
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("unlearning")]
LORA = {"lora_target_modules": "all-linear", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}
RATE = 3e-3
STEPS = 12


def example(prompt: int, answer: list[int]) -> Tokens:
    ids = [1, prompt, *answer]
    return Tokens(ids, [NO_LOSS, NO_LOSS, *answer])


FORGET = [example(10, [31, 32, 33]), example(11, [34, 35]), example(12, [36, 37, 38])]
RETAIN = [example(20, [41, 42]), example(21, [43, 44, 45]), example(22, [46, 47])]
PREFERRED = [example(prompt, [60, 61]) for prompt in (10, 11, 12)]
SETS = Sets(FORGET, RETAIN, PREFERRED, subjects=[1, 1, 1])


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a tiny Llama that knows FORGET and RETAIN by heart."""
    from transformers import AutoModelForCausalLM

    pin_threads(1)
    directory = make_tiny_base(tmp_path_factory.mktemp("base"))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    batch = collate([*FORGET, *RETAIN])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        mean_nll(model(input_ids=batch.ids_BT1).logits, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert nll(model, FORGET) < 0.1
    assert nll(model, RETAIN) < 0.1
    return model


def nll(model: Any, examples: list[Tokens]) -> float:
    batch = collate(examples)
    with torch.no_grad():
        return float(mean_nll(model(input_ids=batch.ids_BT1).logits, batch))


def target(learnt: Any, method: Method | None = None) -> Any:
    """Return the model under a fresh patch, of the form that the method's edits need."""
    model = copy.deepcopy(learnt)
    edits = method.adapter_values(model, len(FORGET)) if method else {}
    return attach(model.requires_grad_(False), lora_config(LORA | edits, model), None, init_seed=7)


def saved_at(directory: Path, identity: str = "data-1") -> SavedRun:
    """Return a saved run whose files are not sealed."""
    return SavedRun(directory, identity, lambda _, data: data, lambda _, data: data)


def settings(**changes: Any) -> Pace:
    values = {
        **{"learning_rate": RATE, "num_epochs": STEPS, "num_rounds": 1, "max_steps": None},
        **{"batch_size": 2, "retain_batch_size": None, "gradient_accumulation_steps": 2},
    }
    return Pace(**{**values, **changes})


def keeps_retained(model: Any) -> float:
    """Return a utility: roughly the mean probability of the retained answers' tokens."""
    return 1.0 - nll(model, RETAIN)


def without_search(name: str, alpha: float = 0.5) -> Method:
    return make_method(name, {"alpha": alpha} if name == "task_arithmetic" else {})


def run(learnt: Any, name: str, bounds: Bounds | None = None, **changes: Any) -> tuple[Any, End]:
    model = target(learnt)
    end = unlearn(model, SETS, without_search(name), settings(**changes), bounds or Bounds())
    return model, end


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(each.view(torch.int32), other[name].view(torch.int32)) for name, each in one.items()
    )


def test_every_method_forgets_and_those_with_a_retain_term_keep_more(learnt: Any) -> None:
    """Long enough that ascent ruins what it does not look at."""
    long = settings(num_epochs=24)
    found = {}
    for name in METHODS:
        method = choose_layer(without_search(name, alpha=32.0), learnt, SETS)
        model = target(learnt, method)
        found[name] = model, unlearn(model, SETS, method, long, Bounds())
    ascent = nll(found["gradient_ascent"][0], RETAIN)
    for name, (model, end) in found.items():
        assert end.ending == Ending.FINISHED, name
        assert nll(model, FORGET) > 0.5 + nll(learnt, FORGET), name
        assert end.compute.seconds > 0
        assert end.compute.tokens_trained > 0
        if "retain" in make_method(name).reads:
            assert nll(model, RETAIN) < 0.5 * ascent, name


@pytest.mark.parametrize("name", ["npo", "idk_dpo", "task_arithmetic"])
def test_a_patch_never_touches_the_base(learnt: Any, name: str) -> None:
    model, _ = run(learnt, name)
    before, after = (
        {n: x for n, x in weights(each).items() if "lora_" not in n} for each in (target(learnt), model)
    )
    assert same(before, after)
    with model.disable_adapter():
        assert nll(model, FORGET) == nll(learnt, FORGET)


def test_the_reference_is_the_model_before_and_not_the_present_one(learnt: Any) -> None:
    """At the start the KL is exactly 0; a reference that followed along would keep it there."""
    logs: list[StepLog] = []
    model = target(learnt)
    unlearn(model, SETS, make_method("kl_minimisation"), settings(), Bounds(), progress=logs.append)
    assert logs[0].retain == 0.0
    assert max(log.retain or 0.0 for log in logs[1:]) > 1e-4
    assert [log.step for log in logs] == list(range(1, logs[0].num_steps + 1))


def test_dropout_is_off_and_dpo_starts_at_log_2(learnt: Any) -> None:
    """The patch has dropout, and the model comes in training mode: each loss is as in evaluation."""
    losses = []
    for training in (True, False):
        logs: list[StepLog] = []
        model = target(learnt).train(training)
        few = settings(max_steps=4)
        unlearn(model, SETS, make_method("dpo"), few, Bounds(), progress=logs.append)
        losses.append([log.loss for log in logs])
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(0.6931472, abs=1e-6)


def test_accumulated_batches_are_one_batch(learnt: Any) -> None:
    """NPO is a mean over examples: rows 3 and 2 + 1 give one gradient, up to the order of sums."""
    norms = []
    for size, accumulation in ((3, 1), (2, 2)):
        logs: list[StepLog] = []
        changes = {"batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        method = make_method("npo", {"retain_weight": 0.0})
        unlearn(target(learnt), SETS, method, settings(**changes), Bounds(), progress=logs.append)
        norms.append(logs[0].gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def states(model: Any, examples: list[Tokens], layer: int) -> torch.Tensor:
    """Return what a layer leaves where an answer token is predicted, [N, D]."""
    batch = collate(examples)
    with torch.no_grad():
        found = model(input_ids=batch.ids_BT1, output_hidden_states=True, use_cache=False)
    hidden: torch.Tensor = found.hidden_states[layer + 1][:, :-1][batch.mask_BT]
    return hidden


def test_rmu_moves_forget_states_to_the_control_vector_and_leaves_the_others(learnt: Any) -> None:
    """The control vector is one direction: all forget states turn to it, no retained one does."""
    method = Rmu(layer=0)
    model = target(learnt)
    unlearn(model, SETS, method, settings(num_epochs=40), Bounds())
    before, after = states(learnt, FORGET, 0), states(model, FORGET, 0)
    controls = method.controls_ND(before)
    assert (after - controls).norm() < 0.75 * (before - controls).norm()
    turned = torch.nn.functional.cosine_similarity(after, controls)
    assert float(turned.min()) > 0.8 > 0.5 > float(torch.cosine_similarity(before, controls).max())
    kept = states(learnt, RETAIN, 0)
    moved = (states(model, RETAIN, 0) - kept).norm(dim=1) / kept.norm(dim=1)
    assert float(moved.max()) < 0.15 < 1 < float((after - before).norm(dim=1).min())
    upper = {name: each for name, each in model.named_parameters() if ".layers.1." in name}
    assert not any(bool(each.any()) for name, each in upper.items() if "lora_B" in name)


def test_the_layer_of_rmu_is_measured_and_must_be_there(learnt: Any) -> None:
    measured = choose_layer(make_method("rmu"), learnt, SETS)
    effects = trace_layers(learnt, FORGET, RETAIN)
    assert effects[measured.layer or 0] == max(effects)
    assert choose_layer(make_method("npo"), learnt, SETS) == make_method("npo")
    with pytest.raises(InvalidInput, match="no such layer"):
        unlearn(target(learnt), SETS, make_method("rmu", {"layer": 2}), settings(), Bounds())
    base = copy.deepcopy(learnt).requires_grad_(False)
    above = attach(base, lora_config(LORA | {"lora_layers": "top:1"}, base), None, init_seed=7)
    with pytest.raises(InvalidInput, match="nothing that is trained reaches the loss"):
        unlearn(above, SETS, make_method("rmu", {"layer": 0}), settings(), Bounds())


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_an_edit_writes_the_values_it_found_and_leaves_other_texts(learnt: Any, name: str) -> None:
    method = make_method(name, {"layer": 1})
    model = target(learnt, method)
    logs: list[StepLog] = []
    end = unlearn(model, SETS, method, settings(), Bounds(check_every=1), progress=logs.append)
    assert (end.ending, end.step, end.num_steps) == (Ending.FINISHED, 3, 3)
    assert logs[-1].step == 3
    assert end.compute.tokens_trained == 25 * 3 * len(PREFERRED[0].input_ids)
    assert nll(model, PREFERRED) < nll(learnt, PREFERRED) - 2
    assert nll(model, RETAIN) == pytest.approx(nll(learnt, RETAIN), abs=1e-3)
    with model.disable_adapter():
        assert nll(model, FORGET) == nll(learnt, FORGET)


def test_the_value_of_an_edited_key_is_the_one_that_was_found(learnt: Any) -> None:
    """With one fact: W' k* - W k* is what moves the state, and the refusal gets likelier."""
    method, only = make_method("rome", {"layer": 0}), Sets(FORGET[:1], RETAIN, PREFERRED[:1], [1])
    model = target(learnt, method)
    unlearn(model, only, method, settings(), Bounds())
    before, after = (states(each, PREFERRED[:1], 0)[0] for each in (learnt, model))
    matrix = model.base_model.model.model.layers[0].mlp.down_proj
    change = (
        matrix.lora_B["default"].weight @ matrix.lora_A["default"].weight * matrix.scaling["default"]
    )
    keys: list[torch.Tensor] = []
    handle = matrix.register_forward_hook(lambda _, args, __: keys.append(args[0][0, 1]))
    nll(model, PREFERRED[:1])
    handle.remove()
    torch.testing.assert_close(change @ keys[0], after - before, rtol=1e-4, atol=1e-4)
    assert float(torch.linalg.matrix_rank(change)) == 1
    assert nll(model, PREFERRED[:1]) < nll(learnt, PREFERRED[:1]) - 2


def test_edits_outside_the_bound_or_of_no_number_are_undone(
    learnt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    falls = [0.9, 0.89, 0.5]
    bounds = Bounds(utility=lambda _: falls.pop(0), max_utility_drop=0.1, check_every=1)
    method = make_method("rome", {"layer": 1})
    model = target(learnt, method)
    end = unlearn(model, SETS, method, settings(), bounds)
    assert (end.ending, end.step, end.utility) == (Ending.BELOW_UTILITY_BOUND, 1, 0.89)
    assert "1 were kept" in end.why
    rank = [int(torch.linalg.matrix_rank(each)) for n, each in weights(model).items() if "lora_B" in n]
    assert rank == [1]
    wild = make_method("memit", {"layer": 1})
    monkeypatch.setattr(
        "approx.methods.editing.edit_run.second_moment", lambda keys: keys.T @ keys * math.nan
    )
    model = target(learnt, wild)
    before = weights(model)
    end = unlearn(model, SETS, wild, settings(), Bounds())
    assert (end.ending, end.step) == (Ending.DIVERGED, 0)
    assert same(weights(model), before)


def test_a_patch_that_cannot_hold_the_edits_is_refused(learnt: Any) -> None:
    method = make_method("rome", {"layer": 1})
    model = target(learnt, method)
    unlearn(model, SETS, method, settings(), Bounds())
    with pytest.raises(InvalidInput, match="fresh"):
        unlearn(model, SETS, method, settings(), Bounds())
    lora = LORA | {"lora_target_modules": ["q_proj"]}
    other = copy.deepcopy(learnt)
    model = attach(other.requires_grad_(False), lora_config(lora, other), None, init_seed=7)
    with pytest.raises(InvalidInput, match="can't hold these edits"):
        unlearn(model, SETS, method, settings(), Bounds())


@pytest.mark.parametrize("name", ["npo", "kl_minimisation", "pdu", "task_arithmetic"])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bits(
    learnt: Any, name: str, tmp_path: Path
) -> None:
    whole, expected = run(learnt, name, Bounds(check_every=3))
    saved = saved_at(tmp_path / "run")
    method = without_search(name)

    def stop(log: StepLog) -> None:
        if log.step == 8:
            raise Crash

    with pytest.raises(Crash):
        unlearn(
            *(target(learnt), SETS, method, settings(), Bounds(check_every=3)),
            saved=saved,
            progress=stop,
        )
    steps: list[int] = []
    model = target(learnt)
    end = unlearn(
        *(model, SETS, method, settings(), Bounds(check_every=3)),
        saved=saved,
        progress=lambda log: steps.append(log.step),
    )
    assert steps[0] == 7  # the last saved step was the 6th
    assert same(weights(model), weights(whole))
    assert (end.step, end.compute.flops) == (expected.step, expected.compute.flops)


def test_the_weight_of_pdu_follows_the_retain_loss(learnt: Any, tmp_path: Path) -> None:
    """An epoch is one step here: the weight is constant for two, and the run saves it."""
    logs: list[StepLog] = []
    values = {"retain_loss_eps": 0.05, "dual_step_size": 2.0, "dual_warmup_epochs": 3}
    method, saved = make_method("pdu", values), saved_at(tmp_path / "run")
    run_by = (settings(), Bounds(check_every=1))
    unlearn(target(learnt), SETS, method, *run_by, saved=saved, progress=logs.append)
    weight = 100.0
    for log in logs[2:]:
        assert log.retain is not None
        weight = max(0.0, weight + 2.0 * (log.retain - 0.05))
    assert weight != 100.0
    counts = json.loads((tmp_path / "run" / "run.json").read_text())["counts"]
    assert counts["retain_weight"] == pytest.approx(weight, rel=1e-6)


def test_another_run_does_not_go_on_from_this_one(learnt: Any, tmp_path: Path) -> None:
    saved = saved_at(tmp_path / "run")
    clock = iter(range(1000))
    arguments = (SETS, make_method("npo"), settings())
    end = unlearn(
        target(learnt),
        *arguments,
        Bounds(max_seconds=6, check_every=1),
        saved=saved,
        clock=lambda: next(clock),
    )
    assert end.ending == Ending.OUT_OF_TIME
    (tmp_path / "run" / "notes.txt").write_text("not ours")
    others: list[tuple[SavedRun, Any, Method]] = [
        (saved_at(tmp_path / "run", "data-2"), target(learnt), make_method("npo")),
        (saved, target(learnt), make_method("npo", {"beta": 0.2})),
    ]
    for place, model, method in others:
        before = weights(model)
        with pytest.raises(ConfigConflict):
            unlearn(model, SETS, method, settings(), Bounds(), saved=place)
        assert same(weights(model), before)
    (tensors,) = (tmp_path / "run").glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        unlearn(target(learnt), *arguments, Bounds(), saved=saved)
    assert len(list((tmp_path / "run").iterdir())) == 3, "files of others are left alone"


@dataclasses.dataclass(frozen=True)
class Poisoned(GradientAscent):
    """Ascent whose loss or gradient becomes NaN from some call on."""

    calls: list[int] = dataclasses.field(default_factory=list, compare=False)
    last_good: int = 5
    in_gradient: bool = False

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        found = super().loss(rows)
        self.calls.append(1)
        if len(self.calls) <= self.last_good:
            return found
        total = found.total
        if self.in_gradient:  # finite itself, with an infinite slope
            total = total + (found.total - found.total.detach()).clamp_min(0).sqrt()
            return dataclasses.replace(found, total=total)
        return dataclasses.replace(found, total=total * float("nan"))


@pytest.mark.parametrize("in_gradient", [False, True])
def test_a_loss_that_is_no_number_keeps_the_last_good_weights(learnt: Any, in_gradient: bool) -> None:
    """Two calls each step and one for the check after every second: 2 + 2 + 1 make the first good."""
    model = target(learnt)
    method = Poisoned(in_gradient=in_gradient)
    end = unlearn(model, SETS, method, settings(), Bounds(check_every=2))
    expected, _ = run(learnt, "gradient_ascent")
    assert end.ending == Ending.DIVERGED
    assert end.step == 2
    assert end.why.startswith("the gradient was not" if in_gradient else "the loss was not")
    assert "step 2 were kept" in end.why
    assert all(bool(torch.isfinite(each).all()) for each in weights(model).values())
    assert nll(learnt, FORGET) < nll(model, FORGET) < nll(expected, FORGET)


def test_weights_whose_next_loss_is_no_number_are_not_called_good(learnt: Any) -> None:
    """The check after step 2 fails although both steps' losses were fine: back to the start."""
    model = target(learnt)
    before = weights(model)
    end = unlearn(model, SETS, Poisoned(last_good=4), settings(), Bounds(check_every=2))
    assert (end.ending, end.step) == (Ending.DIVERGED, 0)
    assert same(weights(model), before)


def test_a_method_that_overshoots_its_utility_bound_is_stopped(learnt: Any) -> None:
    bounds = Bounds(utility=keeps_retained, max_utility_drop=0.3, check_every=1)
    model, end = run(learnt, "gradient_ascent", bounds, learning_rate=10 * RATE)
    assert end.ending == Ending.BELOW_UTILITY_BOUND
    assert end.utility_before is not None
    assert end.utility is not None
    assert end.step < end.num_steps
    assert end.utility == keeps_retained(model) >= end.utility_before - 0.3
    assert f"step {end.step} were kept" in end.why


def test_a_dip_of_utility_does_not_end_the_run(learnt: Any) -> None:
    """It is back within the bound at the end: the last weights are kept, as without a bound."""
    dips = [0.987, 0.634, 0.7, 0.81, *[0.975] * STEPS]
    bounds = Bounds(utility=lambda _: dips.pop(0), max_utility_drop=0.1, check_every=1)
    model, end = run(learnt, "npo", bounds)
    free, _ = run(learnt, "npo")
    assert (end.ending, end.step, end.utility) == (Ending.FINISHED, end.num_steps, 0.975)
    assert same(weights(model), weights(free))


def knows(model: Any, thorough: bool) -> Knowledge:
    """Count a forget example as known while its tokens' mean probability is above a half."""
    del thorough
    losses = [nll(model, [each]) for each in FORGET]
    probability = sum(math.exp(-each) for each in losses) / len(losses)
    return Knowledge(sum(math.exp(-each) > 0.5 for each in losses), len(losses), probability)


@pytest.mark.parametrize("name", ["npo", "graddiff", "task_arithmetic"])
def test_strength_is_searched_until_nothing_is_known(learnt: Any, name: str) -> None:
    """At this rate one round changes next to nothing."""
    weak = {"learning_rate": 1e-2 if name == "task_arithmetic" else 1e-5, "num_epochs": 4}
    method, drop = make_method(name), 9.0 if name == "task_arithmetic" else 0.8
    bounds = Bounds(
        utility=keeps_retained,
        max_utility_drop=drop,
        check_every=2,
        knowledge=knows,
        target_probability=0.1,
    )
    model = target(learnt)
    one = unlearn(model, SETS, method, settings(**weak), bounds)
    model = target(learnt)
    end = unlearn(model, SETS, method, settings(**weak, num_rounds=12), bounds)
    assert end.knowledge_before is not None
    assert end.knowledge_before.num_known == len(FORGET)
    assert end.knowledge == knows(model, True)
    assert end.knowledge.num_known == 0
    assert end.knowledge.probability <= end.knowledge_before.probability / 2
    assert end.ending == Ending.FINISHED
    assert "nothing is known" in end.why
    assert keeps_retained(model) >= keeps_retained(learnt) - drop
    if name != "task_arithmetic":
        assert one.knowledge is not None
        assert one.knowledge.num_known > 0
        assert end.learning_rate is not None
        assert end.learning_rate > weak["learning_rate"]
        assert end.step < end.num_steps


def test_a_bound_that_holds_a_run_back_is_told_and_the_best_within_it_is_kept(learnt: Any) -> None:
    bounds = Bounds(utility=keeps_retained, max_utility_drop=1e-3, check_every=1, knowledge=knows)
    model = target(learnt)
    end = unlearn(
        *(model, SETS, make_method("gradient_ascent")),
        settings(num_rounds=3, num_epochs=3, learning_rate=1e-3),
        bounds,
    )
    assert end.ending == Ending.BELOW_UTILITY_BOUND
    assert "the bound on utility stopped it" in end.why
    assert end.knowledge == knows(model, True)
    assert keeps_retained(model) >= keeps_retained(learnt) - 1e-3


def test_rounds_that_find_nothing_better_end_a_run(learnt: Any) -> None:
    def forgets_nothing(model: Any, thorough: bool) -> Knowledge:
        del model, thorough
        return Knowledge(1, 1, 0.9)

    bounds = Bounds(knowledge=forgets_nothing, patience=2, check_every=1)
    steps: list[int] = []
    end = unlearn(
        *(target(learnt), SETS, make_method("npo"), settings(num_rounds=9, num_epochs=3), bounds),
        progress=lambda log: steps.append(log.step),
    )
    assert (end.ending, end.why, end.step) == (Ending.FINISHED, "2 rounds found nothing better", 0)
    assert len(steps) == 2 * end.num_steps // 9


def test_a_search_that_was_cut_short_goes_on_to_the_same_bits(learnt: Any, tmp_path: Path) -> None:
    """Rounds that are taken back among them."""
    bounds = Bounds(utility=keeps_retained, max_utility_drop=0.02, check_every=2, knowledge=knows)
    plan = settings(num_rounds=5, num_epochs=3, learning_rate=RATE)
    whole, model = target(learnt), target(learnt)
    expected = unlearn(whole, SETS, make_method("npo"), plan, bounds)
    saved = saved_at(tmp_path / "run")
    late = dataclasses.replace(bounds, max_seconds=1e-9)
    ends: list[End] = []
    while not ends or ends[-1].ending == Ending.OUT_OF_TIME:
        model = target(learnt)
        ends.append(unlearn(model, SETS, make_method("npo"), plan, late, saved=saved))
    assert len(ends) > 5
    assert same(weights(model), weights(whole))
    assert (ends[-1].step, ends[-1].why) == (expected.step, expected.why)


@pytest.mark.parametrize("name", ["npo", "dpo", "idk_dpo"])
def test_the_reference_is_asked_for_whole_answers_once(
    learnt: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = Target._reference

    def counted(self: Target, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return real(self, ids, columns)

    monkeypatch.setattr(Target, "_reference", counted)
    run(learnt, name)
    assert sum(asked) == len(FORGET) * len(make_method(name).compares_answers)


def test_utility_that_is_no_number(learnt: Any) -> None:
    values = iter([1.0])
    bounds = Bounds(utility=lambda _: next(values, float("nan")), check_every=1)
    model = target(learnt)
    before = weights(model)
    end = unlearn(model, SETS, make_method("npo"), settings(), bounds)
    assert (end.ending, end.step) == (Ending.BELOW_UTILITY_BOUND, 0)
    assert same(weights(model), before)
    broken = Bounds(utility=lambda _: float("nan"))
    with pytest.raises(InvalidInput, match="utility"):
        unlearn(model, SETS, make_method("npo"), settings(), broken)


def test_task_arithmetic_searches_its_scale_under_the_bound(learnt: Any) -> None:
    base = target(learnt)
    tried: list[float] = []

    def utility(model: Any) -> float:
        tried.append(keeps_retained(model))
        return tried[-1]

    method = make_method("task_arithmetic", {"alphas": (0.5, 2.0, 8.0, 32.0, 128.0)})
    bounds = Bounds(utility=utility, max_utility_drop=0.5)
    end = unlearn(base, SETS, method, settings(), bounds)
    assert end.ending == Ending.FINISHED
    assert end.alpha in (0.5, 2.0, 8.0, 32.0)
    assert end.utility == keeps_retained(base) >= tried[0] - 0.5
    assert tried[-1] < tried[0] - 0.5  # the first that broke the bound is not what is kept
    assert nll(base, FORGET) > nll(learnt, FORGET)


def test_task_arithmetic_with_no_scale_left_is_the_base_bit_for_bit(learnt: Any) -> None:
    never = iter([1.0, 0.0])
    model = target(learnt)
    before = weights(model)
    bounds = Bounds(utility=lambda _: next(never), max_utility_drop=0.1)
    end = unlearn(model, SETS, make_method("task_arithmetic"), settings(), bounds)
    assert (end.ending, end.alpha, end.utility) == (Ending.BELOW_UTILITY_BOUND, 0.0, 1.0)
    assert same(weights(model), before)
    zero = unlearn(model, SETS, make_method("task_arithmetic", {"alpha": 0.0}), settings(), Bounds())
    assert zero.ending == Ending.FINISHED
    assert same(weights(model), before)


@pytest.mark.parametrize("late", [3, 1 + STEPS + 4])
def test_task_arithmetic_that_is_out_of_time_goes_on(learnt: Any, tmp_path: Path, late: int) -> None:
    """Late while tuning: the weights from before. Late while searching: the last scale that held."""
    saved = saved_at(tmp_path / "run")
    method = make_method("task_arithmetic", {"alphas": (0.25, 0.5)})
    whole = target(learnt)
    unlearn(*(whole, SETS, method, settings()), Bounds(utility=keeps_retained, max_utility_drop=9.0))
    model = target(learnt)
    before = weights(model)
    seconds = iter(range(1000))
    bounds = Bounds(max_seconds=late, utility=keeps_retained, max_utility_drop=9.0)
    end = unlearn(model, SETS, method, settings(), bounds, saved=saved, clock=lambda: next(seconds))
    assert end.ending == Ending.OUT_OF_TIME
    assert end.alpha in (0.0, 0.25)
    if late == 3:
        assert same(weights(model), before)
    again = target(learnt)
    bounds = Bounds(utility=keeps_retained, max_utility_drop=9.0)
    end = unlearn(again, SETS, method, settings(), bounds, saved=saved)
    assert (end.ending, end.alpha) == (Ending.FINISHED, 0.5)
    assert same(weights(again), weights(whole))


def test_models_in_which_nothing_can_train_are_refused(learnt: Any) -> None:
    frozen = copy.deepcopy(learnt).requires_grad_(False)
    with pytest.raises(InvalidInput, match="nothing can be unlearned"):
        unlearn(frozen, SETS, make_method("npo"), settings(), Bounds())
    with pytest.raises(InvalidInput) as caught:
        unlearn(target(learnt).bfloat16(), SETS, make_method("npo"), settings(), Bounds())
    assert "bfloat16" in caught.value.problems[0].what
    with pytest.raises(InvalidInput) as caught:
        unlearn(copy.deepcopy(learnt), SETS, make_method("npo"), settings(), Bounds())
    assert "not part of a LoRA patch" in caught.value.problems[0].what
    patched = target(learnt)
    patched.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(InvalidInput) as caught:
        unlearn(patched, SETS, make_method("npo"), settings(), Bounds())
    assert [each.what for each in caught.value.problems] == [
        "would be trained and is not part of a LoRA patch"
    ]


def test_a_patch_over_a_base_in_half_precision(learnt: Any) -> None:
    """The base may be in bfloat16; the patch trains in float32, and losses are in float32."""
    model = copy.deepcopy(learnt).bfloat16().requires_grad_(False)
    patched = attach(model, lora_config(LORA, model), None, init_seed=7)
    for name, each in patched.named_parameters():
        if "lora_" in name:
            each.data = each.data.float()
    before = nll(patched, FORGET)
    end = unlearn(patched, SETS, make_method("npo"), settings(), Bounds())
    assert end.ending == Ending.FINISHED
    assert nll(patched, FORGET) > before + 0.5


def test_the_report(learnt: Any) -> None:
    model, end = run(learnt, "npo")
    report = ApproxReport(
        parse_settings(settings_of("npo", {}, Adapter())),
        Selected("all-linear", everything=True),
        *(end, {"num_forget": len(FORGET)}, 0, True),
        before={"forget_nll": nll(learnt, FORGET)},
        after={"forget_nll": nll(model, FORGET), "undefined": float("nan")},
    )
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["approximate"] is True
    assert found["metrics_after"]["undefined"] is None
    assert found["limits"] == [*REPORT_LIMITS, *MEASURE_LIMITS]
    assert "outcome" not in found, "what the model knows was not measured"
    assert 0 < end.compute.tokens_forward < end.compute.tokens_trained
