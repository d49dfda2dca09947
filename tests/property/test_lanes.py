"""Chains that train side by side have the bytes of training alone, whatever trains beside them.

Each example is a set of shards with slices of several sizes, trained over a tiny base one after another
and then in lanes, which are refilled as chains end; some runs are interrupted and start again on what
they stored. Records are short and long, so that some passes and some label tokens are too few to be
joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.domain import BaseFiles, Chain, Part, Precision, Record
from sisa.core.events import Event, Notice, SliceProgress
from sisa.core.ports import StoredRecord
from sisa.flows.chains import SerialExecutor
from sisa.lm.base.weights import resolve_base
from sisa.planning.plan import LAYERWISE, Recipe, jobs
from tests.crash import Crash
from tests.examples import num_examples
from tests.fakes.ports import FakeCheckpoints, FakeRecords
from tests.models.tiny_base import make_tiny_base

pytestmark = pytest.mark.torch

TRAINING: dict[str, Any] = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_modules": "all-linear",
    "sequence_len": 128,
    "overlength": "refuse",
    "learning_rate": 1e-2,
    "warmup_ratio": 0.3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "train_on_inputs": False,
    "seed": 3,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseFiles:
    found = resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"))))
    refusal = trainer_on(found).refuse_lanes({**TRAINING, "lora_dropout": 0.1})
    if refusal is not None:
        pytest.skip(f"no lanes on this machine: {refusal}")
    return found


def trainer_on(base: BaseFiles) -> Any:
    from sisa.lm.train.trainer import LoraTrainer

    return LoraTrainer(base, threads=1)


@dataclass
class Case:
    sizes: list[list[int]]  # records of each slice of each shard
    lanes: int
    schedule: Any
    broken_off: int | None  # after so many events
    training: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    training = {
        **TRAINING,
        "lora_dropout": draw(st.sampled_from([0.1, 0.0])),
        "micro_batch_size": draw(st.sampled_from([1, 2])),
        "gradient_accumulation_steps": draw(st.sampled_from([1, 2])),
        "optimizer": draw(st.sampled_from(["adamw_torch", "sgd"])),
        "lr_scheduler": draw(st.sampled_from(["linear", "cosine"])),
        **draw(st.sampled_from([{}, {"lora_layers": "top:1"}, {LAYERWISE: 2}])),
    }
    slices = st.lists(st.integers(1, 4), min_size=2, max_size=2)
    return Case(
        draw(st.lists(slices, min_size=2, max_size=5)),
        draw(st.integers(2, 4)),
        draw(st.sampled_from(["cumulative", "sequential"])),
        draw(st.none() | st.integers(1, 30)),
        training,
    )


def record(shard: int, slice_: int, number: int) -> StoredRecord:
    name = hashlib.sha256(f"{shard}.{slice_}.{number}".encode()).hexdigest()
    answer = " Ada" * (1 + int(name[:2], 16) % 9)
    parts = (Part("prompt", "Who?" * (int(name[2], 16) % 3)), Part("completion", answer))
    return StoredRecord(name, Record(f"r{name[:9]}", None, "completion", parts))


def chains_of(case: Case, base: BaseFiles, records: FakeRecords) -> Iterator[Chain]:
    recipe = Recipe(2, case.schedule, 2, case.training, base.digest)
    for shard, sizes in enumerate(case.sizes):
        files = tuple(
            records.write(shard, at, f"{shard}.{at}", [record(shard, at, n) for n in range(size)])
            for at, size in enumerate(sizes)
        )
        yield Chain(shard, jobs(shard, files, recipe, "f"), None, files)


@settings(max_examples=num_examples(40, 8))
@given(cases())
def test_lanes_reach_no_bit(base: BaseFiles, case: Case) -> None:
    records, alone, beside = FakeRecords(), FakeCheckpoints(), FakeCheckpoints()
    chains = [*chains_of(case, base, records)]
    SerialExecutor(trainer_on(base), records, alone).run(chains, lambda _: None)
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        if len(events) == case.broken_off:
            raise Crash

    for _ in range(2):
        try:
            SerialExecutor(trainer_on(base), records, beside, case.lanes).run(chains, report)
            break
        except Crash:
            continue
    assert beside.stored == alone.stored
    assert not [each for each in events if isinstance(each, Notice)]


def test_lanes_are_refilled_and_their_micro_batches_joined(
    base: BaseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.train import lanes

    together: list[int] = []
    inner = lanes._compute

    def counted(group: Any) -> None:
        together.append(len(group))
        inner(group)

    training = {**TRAINING, "lora_dropout": 0.1, "micro_batch_size": 1, "lr_scheduler": "linear"}
    training |= {"gradient_accumulation_steps": 1, "optimizer": "sgd"}
    case = Case([[4, 4]] * 5, 3, "cumulative", None, training)
    records, events = FakeRecords(), list[Event]()
    chains = [*chains_of(case, base, records)]
    trainer = trainer_on(base)
    assert trainer.refuse_lanes(training) is None
    monkeypatch.setattr(lanes, "_compute", counted)
    SerialExecutor(trainer, records, FakeCheckpoints(), 3).run(chains, events.append)
    assert max(together) == 3
    assert sum(together) == sum(chain.record_epochs for chain in chains)
    first = [each.shard for each in events if isinstance(each, SliceProgress) and each.step == 0]
    assert first[:3] == [0, 1, 2]
    assert {*first} == {0, 1, 2, 3, 4}


# --- the self-test --------------------------------------------------------------------------------


def wrapped_on(directory: Path, longest: int = 128, **changed: Any) -> Any:
    from sisa.lm.base.weights import load_base
    from sisa.lm.train.trainable import Trainable

    found = resolve_base(str(make_tiny_base(directory, **changed)))
    model, _ = load_base(found)
    return Trainable(model, {**TRAINING, "lora_dropout": 0.1, "sequence_len": longest})


def test_a_kernel_that_mixes_rows_is_caught(base: BaseFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from sisa.lm.base.weights import load_base
    from sisa.lm.train.lane_trial import refuse_lanes
    from sisa.lm.train.trainable import Trainable

    model, _ = load_base(base)
    wrapped = Trainable(model, {**TRAINING, "lora_dropout": 0.1})
    assert refuse_lanes(wrapped, 128) is None

    plain, norm = torch.nn.functional.linear, LlamaRMSNorm.forward

    def linear(x: Any, weight: Any, bias: Any = None) -> Any:
        y = plain(x, weight, bias)
        return y + 1e-7 * y.sum() if len(x) > 100 else y

    def mixed(self: Any, x: Any) -> Any:
        return norm(self, x) + 1e-6 * x.mean()

    with monkeypatch.context() as planted:
        planted.setattr(torch.nn.functional, "linear", linear)
        assert "matrix products" in str(refuse_lanes(wrapped, 128))
    with monkeypatch.context() as planted:
        planted.setattr(LlamaRMSNorm, "forward", mixed)
        assert refuse_lanes(wrapped, 128) is not None
    assert wrapped.row_tests is None


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"attention_dropout": 0.1}, "losses or gradients"),
        (
            {
                "max_position_embeddings": 20,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
            "positions",
        ),
    ],
)
def test_a_base_whose_records_affect_each_other_is_refused(
    tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    from sisa.lm.train.lane_trial import refuse_lanes

    wrapped = wrapped_on(tmp_path, **config)
    assert why in str(refuse_lanes(wrapped, 128))
    assert wrapped.row_tests is None


def test_stages_at_the_default_bases_widths() -> None:
    """Lanes of few and many rows; 512 rows are the most that are computed together."""
    from sisa.core.domain import SliceJob
    from sisa.lm.base.numerics import pin_threads
    from sisa.lm.base.tokens import NO_LOSS, Tokens
    from sisa.lm.train import lane_trial, lanes, self_test
    from sisa.lm.train.stage import Stage
    from sisa.lm.train.trainable import Trainable

    pin_threads(1)
    wrapped = Trainable(self_test.random_base(Precision()), self_test.TRAINING)
    if lane_trial.refuse_lanes(wrapped, 64) is not None:
        pytest.skip("no lanes on this machine")
    import torch

    drawn = torch.Generator().manual_seed(5)
    batches = []
    for length in (30, 200, 17, 3, 300, 64, 5):
        ids = torch.randint(2048, (length,), generator=drawn).tolist()
        batches.append([Tokens(ids, [NO_LOSS, *ids[1:]])])

    def trained(together: bool) -> list[dict[str, bytes]]:
        stages = [
            Stage(
                SliceJob(n, 0, None, ((0, ""),), 1, (1, 1), self_test.TRAINING, "", ""), wrapped, None, 2
            )
            for n in range(len(batches))
        ]
        for _ in range(2):
            steps = [stage.step([batch]) for stage, batch in zip(stages, batches, strict=True)]
            if together:
                lanes.compute([next(step) for step in steps])
            for step in steps:
                lanes.finish(step)
        return [stage.files() for stage in stages]

    assert trained(together=True) == trained(together=False)
