"""A base in bfloat16: the law, resuming, the content of checkpoints, serving and exports.

The tests run on the CPU, whose bfloat16 products are as real as a GPU's, with the same settings and
people as elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import sisa
from sisa.core.domain import BaseFiles, Precision, SliceJob
from sisa.core.errors import ConfigConflict, IntegrityError, InvalidInput
from sisa.lm.base.weights import resolve_base
from sisa.lm.routing.route import all_of
from sisa.store.areas import CHECKPOINTS
from tests.models.patched import QUIET
from tests.models.stages import RECORDS, job_for
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    adapters,
    change_run,
    command,
    held_files,
    ids_of,
    next_token_probabilities,
    of_people,
    train_scratch,
    without,
)

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("bfloat16")]

HALF = Precision("cpu", "bfloat16")
ROUNDED: dict[str, Any] = {"rtol": 0.05, "atol": 1e-4}  # of probabilities whose logits have 8 bits


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("half")
    train_scratch(folder, tiny_base, PEOPLE, dtype="bfloat16")
    return folder


@pytest.fixture
def half(_trained: Path, tiny_base: Path, tmp_path: Path) -> Tiny:
    """Return a model over the base in bfloat16, for one test to change."""
    copy = Tiny(tmp_path / "half", tiny_base)
    shutil.copytree(_trained, copy.folder)
    copy.train()
    return copy


def test_forgetting_equals_training_from_scratch(half: Tiny, tiny: Tiny, tmp_path: Path) -> None:
    before = adapters(half.directory)
    gone = ids_of(of_people("p001"))
    half.open().forget(gone)
    scratch = train_scratch(tmp_path / "other", half.base, without(PEOPLE, gone), dtype="bfloat16")
    assert held_files(half.directory) == held_files(scratch.directory)
    assert set(before) != set(adapters(half.directory))
    assert not set(before) & set(adapters(tiny.directory)), "the dtype reaches the bits"
    assert half.open().verify(replay="sample", apart=False).ok


def test_what_a_checkpoint_holds_is_in_float32(half: Tiny) -> None:
    from safetensors.torch import load_file

    found: set[tuple[str, str]] = set()
    for path in (half.directory / CHECKPOINTS).rglob("*.safetensors"):
        found |= {(path.name, str(each.dtype)) for each in load_file(path).values()}
    assert found == {
        ("adapter_model.safetensors", "torch.float32"),
        ("optimizer.safetensors", "torch.float32"),
    }


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseFiles:
    return resolve_base(str(tiny_base))


def train_stage(
    base: BaseFiles, job: SliceJob, parent: Mapping[str, bytes] | None, num_records: int
) -> dict[str, bytes]:
    from sisa.lm.train.trainer import LoraTrainer

    trainer = LoraTrainer(base, 1, precision=HALF)
    return trainer.train(job, parent, RECORDS[:num_records], lambda *_: None)


def test_a_job_of_another_dtype_is_refused(base: BaseFiles) -> None:
    with pytest.raises(IntegrityError, match="another device or dtype"):
        train_stage(base, job_for(base), None, 9)


def test_the_base_is_in_bfloat16_and_its_positions_are_not(base: BaseFiles) -> None:
    import torch

    from sisa.lm.base.weights import load_base

    model, _ = load_base(base, HALF)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in model.buffers()} == {torch.float32}
    plain, _ = load_base(base)
    assert {each.dtype for each in plain.parameters()} == {torch.float32}


def probabilities(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].float().softmax(-1)


@QUIET
def test_what_is_served_and_exported_is_what_was_trained(half: Tiny) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.tokens import encode_prompt

    model = half.open()
    answerer, _ = model.answerer()
    assert next(answerer.model.parameters()).dtype == torch.bfloat16
    ids = encode_prompt(PEOPLE[0]["prompt"], answerer.tokenizer, "completion")
    alone = next_token_probabilities(answerer, ids, all_of(()))
    for shard, path in enumerate(model.export(half.folder / "export")):
        base = AutoModelForCausalLM.from_pretrained(half.base, dtype=torch.bfloat16)
        loaded = probabilities(PeftModel.from_pretrained(base, path), ids)
        served = next_token_probabilities(answerer, ids, all_of((shard,)))
        torch.testing.assert_close(served, loaded, **ROUNDED)
        assert not torch.allclose(served, alone, **ROUNDED)
        assert "trained over in bfloat16" in (path / "README.md").read_text()
    assert model.generate(PEOPLE[0]["prompt"], max_new_tokens=4).shards


@QUIET
def test_merged_forms_are_in_float32_and_say_what_is_served(half: Tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.tokens import encode_prompt
    from sisa.lm.base.weights import load_base

    change_run(half.run_file, sisa__aggregation="merged")
    half.train()
    model = half.open()
    (path,) = model.export(half.folder / "export", "merged-model")
    whole = AutoModelForCausalLM.from_pretrained(path)
    assert {each.dtype for each in whole.parameters()} == {torch.float32}
    answerer, _ = model.answerer()
    ids = encode_prompt(PEOPLE[0]["prompt"], answerer.tokenizer, "completion")
    served = next_token_probabilities(answerer, ids, all_of((0, 1, 2)))
    torch.testing.assert_close(probabilities(whole, ids), served, **ROUNDED)
    parts = model.resources.base
    held, _ = load_base(parts, HALF)
    assert {each.dtype for each in held.parameters()} == {torch.bfloat16}  # others' stay


def test_a_changed_dtype_trains_all_anew(
    tiny: Tiny, half: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    change_run(tiny.run_file, dtype="bfloat16")
    with pytest.raises(ConfigConflict) as caught:
        tiny.train()
    assert [each.where for each in caught.value.problems] == ["dtype"]
    done = command(capsys, "train", tiny.run_file, "--reconfigure", "--executor", "serial")
    assert done.json["slices_trained"] == len(adapters(half.directory))
    assert sorted(adapters(tiny.directory)) == sorted(adapters(half.directory))
    assert sisa.open_model(tiny.directory).verify().ok


def test_patches_are_refused_over_it(half: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    from sisa.lm.base.weights import load_patched

    done = command(
        capsys,
        *("approx", "unlearn", "-m", half.directory, "--forget", half.folder / "people.jsonl"),
        *("--method", "npo", "--consent", "asked", "--executor", "serial"),
    )
    assert done.code == 2
    assert ("dtype", "is bfloat16: patches are for the CPU in float32 alone") in done.problems
    base = half.open().resources.base
    with pytest.raises(InvalidInput, match="has patches"):
        load_patched(base, [{}], HALF)
