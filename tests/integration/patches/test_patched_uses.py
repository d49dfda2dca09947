"""Measures and exports of a model with patches.

Composition is zero for equal stacks. An export is what is served, as one adapter on the plain base.
Evaluation and probe measure what is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import sisa
from sisa import unlearn
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import canonical_json
from sisa.core.patches import Patch, VaultSet
from sisa.core.ports import Change
from sisa.flows.context.commit import commit
from sisa.flows.patches.composition import Composition, measure
from sisa.lm.routing.route import all_of
from tests.models.patched import QUIET, Files, answerer_of, probabilities, put_patch
from tests.models.tiny_model import (
    PEOPLE,
    PROMPT,
    Tiny,
    all_files,
    command,
    ids_of,
    next_token_probabilities,
)

pytestmark = pytest.mark.torch


# --- composition ---------------------------------------------------------------------------------


def measured(model: sisa.Model, before: Sequence[Patch], after: Sequence[Patch]) -> Composition:
    with model.context() as context:
        return measure(context, before, after, limit=10)


def test_composition_is_nothing_for_equal_stacks_and_something_for_others(
    tiny: Tiny, two_patches: list[Files]
) -> None:
    model = tiny.open()
    first, second = (put_patch(model, files, seed) for seed, files in enumerate(two_patches))
    for stack in ([], [first], [first, second]):
        same = measured(model, stack, stack)
        assert (same.num_records, sorted(same.by_shard)) == (10, [0, 1, 2])
        for each in (same.base, same.shards, *same.by_shard.values()):
            assert each is not None
            assert (each.kl, each.agreement) == (0.0, 1.0)
            assert each.answer_probability_before == each.answer_probability_after
    other = measured(model, [first], [first, second])
    assert other == measured(model, [first], [first, second])
    for each in (other.base, other.shards, *other.by_shard.values()):
        assert each is not None
        assert each.kl > 0
        assert each.answer_probability_before != each.answer_probability_after
    assert other.shards is not None
    assert other.base is not None
    assert other.shards.answer_probability_before != other.base.answer_probability_before
    parts = [each.num_records for each in other.by_shard.values()]
    assert sum(parts) == other.shards.num_records == 10
    assert max(parts) - min(parts) <= 1, "spread over the shards"
    text = canonical_json(other.to_json()).decode()
    assert not any(row["id"] in text or row["completion"].strip() in text for row in PEOPLE)


def test_composition_is_not_measured_on_what_is_to_be_forgotten(
    tiny: Tiny, two_patches: list[Files]
) -> None:
    model = tiny.open()
    patch = put_patch(model, two_patches[0])
    before = measured(model, [], [patch])
    with model.writing() as context:
        rows = [row for shard in range(3) for row in context.stores.ledger.rows(shard)][:-3]
        found = VaultSet("f" * 64, "forget", len(rows), "they asked", "then", "", 0, held=False)
        pairs = tuple((found.name, row.id_digest) for row in rows)
        commit(context, Change(vault=[found], vaulted=pairs))
    after = measured(model, [], [patch])
    assert (before.num_records, after.num_records) == (10, 3)


def test_a_model_without_shards_has_no_composition(tiny: Tiny, two_patches: list[Files]) -> None:
    model = tiny.open()
    patch = put_patch(model, two_patches[0])
    model.forget(ids_of(PEOPLE))
    found = measured(model, [], [patch])
    assert found.to_json() == {"num_records": 0, "base": None, "shards": None, "by_shard": {}}


# --- leaving the model ---------------------------------------------------------------------------


@QUIET
def test_an_export_is_what_is_served_as_one_adapter_on_the_plain_base(
    tiny: Tiny, two_patches: list[Files]
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    from sisa.lm.base.tokens import encode_prompt

    model = tiny.open()
    plain = model.export(tiny.folder / "plain")
    stack = [put_patch(model, files, seed) for seed, files in enumerate(two_patches)]
    patched_ = model.export(tiny.folder / "patched")
    expected = answerer_of(tiny.open(), two_patches)
    ids = encode_prompt(PROMPT, expected.tokenizer, "completion")
    for shard, (path, before) in enumerate(zip(patched_, plain, strict=True)):
        found = probabilities(AutoPeftModelForCausalLM.from_pretrained(path), ids)
        wanted = next_token_probabilities(expected, ids, all_of((shard,)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert path.name == before.name
        assert (path / ADAPTER_FILE).read_bytes() != (before / ADAPTER_FILE).read_bytes()
    with model.context() as context:
        patches = {each.path: each.patches for each in context.stores.ledger.exports()}
        standings = {context.stores.exports.standing(each) for each in context.stores.ledger.exports()}
    keys = tuple(each.key for each in stack)
    assert {patches[str(path)] for path in patched_} == {keys}
    assert {patches[str(path)] for path in plain} == {()}
    assert standings == {"held"}
    unlearn.revert(model, everything=True)
    again = model.export(tiny.folder / "again")
    for one, other in zip(again, plain, strict=True):
        found, wanted = all_files(one), all_files(other)
        assert found.pop("README.md") != wanted.pop("README.md"), "cards name the version"
        assert found == wanted


@QUIET
def test_an_evaluation_is_of_what_is_served_and_names_it(tiny: Tiny, two_patches: list[Files]) -> None:
    from approx.evaluation.evaluated_models import open_evaluated
    from approx.evaluation.questions import PromptForm

    def scored() -> tuple[str, float]:
        opened = open_evaluated(str(tiny.directory))
        (score,) = opened.score([(PROMPT, " Ada.")], PromptForm("completion"), 1)
        return opened.digest, score.loss

    plain = scored()
    put_patch(tiny.open(), two_patches[0])
    under = scored()
    assert under[0] != plain[0]
    assert under[1] != pytest.approx(plain[1], abs=1e-4)
    unlearn.revert(tiny.open())
    assert scored() == plain


# --- the probe -----------------------------------------------------------------------------------


def test_the_probe_asks_the_base_as_it_is_served(
    tiny: Tiny, two_patches: list[Files], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.file("asked.jsonl", PEOPLE[:3])

    def probed(*options: str) -> dict[str, Any]:
        done = command(capsys, "approx", "probe", "-m", tiny.directory, "--file", file, *options)
        assert done.code == 0
        return done.json

    plain = probed()
    put_patch(tiny.open(), two_patches[0])
    under = probed()
    assert under != plain
    assert probed("--without-patches") == plain
    asked = tiny.open().forget(["p001-q1"]).request
    assert asked is not None
    assert asked.probed is not None
    one = tiny.file("one.jsonl", [row for row in PEOPLE if row["id"] == "p001-q1"])
    done = command(capsys, "approx", "probe", "-m", tiny.directory, "--file", one)
    assert done.json["membership_margin"] == asked.probed.membership_margin
