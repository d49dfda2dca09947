"""A model with patches: what is asked, probed, evaluated and exported lies over them; shards may be
trained over them, exactly.

Patches here are random LoRA adapters on the tiny base that were put into the ledger as if made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa import unlearn
from sisa.composition import Composition, measure
from sisa.digest import canonical_json
from sisa.errors import IntegrityError
from sisa.opening import CHECKPOINTS, PATCHES
from sisa.patch import WRITTEN, Patch, PatchJob, VaultSet, patched_digest
from sisa.patch_plan import active, next_version
from sisa.ports import Change
from sisa.world import commit
from tests.integration.test_export_generate import PROMPT, answerer_of, probabilities
from tests.integration.test_patched import ADAPTER, Files, random_patch
from tests.integration.tiny_model import (
    PEOPLE,
    Cut,
    Tiny,
    adapters,
    all_files,
    command,
    cut_short,
    ids_of,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch
QUIET = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def put_patch(model: sisa.Model, files: Files, seed: int = 0) -> Patch:
    """Make a patch active, as if it had been made."""
    with model._writing() as world:
        held = world.ledger.patches()
        beneath = tuple(each.key for each in active(held))
        job = PatchJob(world.base, beneath, (), WRITTEN, {"seed": seed}, world.fingerprint)
        saved = world.patches.save(job, files)
        digests = (saved.manifest_sha256, saved.adapter_sha256, saved.num_bytes)
        found = Patch(next_version(held), job, "active", "then", "then", *digests)
        commit(world, Change(patches=[found]))
    return found


@pytest.fixture(scope="module")
def made(tiny_base: Path) -> list[Files]:
    """Two adapters, to be patches."""
    return [random_patch(tiny_base, seed, "q_proj", "up_proj", scale=0.1) for seed in (1, 2)]


def served(model: Tiny, patches: Sequence[Files]) -> Any:
    """An answerer out of the files of the shards and of patches."""
    from sisa.model.answer import Answerer

    opened = model.open()
    found = {
        each.shard: _files(opened.directory / CHECKPOINTS / str(each.head))
        for each in opened.status().shards
        if each.head is not None
    }
    base = opened.parts.base
    return Answerer(base.directory, base.digest, found, 1, patches)


def _files(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_served_lies_over_the_active_patches(tiny: Tiny, made: list[Files]) -> None:
    from sisa.model.tokens import encode_prompt

    model = tiny.open()
    before = answerer_of(model)
    ids = encode_prompt(PROMPT, before.tokenizer, "completion")
    for files in made:
        put_patch(model, files)
    expected, found = served(tiny, made), model.answerer()[0]
    for shards in ((), (0,), (0, 1, 2)):
        asked = found.next_token_probabilities(ids, shards)
        assert asked.equal(expected.next_token_probabilities(ids, shards))
        assert not asked.equal(before.next_token_probabilities(ids, shards))
    answer = model.generate(PROMPT, max_new_tokens=6)
    assert answer.text == expected.generate(ids, answer.shards, 6).strip()
    assert model.verify(replay="all").ok, "shards that were trained over the plain base stay as they are"
    unlearn.revert(model, everything=True)
    again = model.answerer()[0]
    assert again.next_token_probabilities(ids, ()).equal(before.next_token_probabilities(ids, ()))


def test_a_damaged_patch_is_never_served(tiny: Tiny, made: list[Files]) -> None:
    patch = put_patch(tiny.open(), made[0])
    path = tiny.directory / PATCHES / patch.key / ADAPTER
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for ask in (lambda: tiny.open().generate(PROMPT), lambda: tiny.open().export(tiny.folder / "out")):
        with pytest.raises(IntegrityError):
            ask()


# --- shards over patches -------------------------------------------------------------------------


def patched(folder: Path, base: Path, rows: Any, patches: Sequence[Files], **options: Any) -> Tiny:
    """A model that was trained over patches from the first slice that counts."""
    model = train_scratch(folder, base, rows, **options)
    for seed, files in enumerate(patches):
        put_patch(model, files, seed)
    unlearn.retrain(model)
    return Tiny(folder, base)


def test_shards_over_patches_are_those_of_training_over_them_from_scratch(
    tiny: Tiny, made: list[Files], tmp_path: Path
) -> None:
    """History: trained plain, patched, retrained, one patched on top, records forgotten and added."""
    model = tiny.open()
    plain = adapters(tiny.directory)
    put_patch(model, made[0], 0)
    assert unlearn.retrain(model) > 0
    once = adapters(tiny.directory)
    assert not set(once) & set(plain)
    assert unlearn.retrain(model) == 0, "they are over it already"
    put_patch(model, made[1], 1)
    gone, kept = ids_of(of_people("p001")), without(PEOPLE, ids_of(of_people("p001", "p012")))
    model.forget(ids_of(of_people("p012")))
    assert unlearn.retrain(model) > 0
    model.forget(gone)
    expected = patched(tmp_path / "scratch", tiny.base, kept, made)
    assert adapters(tiny.directory) == adapters(expected.directory)
    assert model.verify(replay="all").ok
    names = {json.loads(p.read_text())["job"]["base"] for p in _manifests(tiny.directory)}
    stack = [each.adapter_sha256 for each in unlearn.patches(model)[0]]
    assert names == {patched_digest(model.base.digest, stack)}


def _manifests(directory: Path) -> list[Path]:
    return sorted((directory / CHECKPOINTS).glob("*/manifest.json"))


def test_what_was_cut_short_over_a_patch_is_gone_on_with(
    tiny: Tiny, made: list[Files], tmp_path: Path
) -> None:
    put_patch(tiny.open(), made[0])
    with pytest.raises(Cut):
        unlearn.retrain(tiny.open(cut_short(2)))
    assert tiny.open().resume().slices_trained > 0
    expected = patched(tmp_path / "scratch", tiny.base, PEOPLE, made[:1])
    assert adapters(tiny.directory) == adapters(expected.directory)
    assert tiny.open().verify(replay="all").ok


def test_reverted_with_retraining_it_is_the_plain_model_again(tiny: Tiny, made: list[Files]) -> None:
    plain = adapters(tiny.directory)
    model = tiny.open()
    put_patch(model, made[0])
    unlearn.retrain(model)
    unlearn.revert(model)
    over = adapters(tiny.directory)
    assert model.verify(replay="all").ok, "a patch that shards are trained over is kept"
    assert over != plain
    unlearn.retrain(model)
    assert adapters(tiny.directory) == plain
    assert model.verify(replay="all").ok


def test_an_encrypted_model_is_trained_over_patches_too(
    tmp_path: Path, tiny_base: Path, made: list[Files]
) -> None:
    rows = PEOPLE[:8]
    options: dict[str, Any] = {"encrypt": True, "keyring": "keys"}
    for name, settings in (("plain", {}), ("sealed", options)):
        (tmp_path / name).mkdir()
        run_file = write_run(tmp_path / name, tiny_base, rows, **settings)
        (tmp_path / name / "shared.key").chmod(0o600)
        model, _ = sisa.train_model(run_file, executor="serial", allow_deleted=True)
        put_patch(model, made[0])
        unlearn.retrain(model)
        assert model.verify(replay="all").ok
    digests = [sisa.open_model(tmp_path / each / "model").status() for each in ("plain", "sealed")]
    assert digests[0].model_digest == digests[1].model_digest


@pytest.mark.ray
def test_workers_on_ray_train_the_same_bytes_over_patches(
    tiny: Tiny, made: list[Files], tmp_path: Path
) -> None:
    from cluster import ray_session

    put_patch(tiny.open(), made[0])
    try:
        assert unlearn.retrain(tiny.open("ray")) > 0
    finally:
        ray_session.disconnect()
    expected = patched(tmp_path / "scratch", tiny.base, PEOPLE, made[:1])
    assert adapters(tiny.directory) == adapters(expected.directory)


# --- composition ---------------------------------------------------------------------------------


def measured(model: sisa.Model, before: Sequence[Patch], after: Sequence[Patch]) -> Composition:
    with model._world() as world:
        return measure(world, model.parts, before, after, limit=10)


def test_composition_is_nothing_for_equal_stacks_and_something_for_others(
    tiny: Tiny, made: list[Files]
) -> None:
    model = tiny.open()
    first, second = (put_patch(model, files, seed) for seed, files in enumerate(made))
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


def test_composition_is_not_measured_on_what_is_to_be_forgotten(tiny: Tiny, made: list[Files]) -> None:
    model = tiny.open()
    patch = put_patch(model, made[0])
    before = measured(model, [], [patch])
    with model._writing() as world:
        rows = [row for shard in range(3) for row in world.ledger.rows(shard)][:-3]
        found = VaultSet("f" * 64, "forget", len(rows), "they asked", "then", "", 0, held=False)
        pairs = tuple((found.name, row.id_digest) for row in rows)
        commit(world, Change(vault=[found], vaulted=pairs))
    after = measured(model, [], [patch])
    assert (before.num_records, after.num_records) == (10, 3)


def test_a_model_without_shards_has_no_composition(tiny: Tiny, made: list[Files]) -> None:
    model = tiny.open()
    patch = put_patch(model, made[0])
    model.forget(ids_of(PEOPLE))
    found = measured(model, [], [patch])
    assert found.to_json() == {"num_records": 0, "base": None, "shards": None, "by_shard": {}}


# --- leaving the model ---------------------------------------------------------------------------


@QUIET
def test_an_export_is_what_is_served_as_one_adapter_on_the_plain_base(
    tiny: Tiny, made: list[Files]
) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    from sisa.model.tokens import encode_prompt

    model = tiny.open()
    plain = model.export(tiny.folder / "plain")
    stack = [put_patch(model, files, seed) for seed, files in enumerate(made)]
    patched_ = model.export(tiny.folder / "patched")
    expected = served(tiny, made)
    ids = encode_prompt(PROMPT, expected.tokenizer, "completion")
    for shard, (path, before) in enumerate(zip(patched_, plain, strict=True)):
        found = probabilities(AutoPeftModelForCausalLM.from_pretrained(path), ids)
        wanted = expected.next_token_probabilities(ids, (shard,))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
        assert path.name == before.name
        assert (path / ADAPTER).read_bytes() != (before / ADAPTER).read_bytes()
    with model._world() as world:
        told = {each.path: each.patches for each in world.ledger.exports()}
        standings = {world.exports.state(each) for each in world.ledger.exports()}
    keys = tuple(each.key for each in stack)
    assert {told[str(path)] for path in patched_} == {keys}
    assert {told[str(path)] for path in plain} == {()}
    assert standings == {"held"}
    unlearn.revert(model, everything=True)
    again = model.export(tiny.folder / "again")
    assert [all_files(path) for path in again] == [all_files(path) for path in plain]


def test_a_deletion_erases_a_patched_export_that_it_touched(tiny: Tiny, made: list[Files]) -> None:
    model = tiny.open()
    put_patch(model, made[0])
    paths = model.export(tiny.folder / "out")
    (place,) = model.where(["p004-q1"])
    model.forget(["p004-q1"])
    assert [path.exists() for path in paths] == [shard != place.shard for shard in range(3)]


@QUIET
def test_an_evaluation_is_of_what_is_served_and_names_it(tiny: Tiny, made: list[Files]) -> None:
    from approx.evaluated import PromptForm
    from approx.evaluated_models import open_evaluated

    def scored() -> tuple[str, float]:
        opened = open_evaluated(str(tiny.directory))
        (score,) = opened.score([(PROMPT, " Ada.")], PromptForm("completion"), 1)
        return opened.digest, score.loss

    plain = scored()
    put_patch(tiny.open(), made[0])
    under = scored()
    assert under[0] != plain[0]
    assert under[1] != pytest.approx(plain[1], abs=1e-4)
    unlearn.revert(tiny.open())
    assert scored() == plain


# --- the probe -----------------------------------------------------------------------------------


def test_the_probe_asks_the_base_as_it_is_served(
    tiny: Tiny, made: list[Files], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tiny.file("asked.jsonl", PEOPLE[:3])

    def probed(*options: str) -> dict[str, Any]:
        done = command(capsys, "approx", "probe", "-m", tiny.directory, "--file", file, *options)
        assert done.code == 0
        return done.json

    plain = probed()
    put_patch(tiny.open(), made[0])
    under = probed()
    assert under != plain
    assert probed("--without-patches") == plain
    asked = tiny.open().forget(["p001-q1"]).request
    assert asked is not None
    assert asked.probed is not None
    one = tiny.file("one.jsonl", [row for row in PEOPLE if row["id"] == "p001-q1"])
    done = command(capsys, "approx", "probe", "-m", tiny.directory, "--file", one)
    assert done.json["membership_margin"] == asked.probed.membership_margin
