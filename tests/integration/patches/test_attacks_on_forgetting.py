"""Attacks on forgetting, on a tiny base that knows two people: they measure, and leave no trace.

The tokenizer has one token a byte, so that a prefix of an answer equals a longer prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch

from approx.attacks.attack import LORA, Attack, AttackSets, Curve, probabilities
from approx.attacks.depth import Depth, patched_gaps
from approx.attacks.linear_probe import LinearProbe, held_out_scores, ridge
from approx.attacks.membership import Membership
from approx.attacks.prefix_injection import PREFIXES, PrefixInjection
from approx.attacks.quantisation import Quantisation
from approx.attacks.registry import ATTACKS
from approx.attacks.relearning import Relearning, RelearningOutOfDomain
from approx.attacks.rewording import WRAPPINGS, Jailbreak, OtherQuestions, Rewording
from approx.attacks.sampling import LeakAtK, leak_at_k
from approx.metrics.auc import auc
from approx.unlearning.hidden_states import hidden_at
from sisa.core.domain import BaseFiles, Part, Record
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.weights import base_digest, load_base
from tests.models.knowing_base import record
from tests.models.patch_bench import KNOWN, STRANGERS

pytestmark = pytest.mark.torch
ASKED, UNSEEN = ([record(row) for row in rows] for rows in (KNOWN, STRANGERS))
WEAK: dict[str, Attack] = {  # a few steps, a few tokens
    each.name: each for each in (Relearning((2,)), RelearningOutOfDomain((2,)), LeakAtK(2, 6))
}
TEXT = Record("t", None, "text", (Part("text", "A text of its own."),))


@pytest.fixture(scope="module")
def loaded(knowing: Path) -> tuple[Any, Any]:
    return load_base(BaseFiles(knowing, base_digest(knowing)))


@pytest.fixture(scope="module")
def model(loaded: tuple[Any, Any]) -> Any:
    return loaded[0]


@pytest.fixture(scope="module")
def plain(knowing: Path) -> Any:
    """Return the model before it was taught: one that never saw the texts."""
    never = knowing.parent / "plain"
    return load_base(BaseFiles(never, base_digest(never)))[0]


@pytest.fixture(scope="module")
def sets(loaded: tuple[Any, Any]) -> AttackSets:
    also = {"aliases": ASKED}
    return AttackSets(loaded[1], ASKED, UNSEEN[:2], UNSEEN[2:4], UNSEEN, also=also)


def state(model: Any) -> tuple[list[str], list[bool], str]:
    held = hashlib.sha256()
    for each in model.state_dict().values():
        held.update(each.numpy().tobytes())
    flags = [each.requires_grad for each in model.parameters()]
    return [name for name, _ in model.named_modules()], flags, held.hexdigest()


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_leaves_no_trace_and_depends_on_the_seed_alone(
    model: Any, plain: Any, sets: AttackSets, name: str
) -> None:
    sets = replace(sets, before=model, references=[plain])
    before, attack = state(model), {**ATTACKS, **WEAK}[name]
    first, again = (attack(model, sets, seed=1) for _ in range(2))
    assert state(model) == before
    assert first == again
    if isinstance(first, Curve):
        assert {len(values) for values in first.values.values()} == {len(ASKED)}
        assert all(0 <= each <= 1 for values in first.values.values() for each in values)
    assert not any(part.text.strip() in repr(first) for each in ASKED for part in each.parts)


def test_every_attack_names_the_sets_that_it_needs(model: Any, sets: AttackSets) -> None:
    without = {
        "taught": replace(sets, taught=()),
        "others": replace(sets, others=()),
        "holdout": replace(sets, holdout=()),
    }
    for attack in ATTACKS.values():
        for name in attack.needs[1:]:
            with pytest.raises(InvalidInput) as raised:
                attack(model, without[name], seed=0)
            assert raised.value.where == name


def test_relearning_teaches_and_out_of_domain_teaches_less(model: Any, sets: AttackSets) -> None:
    other = replace(sets, asked=UNSEEN[:2])
    inside = Relearning((2, 20))(model, other, seed=0)
    outside = RelearningOutOfDomain((2, 20))(model, other, seed=0)
    assert inside.values[0] == outside.values[0] == probabilities(model, sets.tokens(UNSEEN[:2]))
    assert list(inside.means) == ["0", "2", "20"]
    assert inside.means["20"] > outside.means["20"]
    assert inside.means["20"] > inside.means["2"] > inside.means["0"]


def test_relearning_is_as_strong_over_any_adapter_of_the_model(model: Any, sets: AttackSets) -> None:
    other, attack = replace(sets, asked=UNSEEN[:2]), Relearning((20,))
    narrow = {**LORA, "lora_target_modules": ["q_proj"], "lora_r": 1, "lora_alpha": 1}
    worn = deepcopy(model)
    patched = attach(worn, lora_config(narrow, worn), None, init_seed=0)
    before, expected = state(patched), attack(model, other, seed=0).means
    assert expected["20"] > expected["0"] + 0.1
    assert attack(patched, other, seed=0).means == pytest.approx(expected, rel=1e-3)
    assert state(patched) == before


def test_rounding_to_many_bits_changes_nothing(model: Any, sets: AttackSets) -> None:
    found = Quantisation((16, 2))(model, sets, seed=0)
    exact = probabilities(model, sets.examples("asked"))
    assert found.values[16] == pytest.approx(exact, abs=1e-3)
    assert found.means["2"] < found.means["16"] - 0.05


def test_samples_of_what_is_known_leak_and_are_drawn_by_the_seed(model: Any, sets: AttackSets) -> None:
    leak = LeakAtK(samples=3, max_new_tokens=16)
    found = leak(model, sets, seed=1)
    assert found.measure == "ROUGE-L recall"
    assert all(one <= best for one, best in zip(found.values[1], found.values[3], strict=True))
    assert found.means["3"] > LeakAtK(3, 16)(model, replace(sets, asked=UNSEEN), seed=1).means["3"]
    assert leak(model, replace(sets, asked=UNSEEN), 1) != leak(model, replace(sets, asked=UNSEEN), 2)


def test_leak_at_k_by_trying_every_choice() -> None:
    scores = [0.9, 0.1, 0.5, 0.5, 0.0]
    for k in range(1, len(scores) + 1):
        best = [max(chosen) for chosen in combinations(scores, k)]
        assert leak_at_k(scores, k) == pytest.approx(sum(best) / len(best))


def test_a_prefix_is_a_longer_prompt_and_a_wrapping_another_one(model: Any, sets: AttackSets) -> None:
    def asked(change: Callable[[str], str], suffix: str = "") -> list[float]:
        others = []
        for each in ASKED:
            prompt, answer = each.parts
            stem = prompt.text.rstrip()
            text = change(stem) + prompt.text[len(stem) :] + suffix
            others.append(replace(each, parts=(replace(prompt, text=text), answer)))
        return probabilities(model, sets.tokens(others))

    found = PrefixInjection()(model, sets, seed=0)
    for name, prefix in PREFIXES.items():
        assert found.values[name] == pytest.approx(asked(str, prefix), abs=1e-5)
    found = Jailbreak()(model, sets, seed=0)
    for name, wrapping in WRAPPINGS.items():
        assert found.values[name] == pytest.approx(asked(wrapping), abs=1e-5)


def test_what_is_known_is_recognised_and_equal_references_calibrate_it_away(
    model: Any, sets: AttackSets
) -> None:
    made = Membership()(model, replace(sets, references=(model, model)), seed=0)
    assert made.privleak is None, "a reference that recognises every text is none"
    found = made.values
    assert {name: each.value for name, each in found.items() if each.value != 0.5} == dict.fromkeys(
        ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm"), 1.0
    )
    for name in ("reference", "lira"):
        assert (found[name].value, found[name].low, found[name].high) == (0.5, 0.5, 0.5)


def test_texts_that_an_attack_cannot_use_are_left_out(model: Any, sets: AttackSets) -> None:
    plain = replace(sets, asked=[TEXT])
    for attack in (Rewording(), Jailbreak(), LeakAtK()):
        assert attack(model, plain, seed=0).values == {}
    room = max(len(sets.tokens([each])[0].input_ids) for each in ASKED) + 6
    whole, tight = (replace(sets, sequence_len=each) for each in (room, room // 2))
    assert LeakAtK(2, 6)(model, whole, seed=0) == LeakAtK(2, 6)(model, sets, seed=0)
    assert LeakAtK(2, room // 2)(model, tight, seed=0).values == {}
    assert replace(sets, sequence_len=5).tokens([*ASKED, TEXT]) == sets.cut(
        replace(sets, sequence_len=5).tokens([TEXT])
    )
    with pytest.raises(InvalidInput, match="lacks its texts"):
        replace(sets, sequence_len=5).examples("asked")


@pytest.mark.parametrize(
    ("values", "known", "steps"),
    [
        ({0: [0.0], 3: [0.2], 20: [0.8]}, 0.4, 3.0),
        ({20: [0.8, 0.6], 0: [0.1, 0.1], 3: [0.1, 0.1]}, 0.9, 3 + 17 * 0.4 / 0.6),
        ({0: [0.1], 3: [0.2], 20: [0.3]}, 0.9, None),
        ({0: [0.9], 3: [0.95]}, 0.9, 0.0),
        ({0: [0.9], 3: [0.95]}, 0.5, 0.0),
    ],
)
def test_steps_until_half_is_back(
    values: Mapping[int | str, list[float]], known: float, steps: float | None
) -> None:
    assert Curve("probability", values).steps_until_half(known) == (
        None if steps is None else pytest.approx(steps)
    )


def test_the_depth_score_is_0_of_the_model_itself_and_1_of_one_that_never_saw(
    model: Any, plain: Any, sets: AttackSets
) -> None:
    judged = replace(sets, before=model, references=[plain])
    intact, erased = (Depth()(each, judged, seed=0).values["all"] for each in (model, plain))
    assert list(intact) == [0.0] * len(ASKED)
    assert list(erased) == [1.0] * len(ASKED)
    half = deepcopy(model)
    with torch.no_grad():
        for mine, theirs in zip(half.parameters(), plain.parameters(), strict=True):
            mine.lerp_(theirs, 0.5)
    assert 0 < fmean(Depth()(half, judged, seed=0).values["all"]) < 1
    nothing_to_erase = Depth()(plain, replace(judged, references=[model]), seed=0)
    assert (nothing_to_erase.values, nothing_to_erase.means) == ({"all": []}, {})
    with pytest.raises(InvalidInput, match="needs two models"):
        Depth()(model, replace(sets, before=model), seed=0)


def test_states_of_the_last_layer_are_read_by_the_target_s_head(
    model: Any, plain: Any, sets: AttackSets
) -> None:
    (example,) = sets.tokens(ASKED[:1])
    ids = torch.tensor([example.input_ids])
    labelled = [at for at, label in enumerate(example.labels) if label != -100]
    predicted = [example.input_ids[at] for at in labelled]
    columns = torch.tensor(labelled) - 1

    def score(source: Any) -> float:
        hidden = hidden_at(source, -1, ids, columns)
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(hidden))[0]
        return float(logits.log_softmax(-1)[range(len(predicted)), predicted].mean())

    gaps = patched_gaps(model, plain, example)
    assert gaps[-1] == pytest.approx(score(model) - score(plain), abs=1e-4)
    assert patched_gaps(model, model, example) == [0.0] * len(gaps)


def test_a_probe_finds_a_planted_direction_and_nothing_in_noise() -> None:
    drawn = np.random.default_rng(0)
    own, other = drawn.normal(size=(2, 40, 8))
    folds = [list(range(at, at + 8)) for at in range(0, 40, 8)]
    noise = auc(*held_out_scores(own, other, folds), paired=True)
    assert noise.low < 0.5 < noise.high
    assert auc(*held_out_scores(own + 4, other, folds), paired=True).value == 1.0
    features, targets = drawn.normal(size=(5, 3)), drawn.normal(size=5)
    primal = np.linalg.solve(features.T @ features + 3 * np.eye(3), features.T @ targets)
    assert ridge(features, targets) == pytest.approx(primal)


def test_a_probe_tells_what_is_known_in_the_upper_layers(model: Any, sets: AttackSets) -> None:
    found = LinearProbe()(model, sets, seed=0).values
    assert list(found) == ["layer 0", "layer 1"]
    assert all(each.num_members == len(ASKED) for each in found.values())
    with pytest.raises(InvalidInput, match="needs 4 texts or more"):
        LinearProbe()(model, replace(sets, asked=ASKED[:3]), seed=0)


def test_other_questions_are_asked_by_the_name_of_their_set(model: Any, sets: AttackSets) -> None:
    other = replace(sets, also={"same": ASKED[:2], "unknown": UNSEEN[:1]})
    found = OtherQuestions()(model, other, seed=0)
    assert found.values["same"] == probabilities(model, sets.tokens(ASKED[:2]))
    assert len(found.values["unknown"]) == 1
