"""A model with patches: answers, probe, evaluation and exports use them.

Shards can be trained over them, exactly. Patches here are random LoRA adapters on the tiny base that
were put into the ledger as if made.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa import unlearn
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import patched_digest
from sisa.core.domain import Part, Record
from sisa.core.errors import ConfigConflict
from sisa.core.ports import Change
from sisa.flows.context.commit import commit
from sisa.flows.patches import vault_sets
from sisa.lm.routing.route import all_of
from sisa.store.areas import CHECKPOINTS, PATCHES, VAULT
from sisa.store.blobs.keyring import is_sealed
from tests.models.patched import Files, answerer_of, put_patch
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import (
    PEOPLE,
    PROMPT,
    Tiny,
    adapters,
    change_run,
    ids_of,
    next_token_probabilities,
    of_people,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch


def test_what_is_served_lies_over_the_active_patches(tiny: Tiny, two_patches: list[Files]) -> None:
    from sisa.lm.base.tokens import encode_prompt

    model = tiny.open()
    before = answerer_of(model)
    ids = encode_prompt(PROMPT, before.tokenizer, "completion")
    for files in two_patches:
        put_patch(model, files)
    expected, found = answerer_of(tiny.open(), two_patches), model.answerer()[0]
    for shards in ((), (0,), (0, 1, 2)):
        asked = next_token_probabilities(found, ids, all_of(shards))
        assert asked.equal(next_token_probabilities(expected, ids, all_of(shards)))
        assert not asked.equal(next_token_probabilities(before, ids, all_of(shards)))
    answer = model.generate(PROMPT, max_new_tokens=6)
    assert answer.text == expected.generate([ids], [all_of(answer.shards)], 6)[0].strip()
    assert model.verify(replay="all", apart=False).ok, (
        "shards that were trained over the plain base stay as they are"
    )
    unlearn.revert(model, everything=True)
    again = model.answerer()[0]
    assert next_token_probabilities(again, ids, all_of(())).equal(
        next_token_probabilities(before, ids, all_of(()))
    )


# --- shards over patches -------------------------------------------------------------------------


def patched(folder: Path, base: Path, rows: Any, patches: Sequence[Files], **options: Any) -> Tiny:
    """Return a model trained over patches from its first slice with records."""
    model = train_scratch(folder, base, rows, **options)
    for seed, files in enumerate(patches):
        put_patch(model, files, seed)
    unlearn.retrain(model)
    return Tiny(folder, base)


def test_shards_over_patches_are_those_of_training_over_them_from_scratch(
    tiny: Tiny, two_patches: list[Files], tmp_path: Path
) -> None:
    """History: trained plain, patched, retrained, one patched on top, records forgotten and added."""
    model = tiny.open()
    plain = adapters(tiny.directory)
    put_patch(model, two_patches[0], 0)
    assert unlearn.retrain(model) > 0
    once = adapters(tiny.directory)
    assert not set(once) & set(plain)
    assert unlearn.retrain(model) == 0, "they are over it already"
    put_patch(model, two_patches[1], 1)
    gone, kept = ids_of(of_people("p001")), without(PEOPLE, ids_of(of_people("p001", "p012")))
    model.forget(ids_of(of_people("p012")))
    assert unlearn.retrain(model) > 0
    model.forget(gone)
    expected = patched(tmp_path / "scratch", tiny.base, kept, two_patches)
    assert adapters(tiny.directory) == adapters(expected.directory)
    assert model.verify(replay="all").ok
    names = {json.loads(p.read_text())["job"]["base"] for p in _manifests(tiny.directory)}
    stack = [each.adapter_sha256 for each in unlearn.patches(model)[0]]
    assert names == {patched_digest(model.base.digest, stack)}


def _manifests(directory: Path) -> list[Path]:
    return sorted((directory / CHECKPOINTS).glob("*/manifest.json"))


@pytest.mark.ray
def test_workers_on_ray_train_the_same_bytes_over_patches(
    tiny: Tiny, two_patches: list[Files], tmp_path: Path
) -> None:
    put_patch(tiny.open(), two_patches[0])
    assert unlearn.retrain(tiny.open("ray")) > 0
    expected = patched(tmp_path / "scratch", tiny.base, PEOPLE, two_patches[:1])
    assert adapters(tiny.directory) == adapters(expected.directory)


def test_patches_of_a_former_base_are_dropped_with_it(
    tiny: Tiny, two_patches: list[Files], tmp_path: Path
) -> None:
    model = tiny.open()
    put_patch(model, two_patches[0])
    unlearn.retrain(model)
    other = make_tiny_base(tmp_path / "other", seed=5)
    change_run(tiny.run_file, base_model=str(other))
    tiny.train(accept_differences=True)
    moved = tiny.open()
    assert unlearn.served(moved) == []
    assert [each.state for each in unlearn.patches(moved)[0]] == ["dropped"]
    assert unlearn.patches(moved)[2] == ()
    scratch = train_scratch(tmp_path / "scratch", other, PEOPLE)
    assert adapters(tiny.directory) == adapters(scratch.directory)
    assert moved.verify().ok
    assert not list((tiny.directory / PATCHES).iterdir())


def test_another_layout_keeps_patches_and_what_is_over_them(
    tiny: Tiny, two_patches: list[Files], tmp_path: Path
) -> None:
    model = tiny.open()
    put_patch(model, two_patches[0])
    unlearn.retrain(model)
    change_run(tiny.run_file, sisa__shards=2)
    tiny.train(accept_differences=True)
    expected = patched(
        tmp_path / "scratch", tiny.base, PEOPLE, two_patches[:1], sisa_block={"shards": 2}
    )
    assert adapters(tiny.directory) == adapters(expected.directory)
    assert len(unlearn.served(tiny.open())) == 1
    assert tiny.open().verify().ok


def test_patches_and_shards_over_them_follow_encrypt_and_the_vault_stays_sealed(
    tmp_path: Path, tiny_base: Path, two_patches: list[Files]
) -> None:
    run_file = write_run(tmp_path, tiny_base, PEOPLE[:4], encrypt=True, keyring="keys")
    (tmp_path / "shared.key").chmod(0o600)
    model, _ = sisa.train_model(run_file, executor="serial", allow_deleted=True)
    patch = put_patch(model, two_patches[0])
    unlearn.retrain(model)
    digest = model.status().model_digest
    text = Record("x", None, "text", (Part("text", "Mara of Velden keeps bees."),))
    with model.writing() as context:
        put = vault_sets.put(context, "forget", [text], "she asked")
        commit(context, Change(vault=put.sets, vaulted=put.pairs))
    name = put.sets[0].name
    for encrypt in (False, True):
        change_run(run_file, encrypt=encrypt)
        with pytest.raises(ConfigConflict):
            sisa.train_model(run_file, executor="serial")
        model, taken = sisa.train_model(run_file, executor="serial", accept_differences=True)
        assert (taken.slices_trained, model.status().model_digest) == (0, digest)
        assert is_sealed((model.directory / PATCHES / patch.key / ADAPTER_FILE).read_bytes()) == encrypt
        assert is_sealed((model.directory / VAULT / name).read_bytes())
        assert unlearn.served(model) == [two_patches[0]]
        with model.context() as context:
            assert context.stores.vault.read(put.sets[0]) == (text,)
        assert model.verify(replay="all", apart=False).ok
