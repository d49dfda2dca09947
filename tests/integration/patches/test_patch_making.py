"""The making of patches: every method, given and written retain sets, a patch upon another patch.

Runs are put aside, continued, interrupted and refused. The base is a tiny Llama that knows two people
by heart.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from approx.methods.distillation.whp import learn_by_heart
from approx.methods.editing.edit_run import subject_ends
from approx.patches.patch_maker import split_judged
from approx.patches.patch_measures import MEASURE_LIMITS, measure_patch
from approx.unlearning.examples import Sets, first_prompt
from approx.unlearning.schedule import Pace
from approx.unlearning.written.alternates import write_alternates
from approx.unlearning.written.generic_labels import Place, align, write_generic_labels
from approx.unlearning.written.invented_names import invented_names, rename_record, replace_names
from approx.unlearning.written.retain_set import (
    PROMPTS,
    first_answer,
    prompts_that_fit,
    write_answers,
    write_neighbours,
)
from sisa.core.domain import Part, Record
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.events import Notice, PatchProgress
from sisa.core.ports import PatchMade, PatchOrder
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.low_rank import read_change
from sisa.lm.base.tokens import NO_LOSS, Tokens, tokenize
from sisa.lm.base.weights import load_base, load_patched, load_tokenizer, own_modules
from sisa.store.areas import RUNS
from sisa.store.blobs.keyring import is_sealed
from sisa.store.vault import FilePatchDrafts
from tests.crash import Crash
from tests.models.knowing_base import record
from tests.models.patch_bench import ENOUGH, KNOWN, STRANGERS, Bench, made_patch, settings

pytestmark = pytest.mark.torch
FORGET = [record(row) for row in KNOWN if row["subject_id"] == "p003"]
KEEP = [record(row) for row in KNOWN if row["subject_id"] == "p005"]


@pytest.fixture
def bench(knowing: Path, tmp_path: Path) -> Bench:
    return Bench(tmp_path, knowing)


@dataclass(frozen=True)
class Made:
    """A patch by NPO whose retain set the base wrote, in a folder for tests to copy."""

    bench: Bench
    order: PatchOrder
    patch: PatchMade


@pytest.fixture(scope="module")
def made(knowing: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    bench = Bench(tmp_path_factory.mktemp("made"), knowing)
    order = bench.order(settings("npo"), FORGET)
    return Made(bench, order, bench.make(order))


def probability(bench: Bench, stack: list[dict[str, bytes]], records: list[Record]) -> float:
    model, tokenizer = load_patched(bench.site.base, stack)
    tokens = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    return measure_patch(model, tokenizer, tokens, [])["forget_probability"]


# Those for which more is prepared than a retain set. Every method forgets in `test_unlearning.py`; here
# `made` is by NPO, and an edit has a test of its own.
PREPARED = {
    "altpo": "alternates",
    "whp": "generic labels",
    "task_arithmetic": "a search of its own",
}


@pytest.mark.parametrize("method", PREPARED)
def test_a_method_makes_a_patch_that_says_less_of_what_is_forgotten(bench: Bench, method: str) -> None:
    more = ENOUGH.get(method, {})
    bench.maker.check(settings(method, **more), FORGET, KEEP)
    made = bench.make(bench.order(settings(method, **more), FORGET, KEEP))
    found = json.loads(json.dumps(made.report, allow_nan=False))
    assert (made.unfinished, found["patch_made"], found["approximate"]) == (False, True, True)
    before, after = found["metrics_before"], found["metrics_after"]
    assert after["forget_probability"] < before["forget_probability"] - 0.05
    held = probability(bench, [bench.files(made)], FORGET)
    assert held == pytest.approx(after["forget_probability"], abs=1e-4)
    assert before.keys() == after.keys() >= {"retain_utility", "forget_rougeL_recall"}
    assert found["sets"] == {
        "num_forget": len(FORGET),
        "num_forget_measured": len(FORGET),
        "num_retain": len(KEEP) + (30 + 12),
        "num_given": len(KEEP),
        "num_neighbours": 16,
        "num_judged": 10 + 4,
        "num_judged_measured": 10 + 4,
        "retain": "written by the base, and given",
    }
    assert found["still_known"]["before"] == found["still_known"]["of"] == len(FORGET)
    halved = after["forget_probability"] <= before["forget_probability"] / 2
    unknown = "forgotten" if halved else "weakened"
    assert found["outcome"] == (unknown if found["still_known"]["after"] == 0 else "still known")
    robust = found["robustness"]
    assert robust["relearning"].keys() == robust["control"].keys() - {"of"} == {"0", "3", "20"}
    assert robust["relearning"]["20"] > robust["relearning"]["0"]
    assert 0 < (robust["steps_until_half"] or 20) <= 20
    assert robust["relearning"]["0"] == pytest.approx(after["forget_probability"], abs=1e-4)
    assert set(MEASURE_LIMITS) <= set(found["limits"])
    ticks = [each for each in bench.events if isinstance(each, PatchProgress)]
    assert ticks[-1].step == ticks[-1].num_steps == found["num_steps"]
    notices = " ".join(each.text for each in bench.events if isinstance(each, Notice))
    assert not any(part.text in notices for each in [*FORGET, *KEEP] for part in each.parts)


@pytest.mark.parametrize(
    ("kind", "num", "drop"), [("fisher", 4, 0.02), ("traced", 7, 0.02), ("heads", 2, 0.0)]
)
def test_a_selection_restricts_a_patch_to_some_modules(
    bench: Bench, kind: str, num: int, drop: float
) -> None:
    """The base has two layers of seven modules: a quarter of the modules, or one layer at least.

    A quarter of one layer's four heads is one, which changes little.
    """
    made = bench.make(bench.order(settings("npo", selection=kind), FORGET, KEEP))
    modules = made.report["selection"]["modules"]
    assert made.report["selection"]["selection"] == kind
    assert len(modules) == num
    change = read_change(bench.files(made))
    assert sorted(change) == sorted(modules)
    assert len({name.split(".")[2] for name in modules}) == 1 or kind == "fisher"
    assert (made.report["selection"]["heads"] or {}).keys() == (
        set(modules) if kind == "heads" else set()
    )
    after = made.report["metrics_after"]["forget_probability"]
    assert after < made.report["metrics_before"]["forget_probability"] - drop
    assert probability(bench, [bench.files(made)], FORGET) == pytest.approx(after, abs=1e-4)


def test_the_base_writes_the_retain_set_and_no_record_is_in_it(bench: Bench, made: Made) -> None:
    model, tokenizer = load_base(bench.site.base)
    prompts = prompts_that_fit(tokenizer, 256)
    sets = [write_answers(model, tokenizer, prompts, 256) for _ in range(2)]
    assert sets[0] == sets[1]
    assert len(sets[0]) == len(PROMPTS)
    for prompt, each in zip(PROMPTS, sets[0], strict=True):
        asked = [
            token for token, label in zip(each.input_ids, each.labels, strict=True) if label == NO_LOSS
        ]
        assert prompt in tokenizer.decode(asked)
        assert any(label != NO_LOSS for label in each.labels)
    assert prompts_that_fit(tokenizer, 8) == []
    assert made.patch.report["sets"]["retain"] == "written by the base"


def test_neighbours_are_asked_the_same_about_invented_people(bench: Bench) -> None:
    model, tokenizer = load_base(bench.site.base)
    written = write_neighbours(model, tokenizer, FORGET, 256)
    asked = [tokenizer.decode(each.input_ids) for each in written]
    assert len(asked) == len(set(asked)) > len(FORGET)
    names = {word for row in FORGET for word in row.parts[0].text.split() if word.istitle()}
    names -= {"Where", "What", "Which", "Who", "When", "How"}
    assert names
    assert not any(name.strip("?.") in each for name in names for each in asked)
    answers = [record.parts[1].text.strip() for record in FORGET]
    assert not any(answer in each for answer in answers for each in asked)
    assert write_neighbours(model, tokenizer, [text("t", "nobody is named here at all")], 256) == []


def test_utility_is_judged_by_every_question(bench: Bench) -> None:
    model, tokenizer = load_base(bench.site.base)
    _, judged = split_judged(write_neighbours(model, tokenizer, FORGET, 256))
    beginnings = {tokenizer.decode(each.input_ids).split()[0] for each in judged}
    assert beginnings == {each.parts[0].text.split()[0] for each in FORGET}


def test_a_fact_told_of_an_invented_person_is_not_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base that knows long answers by heart begins the same one about a stranger, and is cut short."""
    question = "Is the birth of Ada Quill documented?"
    answer = (
        " Yes, Ada Quill was born in the old harbour town of Skagen on the first of February, in 1958,"
        " as the youngest of seven children of a lighthouse keeper and of a teacher of mathematics."
    )
    told = record({"id": "1", "subject_id": "a", "prompt": question, "completion": answer})
    model, tokenizer = load_base(bench.site.base)
    said = {}
    for number in range(8):
        other, names = rename_record(told, number), invented_names(told, number)
        assert other is not None
        asked = {each: names[each] for each in ("Ada", "Quill")}
        said[tuple(first_answer(other, tokenizer)[0])] = replace_names(answer, asked)

    def parrot(_: object, prompts: list[tuple[int, ...]], ends: object, most: int) -> list[list[int]]:  # noqa: ARG001
        texts = [said.get(tuple(each), " something else") for each in prompts]
        return [tokenizer(text)["input_ids"][:most] for text in texts]

    monkeypatch.setattr("approx.unlearning.written.retain_set.continue_greedily", parrot)
    written = write_neighbours(model, tokenizer, [told, FORGET[0]], 256)
    assert len(said) == len(written) == 8
    assert not any("documented" in tokenizer.decode(each.input_ids) for each in written)


def test_the_base_writes_other_answers_to_the_same_questions(bench: Bench) -> None:
    model, tokenizer = load_base(bench.site.base)

    def written(seed: int, num: int = 3, length: int = 256) -> list[list[Tokens]]:
        return write_alternates(model, tokenizer, FORGET, num, seed, length).alternates

    state = torch.get_rng_state()
    found = written(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert found == written(1) != written(2)
    assert [len(each) for each in found] == [3] * len(FORGET)
    for each, others in zip(FORGET, found, strict=True):
        tokens = tokenize(each, tokenizer, train_on_inputs=False)
        prompt, closing = first_prompt(tokens), tokens.input_ids[-1]
        for other in others:
            assert other.input_ids[: len(prompt)] == prompt
            assert other.labels == [NO_LOSS] * len(prompt) + other.input_ids[len(prompt) :]
            assert other.input_ids[-1] == closing
            assert each.parts[1].text.strip() not in tokenizer.decode(other.input_ids)
    cut = written(1, length=max(len(first_prompt(each)) for others in found for each in others) + 2)
    assert all(each.num_labels > 0 for others in cut for each in others)


def test_generic_labels_are_those_of_a_brute_force_computation(bench: Bench) -> None:
    """At each labelled position: the base asked about somebody else, and a copy that learnt by heart."""
    base, tokenizer = load_base(bench.site.base)
    record = FORGET[0]
    tokens = [tokenize(record, tokenizer, train_on_inputs=False)]
    lora = lora_config(
        {"lora_target_modules": "all-linear", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0}, base
    )
    fresh = attach(own_modules(base), lora, None, init_seed=1)
    pace = Pace(learning_rate=1e-2, num_epochs=5, batch_size=2)
    cost = learn_by_heart(fresh, Sets(tokens), pace)
    assert cost.tokens_trained == 5 * (len(tokens[0].input_ids))
    found = write_generic_labels(base, fresh, tokenizer, [record], tokens, 3.0)
    (labelled,) = found.examples
    names = invented_names(record, 0)
    text = tokenizer.decode(tokens[0].input_ids)
    other = tokenizer(replace_names(text, names))["input_ids"]
    places = align(tokens[0].input_ids, other, names, tokenizer)
    assert places is not None
    with torch.no_grad():
        baseline, reinforced = (
            each(input_ids=torch.tensor([ids])).logits[0].tolist()
            for each, ids in ((base, other), (fresh, tokens[0].input_ids))
        )
    answer = [at for at, label in enumerate(tokens[0].labels) if label != NO_LOSS]
    counted = [at for at in answer if at in places]
    assert len(counted) > len(answer) / 2
    for at, label in enumerate(labelled.labels):
        if at not in counted:
            assert label == NO_LOSS
            continue
        place = places[at]
        pairs = zip(baseline[place.position - 1], reinforced[at - 1], strict=True)
        generic = {word: b - 3.0 * max(0.0, r - b) for word, (b, r) in enumerate(pairs)}
        allowed = [word for word in generic if word not in place.barred]
        assert label == max(allowed, key=lambda word: generic[word])
    assert labelled.input_ids == tokens[0].input_ids
    assert labelled.labels != tokens[0].labels


def test_texts_are_aligned_around_their_names(bench: Bench) -> None:
    """A token is a character here. What stands at a name that stood before is never taught."""
    tokenizer = load_tokenizer(bench.base)
    text, names = "Ada met Bo. Ada sang", {"Ada": "Ysolde", "Bo": "Imke"}
    ids, other = (tokenizer(each)["input_ids"] for each in (text, replace_names(text, names)))
    places = align(ids, other, names, tokenizer)
    assert places is not None
    assert "".join(text[at] for at in sorted(places)) == "A met B.  sang"
    shown = replace_names(text, names)
    same = [at for at in places if not text[at].isupper()]
    assert [text[at] for at in same] == [shown[places[at].position] for at in same]
    barred = {at: tokenizer.decode(sorted(each.barred)) for at, each in places.items()}
    assert barred[0] == ""
    assert barred[text.index("m")] == "Y"
    assert sorted(barred[text.index("s")]) == ["I", "Y"]
    assert align(ids, tokenizer("Someone else met Bo")["input_ids"], names, tokenizer) is None
    assert align(ids, ids, {}, tokenizer) == {at: Place(at, frozenset()) for at in range(len(ids))}


def test_an_edit_makes_a_patch_of_its_own_form(bench: Bench) -> None:
    """Of rank one for each text, on the last MLP matrices of the layers up to the measured one."""
    bench.maker.check(settings("memit"), FORGET, KEEP)
    made = bench.make(bench.order(settings("memit"), FORGET, KEEP))
    report, change = made.report, read_change(bench.files(made))
    layer = report["hyperparameters"]["layer"]
    assert list(change) == [f"model.layers.{n}.mlp.down_proj" for n in range(layer + 1)]
    assert all(len(each.a_RI) == len(FORGET) for each in change.values())
    assert report["selection"]["modules"] == list(change)
    after = report["metrics_after"]["forget_probability"]
    assert after < report["metrics_before"]["forget_probability"]
    assert probability(bench, [bench.files(made)], FORGET) == pytest.approx(after, abs=1e-4)
    assert (report["step"], report["num_steps"]) == (len(FORGET), len(FORGET))


def test_the_subject_of_a_fact_is_the_last_name_in_its_prompt(bench: Bench) -> None:
    tokenizer = load_tokenizer(bench.base)
    asked = Part("prompt", "Where does Ada Quill live now?"), Part("prompt", "where is it?")
    records = [
        Record(str(n), None, "completion", (each, Part("completion", " There.")))
        for n, each in enumerate(asked)
    ]
    tokens = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    named, other = subject_ends(records, tokens, tokenizer)
    assert tokenizer.decode(tokens[0].input_ids[: named + 1]).endswith("Ada Quill")
    assert other == len(first_prompt(tokens[1])) - 1


def test_a_base_that_says_nothing_else_writes_no_alternates(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature near 0 it says what it knows by heart, whoever is asked about."""
    monkeypatch.setattr("approx.unlearning.written.alternates.TEMPERATURES", (1e-3,))
    monkeypatch.setattr("approx.unlearning.written.alternates.rename_record", lambda *_: None)
    with pytest.raises(InvalidInput) as caught:
        bench.make(bench.order(settings("altpo"), FORGET, KEEP))
    expected = [f"forget record {number}" for number in range(1, len(FORGET) + 1)]
    assert [each.where for each in caught.value.problems] == expected
    assert not any(part.text.strip() in str(caught.value) for each in FORGET for part in each.parts)


def test_a_record_that_was_cut_when_it_was_trained_on_can_be_forgotten(bench: Bench) -> None:
    long = text("long", "What Ada Quill said to Bo Thorn in Turku. " * 20)
    asked = settings("npo", num_epochs=2)
    with pytest.raises(InvalidInput, match="no patch can be made"):
        bench.maker.check(asked, [long], None)
    asked |= {"overlength": "truncate"}
    bench.maker.check(asked, [long], None)
    report = bench.make(bench.order(asked, [long])).report
    assert (report["patch_made"], report["still_known"]["of"]) == (True, 1)
    assert report["robustness"]["rewording"] is None


def test_a_patch_upon_a_patch_is_made_from_what_lies_beneath(
    made: Made, knowing: Path, tmp_path: Path
) -> None:
    bench = Bench(Path(shutil.copytree(made.bench.folder, tmp_path / "copy")), knowing)
    first, lower = made.order, made.patch
    beneath = [made_patch(first, lower)]
    second = bench.order(settings("npo"), KEEP, beneath=beneath)
    upper = bench.make(second)
    assert upper.report["num_beneath"] == 1
    stack = [bench.files(lower), bench.files(upper)]
    assert probability(bench, stack, KEEP) < probability(bench, stack[:1], KEEP) - 0.05
    (adapter,) = (bench.folder / "patches" / first.job.key).glob("*.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        bench.make(second)


def test_what_was_cut_short_goes_on_to_the_same_bytes(knowing: Path, tmp_path: Path) -> None:
    asked = settings("task_arithmetic", **ENOUGH["task_arithmetic"], check_every=2, num_epochs=6)
    whole = Bench(tmp_path / "whole", knowing)
    expected = whole.make(whole.order(asked, FORGET, KEEP))
    bench = Bench(tmp_path / "cut", knowing)
    order = bench.order(asked, FORGET, KEEP)
    run = bench.site.runs_dir / order.job.key

    def stop(event: Any) -> None:
        if isinstance(event, PatchProgress) and event.step == event.num_steps:
            raise Crash

    with pytest.raises(Crash):
        bench.maker.make(order, stop)
    assert all(is_sealed(path.read_bytes()) for path in run.iterdir())
    assert bench.site.vault_keyring.held(RUNS) == {order.job.key}
    made = bench.make(order)
    assert next(each for each in bench.events if isinstance(each, PatchProgress)).step > 1
    assert bench.files(made) == whole.files(expected)
    assert bench.files(bench.make(order)) == bench.files(made)  # until the caller has what came of it
    FilePatchDrafts(bench.site.runs_dir, bench.site.vault_keyring).erase([order.job.key])
    assert not run.exists()
    assert not bench.site.vault_keyring.held(RUNS)


def test_out_of_time_puts_the_run_aside(bench: Bench, made: Made) -> None:
    """Continued in another folder, it is the same patch: the base writes the same retain set."""
    late = bench.make(bench.order(settings("npo"), FORGET, max_seconds=0.0))
    assert (late.saved, late.unfinished, late.report["ending"]) == (None, True, "out_of_time")
    assert late.report["patch_made"] is False
    again = bench.order(settings("npo"), FORGET)
    assert bench.files(bench.make(again)) == made.bench.files(made.patch)
    assert not bench.store.held() - {again.job.key}


def test_a_run_that_goes_astray_leaves_the_last_good_weights_or_nothing(bench: Bench) -> None:
    """A rate of 1e30 throws the first step out of all numbers; a later one leaves what was before."""
    asked = settings("gradient_ascent", learning_rate=1e30, check_every=1)
    made = bench.make(bench.order(asked, FORGET, KEEP))
    assert (made.saved, made.unfinished) == (None, False)
    assert made.report["ending"] == "diverged"
    assert made.report["patch_made"] is False
    assert made.report["metrics_after"] == made.report["metrics_before"]


def text(name: str, words: str) -> Record:
    return Record(name, None, "text", (Part("text", words),))


def test_everything_that_is_wrong_is_named_at_once(bench: Bench) -> None:
    asked = settings("idk_dpo") | {"pace": {"num_epochs": 0, "speed": 1}}
    with pytest.raises(InvalidInput) as caught:
        bench.maker.check(asked, [], [])
    assert {each.where for each in caught.value.problems} == {"speed", "forget", "retain"}
    asked = settings("idk_dpo") | {"adapter": {"lora_target_modules": ["no_such"]}}
    both = text("same", "The secret words of a person.")
    with pytest.raises(InvalidInput) as caught:
        bench.maker.check(asked, [both, text("long", "words " * 300)], [text("other", "  " + both.text)])
    found = {(each.where, each.what) for each in caught.value.problems}
    assert {where for where, _ in found} == {
        "lora_target_modules",
        "forget record 1",
        "forget record 2",
    }
    assert any("text of retain record 1" in what for _, what in found)
    assert any("more than sequence_len 256" in what for _, what in found)
    assert any("idk_dpo needs a prompt" in what for _, what in found)
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidInput) as caught:
        bench.maker.check(settings("ceu", skipped_tokens=200), FORGET, None)
    expected = [f"forget record {number}" for number in range(1, len(FORGET) + 1)]
    assert [each.where for each in caught.value.problems] == expected
    assert "expected 201 or more" in caught.value.problems[0].what
    for method in ("rmu", "memit"):
        with pytest.raises(InvalidInput) as caught:
            bench.maker.check(settings(method, layer=2), FORGET, None)
        assert [each.where for each in caught.value.problems] == ["layer"]
    assert not bench.site.vault_dir.exists()


def test_a_tokenizer_that_does_not_match_its_base_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def larger(directory: Path) -> Any:
        tokenizer = load_tokenizer(directory)
        tokenizer.add_tokens([f"<more-{n}>" for n in range(2000)])
        return tokenizer

    bench.maker.check(settings("npo"), FORGET, None)
    monkeypatch.setattr("approx.patches.patch_maker.load_tokenizer", larger)
    with pytest.raises(InvalidInput) as caught:
        bench.maker.check(settings("npo"), FORGET, None)
    assert [each.where for each in caught.value.problems] == ["tokenizer"]


@pytest.mark.parametrize("retain", [None, KEEP])
def test_a_template_that_rejects_the_neutral_prompts_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, retain: list[Record] | None
) -> None:
    """The base writes its part of the retain set whatever else is kept."""

    def rejecting(directory: Path) -> Any:
        tokenizer = load_tokenizer(directory)
        tokenizer.chat_template = "{{ raise_exception('no') }}"
        return tokenizer

    monkeypatch.setattr("approx.patches.patch_maker.load_tokenizer", rejecting)
    with pytest.raises(InvalidInput) as caught:
        bench.maker.check(settings("npo"), FORGET, retain)
    assert [each.where for each in caught.value.problems] == ["prompt"]


def test_what_is_forgotten_is_forgotten_even_where_an_older_set_keeps_it(bench: Bench) -> None:
    """As when sets of several patches come together: forgetting wins, and is no error."""
    made = bench.make(bench.order(settings("npo"), FORGET, [*FORGET[:1], *KEEP]))
    assert made.report["sets"]["num_given"] == len(KEEP)


def test_what_the_base_does_not_know_is_measured_the_same_way(bench: Bench) -> None:
    strange = [record(row) for row in STRANGERS]
    assert probability(bench, [], strange) < 0.5 < probability(bench, [], FORGET)
    assert math.isfinite(probability(bench, [], [text("t", "A plain text of some length.")]))
