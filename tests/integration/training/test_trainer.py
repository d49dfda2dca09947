"""The real trainer on a tiny base: the right gradients, and files as peft has them.

That every way to a stage gives the same bytes is in `property/test_stages.py`, and that peft loads what
was trained, with the same logits, in `integration/answering/test_export_generate.py`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sisa.core.checkpoint_files import CHECKPOINT_FILES, MANIFEST_FILE
from sisa.core.digest import file_sha256
from sisa.core.domain import BaseFiles, Part, Record, SliceJob
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.core.ports import StoredRecord, Tick
from sisa.lm.base.weights import resolve_base
from sisa.lm.routing.route import all_of
from tests.models.stages import RECORDS, TRAINING, job_for, names, train
from tests.models.tiny_base import make_tiny_base, make_tiny_embedder
from tests.models.tiny_model import next_token_probabilities

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    return resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"))))


def test_a_base_is_checked_once_by_all_processes(
    base: BaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.train import trainable
    from sisa.lm.train.frozen_layers import FrozenLayers

    job = job_for(base, lora_layers="top:1", lora_target_modules="all-linear")
    first = train(base, job)
    monkeypatch.delattr(trainable, "loss_form")
    monkeypatch.delattr(FrozenLayers, "check")
    assert names(train(base, job)) == names(first)
    with pytest.raises(NameError):
        train(base, replace(job, training={**job.training, "sequence_len": 63}))


def test_layers_of_a_base_whose_frequencies_follow_the_longest_text_are_not_run_apart(
    tmp_path: Path,
) -> None:
    """Hidden states would depend on the records before."""
    grows = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    made = make_tiny_base(tmp_path, max_position_embeddings=20, rope_parameters=grows)
    base = resolve_base(str(made))
    with pytest.raises(InvalidInput, match="can't be run apart"):
        train(base, job_for(base, lora_layers="top:1"))
    train(base, job_for(base, lora_layers="top:1", sequence_len=20, overlength="truncate"))


def test_files_and_first_weights_are_as_peft_has_them(base: BaseFiles) -> None:
    import torch
    from peft.utils import get_peft_model_state_dict

    from sisa.lm.base.weights import load_base
    from sisa.lm.train.trainable import Trainable, file_name

    model, _ = load_base(base)
    wrapped = Trainable(model, {**TRAINING, "lora_target_modules": "all-linear"})
    own = wrapped.begin(None, init_seed=3)
    ours = {file_name(name): each for name, each in own.trained.items()}
    theirs = get_peft_model_state_dict(own.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(each, theirs[name]) for name, each in ours.items())
    for name, each in ours.items():
        within = each.shape[1] ** -0.5 if "lora_A" in name else 0.0
        assert within * 0.9 <= each.abs().max() <= within


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"lora_dropout": 0.0}, {"learning_rate": 2e-2}, {"shard": 1}]
)
def test_what_the_job_says_reaches_the_bits(base: BaseFiles, change: dict[str, Any]) -> None:
    name = "adapter_model.safetensors"
    assert train(base, job_for(base, **change))[name] != train(base, job_for(base))[name]


def test_the_base_is_left_as_it_was(base: BaseFiles) -> None:
    from sisa.lm.base.weights import load_base

    weights = base.directory / "model.safetensors"
    on_disk = file_sha256(weights)
    model, _ = load_base(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(base, job_for(base, lora_target_modules="all-linear"))
    again, _ = load_base(base)
    assert again.state_dict().keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in again.state_dict().items())
    assert file_sha256(weights) == on_disk


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_loss_and_gradient_agree_with_plain_transformers(
    base: BaseFiles, plain_head: bool, packed: bool
) -> None:
    """Ours: no mask, chosen pairs, a backward of our own. Theirs: `labels=`, a mask, row by row."""
    import torch

    from sisa.lm.base.adapter import attach, lora_config
    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_base
    from sisa.lm.train.lora_linear import use_fused_linear
    from sisa.lm.train.losses import Form, count_labels, loss_form, summed_losses

    records = [RECORDS[0].record, Record("t", None, "text", (Part("text", "A longer text, whole."),))]
    training = {**TRAINING, "lora_dropout": 0.0}
    gradients = []
    losses = []
    for plain in (False, True):
        model, tokenizer = load_base(base)
        assert loss_form(model, longest=64) == Form(plain_head=True, packed=True)
        peft = attach(model, lora_config(training, model), None, init_seed=1)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(5))
        batch = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
        total = count_labels(batch)
        if not plain:
            use_fused_linear(peft)
        form = Form(plain_head, packed)
        ours = plain_loss(peft, batch) if plain else summed_losses(peft, [batch], form)[0]
        loss = ours / total
        loss.backward()
        losses.append(loss.item())
        gradients.append([each.grad for each in peft.parameters() if each.requires_grad])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def plain_loss(model: Any, batch: Sequence[Any]) -> Any:
    import torch

    length = max(len(each.input_ids) for each in batch)
    total: Any = 0.0
    for each in batch:
        rest = length - len(each.input_ids)
        loss = model(
            input_ids=torch.tensor([each.input_ids + [0] * rest]),
            attention_mask=torch.tensor([[1] * len(each.input_ids) + [0] * rest]),
            labels=torch.tensor([each.labels + [-100] * rest]),
        ).loss
        total = total + loss * sum(label != -100 for label in each.labels[1:])
    return total


def test_a_chain_trains_as_one_uninterrupted_loop(base: BaseFiles) -> None:
    """Moments and the count of steps continue from the parent stage; the schedule restarts."""
    import torch

    from sisa.lm.base.low_rank import read_tensors

    changed: dict[str, Any] = {"lora_dropout": 0.0, "learning_rate": 1e-3}
    stages = [(job_for(base, 0, 5, **changed), RECORDS[:5]), (job_for(base, 1, **changed), RECORDS)]
    first = train(base, stages[0][0], None, RECORDS[:5])
    second = train(base, stages[1][0], first)
    plain, optimizer = plain_loop(base, stages)
    start, ours = (read_tensors(each, "adapter_model.safetensors") for each in (first, second))
    moments = read_tensors(second, "optimizer.safetensors")
    for name, theirs in plain.items():
        state = optimizer.state[theirs]
        learnt = (theirs - start[name]).norm()
        assert (ours[name] - theirs).norm() < 0.01 * learnt
        assert moments[f"{name}.step"] == state["step"] == 3 + 5
        for each in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(moments[f"{name}.{each}"], state[each], rtol=1e-2, atol=1e-7)


def plain_loop(base: BaseFiles, stages: Sequence[tuple[SliceJob, Sequence[StoredRecord]]]) -> Any:
    """Train one model with one optimizer through all stages, without any file in between."""
    import torch
    from transformers import get_scheduler

    from sisa.lm.base.adapter import attach, lora_config
    from sisa.lm.base.numerics import seed_from
    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_base
    from sisa.lm.train.steps import stage_steps
    from sisa.lm.train.trainable import file_name

    model, tokenizer = load_base(base)
    own = stages[0][0].training
    peft = attach(model, lora_config(own, model), None, seed_from(own["seed"], 0, "init"))
    trained = {file_name(name): each for name, each in peft.named_parameters() if each.requires_grad}
    rate = own["learning_rate"]
    optimizer = torch.optim.AdamW(trained.values(), rate, weight_decay=own["weight_decay"])
    for job, records in stages:
        rows = [tokenize(each.record, tokenizer, train_on_inputs=False) for each in records]
        sizes = [len(each.input_ids) for each in rows]
        digests = [each.id_digest for each in records]
        steps = stage_steps(job, digests, sizes)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["initial_lr"] = rate
        warm = -(-3 * len(steps) // 10)
        scheduler = get_scheduler(own["lr_scheduler"], optimizer, warm, len(steps))
        for step in steps:
            optimizer.zero_grad()
            batch = [rows[at] for part in step for at in part]
            num_labels = sum(label != -100 for each in batch for label in each.labels[1:])
            (plain_loss(peft, batch) / num_labels).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), own["max_grad_norm"])
            optimizer.step()
            scheduler.step()
    return trained, optimizer


def test_accumulation_equals_one_large_batch(base: BaseFiles) -> None:
    import torch
    from safetensors.torch import load

    same: dict[str, Any] = {"lora_dropout": 0.0, "optimizer": "sgd"}
    small = train(base, job_for(base, **same, micro_batch_size=1, gradient_accumulation_steps=64))
    large = train(base, job_for(base, **same, micro_batch_size=64, gradient_accumulation_steps=2))
    ours, theirs = (load(files["adapter_model.safetensors"]) for files in (small, large))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in ours)


def test_prompt_tokens_get_no_loss(base: BaseFiles) -> None:
    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_tokenizer

    tokenizer = load_tokenizer(base.directory)
    chat = Record(
        "c",
        None,
        "chat",
        (
            Part("user", "Hi <|im_end|>"),
            Part("assistant", "Yes."),
            Part("user", "So?"),
            Part("assistant", "No."),
        ),
    )
    text = Record("t", None, "text", (Part("text", "All of it"),))
    learned = []
    for record in (RECORDS[1].record, chat, text):
        tokens = tokenize(record, tokenizer, train_on_inputs=False)
        pairs = zip(tokens.input_ids, tokens.labels, strict=True)
        assert all(label in (-100, token) for token, label in pairs)
        learned.append(tokenizer.decode([label for label in tokens.labels if label != -100]))
        assert tokens.input_ids.count(tokenizer.eos_token_id) == {"chat": 4}.get(record.kind, 1)
    assert learned == [
        " Ada the 77.<|im_end|>",
        "Yes.<|im_end|>No.<|im_end|>",
        "All of it<|im_end|>",
    ]
    assert -100 not in tokenize(chat, tokenizer, train_on_inputs=True).labels


def test_overlong_records_are_all_named_or_cut(base: BaseFiles) -> None:
    from sisa.lm.base.tokens import tokenize_all
    from sisa.lm.base.weights import load_tokenizer

    records = [each.record for each in RECORDS[:3]]
    tokens = functools.partial(
        tokenize_all,
        records,
        load_tokenizer(base.directory),
        train_on_inputs=False,
        positions=["line 1", "line 2", "line 3"],
    )
    with pytest.raises(InvalidInput) as caught:
        tokens(sequence_len=21, overlength="refuse")
    assert [problem.where for problem in caught.value.problems] == ["line 2", "line 3"]
    assert "Ada" not in str(caught.value)
    assert [len(each.input_ids) for each in tokens(sequence_len=21, overlength="truncate")] == [21] * 3
    with pytest.raises(InvalidInput, match="3 records"):
        tokens(sequence_len=9, overlength="truncate")


def test_refusals_are_typed(base: BaseFiles) -> None:
    with pytest.raises(InvalidInput, match="no such modules") as caught:
        train(base, job_for(base, lora_target_modules=["q_proj", "query"]))
    assert "k_proj" in caught.value.expected
    assert caught.value.got == "query"
    with pytest.raises(InvalidInput, match="not a finite number"):
        train(base, job_for(base, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=1e9))
    with pytest.raises(IntegrityError, match="another base"):
        train(BaseFiles(base.directory, "f" * 64), job_for(base))
    other = SliceJob(0, 0, None, (), 9, (1, 1), TRAINING, "f" * 64, "fp")
    with pytest.raises(IntegrityError, match="not the one that was recorded"):
        train(BaseFiles(base.directory, "f" * 64), other)
    with pytest.raises(IntegrityError, match="do not fit"):
        train(base, job_for(base, 1, lora_r=2), train(base, job_for(base)))
    with pytest.raises(IntegrityError, match="can't be read"):
        train(base, job_for(base, 1), {"adapter_model.safetensors": b"half"})


def test_progress_counts_every_presented_token(base: BaseFiles) -> None:
    seen: list[Tick] = []
    train(base, job_for(base), progress=seen.append)
    assert (seen[0].tokens, seen[0].step) == (0, 0)
    assert [each.step for each in seen] == list(range(seen[-1].num_steps + 1))
    # One pass and a half over 9 records, in steps of 4; a pass ends its last step.
    ends = [each for each in seen if each.loss is not None]
    assert [(each.epoch, each.step, each.num_records) for each in ends] == [(1, 3, 9), (2, 5, 5)]
    assert all(each.loss and each.loss > 0 for each in ends)


def test_written_files_name_no_place_and_are_canonical(base: BaseFiles) -> None:
    files = train(base, job_for(base))
    assert {*files, MANIFEST_FILE} == set(
        CHECKPOINT_FILES
    )  # an object store lends places for these alone
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] is None
    assert config["inference_mode"] is True
    assert config["target_modules"] == ["q_proj", "v_proj"]
    state = json.loads(files["trainer_state.json"])
    assert state["job"] == job_for(base).key
    assert state["steps"] == 5
    for data in files.values():
        assert str(base.directory).encode() not in data


def test_answers_are_the_mean_of_probabilities(base: BaseFiles) -> None:
    import torch

    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.base.tokens import encode_prompt

    adapters = {shard: train(base, job_for(base, shard=shard)) for shard in (0, 4)}
    answerer = Answerer(base, adapters, threads=1)
    ids = encode_prompt("Who is 3?", answerer.tokenizer, "completion")
    apart = [next_token_probabilities(answerer, ids, all_of([shard])) for shard in (0, 4)]
    both = next_token_probabilities(answerer, ids, all_of([0, 4]))
    assert torch.allclose(both, (apart[0] + apart[1]) / 2, atol=1e-7)
    assert not torch.allclose(apart[0], apart[1], atol=1e-5)

    assert answerer.generate([], [], 6) == []
    first = answerer.answer_probability(ids, [int(both.argmax())], all_of([0, 4]))
    assert first == pytest.approx(float(both.max()), abs=1e-6)
    with pytest.raises(InvalidInput, match="no model is loaded"):
        answerer.generate([ids], [all_of([1])], 1)


def test_an_embedder_runs_at_fixed_shapes(tmp_path: Path) -> None:
    """A text's bucket comes from its own length: another shape may round otherwise elsewhere."""
    from sisa.lm.routing.embedder import PADDED_LENGTHS, ROWS, resolve_embedder

    embedder: Any = resolve_embedder(str(make_tiny_embedder(tmp_path)))
    model, tokenizer = embedder._loaded
    shapes = []
    model.register_forward_pre_hook(
        lambda _model, _args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    texts = ["a" * length for length in (1, 20, 31, 33, 70, 250, 900)]
    embedder.embed(texts)
    lengths = [min(len(tokenizer(text).input_ids), PADDED_LENGTHS[-1]) for text in texts]
    buckets = {min(each for each in PADDED_LENGTHS if each >= length) for length in lengths}
    assert shapes == [(ROWS, each) for each in PADDED_LENGTHS if each in buckets]


def test_states_do_not_depend_on_what_was_kept_before(base: BaseFiles) -> None:
    import torch

    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_base
    from sisa.lm.train.frozen_layers import FrozenLayers, HiddenStateCache

    model, tokenizer = load_base(base)
    lower = FrozenLayers(model, 1)
    rows = [tokenize(each.record, tokenizer, train_on_inputs=False).input_ids for each in RECORDS]
    near = [[*each, 5, 6] for each in rows] + [each[:-1] for each in rows]  # of common beginnings
    plain = [FrozenLayers(load_base(base)[0], 1).alone(each) for each in rows]
    for room in (0, 30_000, 1 << 30):
        for past in (near, [*near, *reversed(rows)]):
            hidden_states = HiddenStateCache(room)
            for each in past:
                hidden_states.states(lower, each)
            found = [hidden_states.states(lower, each) for each in rows]
            assert all(map(torch.equal, found, plain))


TOP: dict[str, Any] = {"lora_layers": "top:1", "lora_target_modules": "all-linear"}


def test_adapters_of_the_top_layers_train_as_peft_would(base: BaseFiles) -> None:
    """The same gradient with the lower layers run within the batch, and in one go with all others."""
    import torch

    from sisa.lm.base.adapter import attach, lora_config
    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_base
    from sisa.lm.train.frozen_layers import FrozenLayers, HiddenStateCache
    from sisa.lm.train.losses import Form, summed_losses

    model, tokenizer = load_base(base)
    peft = attach(model, lora_config({**TRAINING, **TOP, "lora_dropout": 0.0}, model), None, init_seed=1)
    names = [name for name, each in peft.named_parameters() if each.requires_grad]
    assert len(names) == 14
    assert all(".layers.1." in name for name in names)
    trained = [each for each in peft.parameters() if each.requires_grad]
    batch = [tokenize(each.record, tokenizer, train_on_inputs=False) for each in RECORDS[2:5]]
    whole = torch.autograd.grad(summed_losses(peft, [batch], Form())[0], trained)
    lower = FrozenLayers(peft.get_base_model(), 1)
    lower.check(128)
    for packed in (True, False):
        states = [HiddenStateCache().states(lower, each.input_ids) for each in batch]
        with lower.skipped(states, packed=packed):
            loss = summed_losses(peft, [batch], Form(packed=packed))[0]
        for ours, theirs in zip(torch.autograd.grad(loss, trained), whole, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


def test_adapters_of_the_top_layers_name_them(base: BaseFiles) -> None:
    state = json.loads(train(base, job_for(base, **TOP))["adapter_config.json"])
    assert (state["layers_to_transform"], state["layers_pattern"]) == ([1], "layers")


def test_more_layers_than_the_base_has_are_refused(base: BaseFiles) -> None:
    with pytest.raises(InvalidInput, match="fewer layers") as caught:
        train(base, job_for(base, lora_layers="top:3"))
    assert (caught.value.where, caught.value.expected) == ("lora_layers", "all, or at most top:2")
