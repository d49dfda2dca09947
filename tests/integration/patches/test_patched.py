"""The base under patches: merged as peft merges, deterministic, and the same for every user of it.

Patches here are random LoRA adapters on the tiny base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.digest import patched_digest, sha256_hex
from sisa.core.domain import BaseFiles, SliceJob
from sisa.core.errors import IntegrityError
from sisa.core.ports import StoredRecord
from sisa.lm.base.weights import base_digest, resolve_base
from sisa.lm.routing.route import all_of
from tests.models.patched import QUIET, Files, random_patch
from tests.models.stages import RECORDS, job_for, names
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import next_token_probabilities

pytestmark = pytest.mark.torch

IDS = list(range(40, 60))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"))))


@pytest.fixture(scope="module")
def patches(base: BaseFiles) -> list[Files]:
    """Return two patches that change some modules both and some alone, at different ranks."""
    first = random_patch(base.directory, 1, "q_proj", "down_proj")
    return [first, random_patch(base.directory, 2, "q_proj", "v_proj", rank=2)]


def load(base: BaseFiles, patches: list[Files]) -> Any:
    from sisa.lm.base.numerics import pin_threads
    from sisa.lm.base.weights import load_patched

    pin_threads(1)
    return load_patched(base, patches)[0]


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]


def weights(model: Any) -> dict[str, str]:
    return {name: sha256_hex(each.numpy().tobytes()) for name, each in model.state_dict().items()}


def merged_by_peft(base: BaseFiles, patches: list[Files], folder: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    for number, files in enumerate(patches):
        (folder / str(number)).mkdir()
        for name, data in files.items():
            (folder / str(number) / name).write_bytes(data)
        model = PeftModel.from_pretrained(model, folder / str(number)).merge_and_unload()
    return model.eval()


@QUIET
def test_patches_are_laid_on_as_peft_merges_them(
    base: BaseFiles, patches: list[Files], tmp_path: Path
) -> None:
    import torch

    ours, theirs = load(base, patches), merged_by_peft(base, patches, tmp_path)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, each in ours.state_dict().items():
        torch.testing.assert_close(each, expected[name], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(ours), logits(load(base, [])), atol=1e-2)


def test_without_patches_it_is_the_base_bit_for_bit(base: BaseFiles, patches: list[Files]) -> None:
    from sisa.lm.base.weights import load_base

    plain = load_base(base)[0]
    before = weights(plain)
    under = load(base, patches)
    assert weights(under) != before
    assert weights(plain) == weights(load(base, [])) == before
    assert weights(load_base(base)[0]) == before
    assert base_digest(base.directory) == base.digest
    assert logits(load(base, [])).equal(logits(plain))


def test_the_same_bits_each_time_whatever_was_asked_before(
    base: BaseFiles, patches: list[Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = weights(load(base, patches))
    assert weights(load(base, patches)) == first
    assert weights(load(base, patches[:1])) != first
    assert weights(load(base, patches)) == first
    monkeypatch.setattr("sisa.lm.base.weights._patched", {})
    assert weights(load(base, patches)) == first


def test_only_what_a_patch_changes_is_a_copy_and_one_copy_serves_all(
    base: BaseFiles, patches: list[Files]
) -> None:
    plain, one, other = load(base, []), load(base, patches), load(base, patches)
    shared = {name for name, each in plain.named_parameters() if each is one.get_parameter(name)}
    changed = {name for name, _ in plain.named_parameters()} - shared
    kinds = {name.split(".")[-2] for name in changed}
    assert kinds == {"q_proj", "v_proj", "down_proj"}
    assert all(one.get_parameter(name) is other.get_parameter(name) for name in changed)
    assert one.model.layers[0] is not other.model.layers[0]
    assert not any(each.requires_grad for each in one.parameters())


def test_a_patch_that_does_not_fit_is_refused(base: BaseFiles, tmp_path: Path) -> None:
    import json

    good = random_patch(base.directory, 1)
    wide = random_patch(make_tiny_base(tmp_path / "wide", hidden=96), 1)
    config = json.loads(good["adapter_config.json"])

    def configured(**changed: Any) -> Files:
        return {**good, "adapter_config.json": json.dumps({**config, **changed}).encode()}

    bad = [
        wide,
        {**good, ADAPTER_FILE: good[ADAPTER_FILE][:-1]},
        {"adapter_config.json": good["adapter_config.json"]},
        {ADAPTER_FILE: good[ADAPTER_FILE]},
        configured(r=3),
        configured(use_dora=True),
        configured(rank_pattern={"q_proj": 4}),
        configured(init_lora_weights="pissa"),
        {**good, "adapter_config.json": b'{"peft_type": "IA3"}'},
    ]
    before = weights(load(base, []))
    for files in bad:
        with pytest.raises(IntegrityError):
            load(base, [good, files])
    assert weights(load(base, [])) == before


# --- answering -----------------------------------------------------------------------------------


def answerer(base: BaseFiles, adapters: Mapping[int, Files], patches: list[Files]) -> Any:
    from sisa.lm.answer.answerer import Answerer

    return Answerer(base, adapters, 1, patches)


def test_the_base_alone_and_every_shard_answer_over_the_patches(
    base: BaseFiles, patches: list[Files]
) -> None:
    import torch

    from sisa.lm.base import adapter, low_rank

    shard = random_patch(base.directory, 7, "q_proj", "o_proj")
    asked = answerer(base, {3: shard}, patches)
    alone = next_token_probabilities(asked, IDS, all_of(()))
    torch.testing.assert_close(alone, logits(load(base, patches))[-1].softmax(-1))
    config, tensors = adapter.read_config(shard), low_rank.read_tensors(shard, ADAPTER_FILE)
    over = adapter.attach(load(base, patches), config, tensors, init_seed=0).eval()
    found = next_token_probabilities(asked, IDS, all_of((3,)))
    torch.testing.assert_close(found, logits(over)[-1].softmax(-1))
    plain = answerer(base, {3: shard}, [])
    for shards in ((), (3,)):
        other = next_token_probabilities(plain, IDS, all_of(shards))
        assert not torch.allclose(other, next_token_probabilities(asked, IDS, all_of(shards)), atol=1e-4)
    assert plain.base_name == base.digest
    assert asked.base_name == patched_digest(
        base.digest, [sha256_hex(each[ADAPTER_FILE]) for each in patches]
    )


# --- training ------------------------------------------------------------------------------------


def job_over(base: BaseFiles, patches: list[Files], slice_: int = 0, num_records: int = 9) -> SliceJob:
    name = patched_digest(base.digest, [sha256_hex(each[ADAPTER_FILE]) for each in patches])
    return replace(job_for(base, slice_, num_records), base=name)


def train(
    base: BaseFiles,
    job: SliceJob,
    patches: list[Files],
    records: list[StoredRecord] = RECORDS,
    parent: Files | None = None,
) -> Files:
    from sisa.lm.train.trainer import LoraTrainer

    trainer = LoraTrainer(base, 1, patches)
    return trainer.train(job, parent, records, lambda *_: None)


def test_training_over_patches_is_deterministic_and_another_training(
    base: BaseFiles, patches: list[Files]
) -> None:
    plain = names(train(base, job_for(base, 0), []))
    first = names(train(base, job_over(base, patches), patches))
    assert names(train(base, job_over(base, patches), patches)) == first
    assert first[ADAPTER_FILE] != plain[ADAPTER_FILE]
    assert names(train(base, job_for(base, 0), [])) == plain
    staged = train(base, job_over(base, patches, 0, 5), patches, RECORDS[:5])
    second = train(base, job_over(base, patches, 1), patches, RECORDS, staged)
    assert names(second) != first


def test_a_job_is_trained_over_its_own_patches_alone(base: BaseFiles, patches: list[Files]) -> None:
    wrong = [
        (job_for(base, 0), patches),
        (job_over(base, patches), []),
        (job_over(base, patches), patches[::-1]),
        (job_over(base, patches), patches[:1]),
    ]
    for job, under in wrong:
        with pytest.raises(IntegrityError, match="another base"):
            train(base, job, under)


# --- as one adapter ------------------------------------------------------------------------------


@QUIET
def test_patches_and_an_adapter_are_one_adapter_on_the_plain_base(
    base: BaseFiles, patches: list[Files], tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.low_rank import merge_adapters

    shard = random_patch(base.directory, 7, "q_proj", "o_proj", rank=3)
    whole = merge_adapters(patches, [shard])
    assert whole == merge_adapters(patches, [shard])
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    plain = AutoModelForCausalLM.from_pretrained(base.directory, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path).eval()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4 + 2 + 3, 4 + 2 + 3)
    assert {each.split(".")[-1] for each in config.target_modules} == {
        "q_proj",
        "v_proj",
        "o_proj",
        "down_proj",
    }
    expected = answerer(base, {0: shard}, patches)
    rows = torch.tensor([IDS])
    with torch.inference_mode():
        found = model(input_ids=rows).logits.log_softmax(-1)
    torch.testing.assert_close(
        found,
        expected.logprobs([all_of((0,))] * len(rows), input_ids=rows, use_cache=False),
        rtol=1e-4,
        atol=1e-4,
    )
    assert not torch.allclose(
        found, expected.logprobs([all_of(())] * len(rows), input_ids=rows, use_cache=False), atol=1e-2
    )
