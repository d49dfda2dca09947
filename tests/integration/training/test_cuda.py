"""Training and answering on a CUDA device: the device of tensors, the settings, and a real run.

Without a GPU the same code runs on torch's `meta` device, which has shapes and no numbers. Every
operation is checked there: one that mixes the device with the CPU would fail on a GPU, and fails here.
With a GPU the training step repeats, stages continue, and models are forgotten from and asked.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sisa.core.domain import BaseFiles, Precision, SliceJob
from sisa.lm.base import cuda_device
from sisa.lm.base.weights import resolve_base
from sisa.lm.routing.route import Route, all_of
from sisa.lm.train import self_test
from tests.models.stages import RECORDS, job_for, names
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    all_files,
    change_run,
    command,
    held_files,
    ids_of,
    of_people,
    residue,
    train_scratch,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

GPU, GPU_HALF = Precision("cuda"), Precision("cuda", "bfloat16")
LOOKS = {"_local_scalar_dense", "item", "is_nonzero"}
COPIES = {"to", "_to_copy", "copy_"}
ON_GPU = [pytest.param(each, id=each.dtype) for each in (GPU, GPU_HALF)]


@pytest.fixture(scope="module")
def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def _gpu(_has_gpu: bool) -> None:
    if not _has_gpu:
        pytest.skip("no CUDA device")


@pytest.fixture
def _no_gpu(_has_gpu: bool) -> None:
    if _has_gpu:
        pytest.skip("a CUDA device")


# --- where tensors lie ----------------------------------------------------------------------------


def watched(carry_out: Callable[[], Any]) -> dict[str, int]:
    """Carry something out whose model is on the `meta` device; how often each operation ran there.

    Raises AssertionError for an operation that has tensors of both devices. Copies may, and so may
    numbers (tensors without dimensions, as AdamW's count of steps). One that is looked at is 0.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    ran: dict[str, int] = {}

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            return False  # which saves importing it

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in LOOKS and args[0].device.type == "meta":
                return args[0].dtype == torch.bool or 0  # of conditions, true
            out = func(*args, **(kwargs or {}))
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            places = {each.device.type for each in tensors if each.dim()}
            assert len(places) < 2 or name in COPIES, f"{name} has tensors on {sorted(places)}"
            if "meta" in places:
                ran[name] = ran.get(name, 0) + 1
            return out

    watch: Any = Watch
    with watch():
        carry_out()
    return ran


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_stays_on_the_bases_device(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from sisa.lm.base.tokens import NO_LOSS, Tokens
    from sisa.lm.train.lanes import finish
    from sisa.lm.train.losses import Form
    from sisa.lm.train.stage import Stage
    from sisa.lm.train.trainable import Trainable

    bases = [self_test.random_base(Precision("cpu", dtype)).to("meta") for _ in range(2)]
    monkeypatch.setattr("sisa.lm.train.trainable.loss_form", lambda *_: Form())
    wrapped = [Trainable(each, self_test.TRAINING) for each in bases]
    rows = [Tokens([*range(1, n)], [NO_LOSS, *range(2, n)]) for n in (6, 9, 4)]
    job = SliceJob(0, 0, None, ((0, ""),), 3, (1, 1), self_test.TRAINING, "", "")
    stage = Stage(job, wrapped[0], None, num_steps=2)

    def steps() -> None:
        for _ in range(2):
            finish(stage.step([rows[:2], rows[2:]]))

    ran = watched(steps)
    assert min(ran[each] for each in ("mm", "bernoulli_", "_log_softmax", "addcdiv_")) > 1
    assert {each.dtype for each in stage._own.trained.values()} == {torch.float32}
    moments = stage._moments()
    for name, each in moments.items():
        on = "cpu" if name.endswith(".step") else "meta"
        assert (each.device.type, each.dtype) == (on, torch.float32)
    resumed = Stage(job, wrapped[1], None, num_steps=2)
    resumed._put_moments({name: torch.zeros(each.shape) for name, each in moments.items()})
    again = resumed._moments()
    assert {name: again[name].device for name in moments} == {
        name: each.device for name, each in moments.items()
    }


def test_what_stays_behind_is_noticed() -> None:
    import torch

    weight = torch.zeros(4, 3, device="meta")
    left = torch.zeros(2, dtype=torch.long)
    with pytest.raises((AssertionError, RuntimeError), match="meta"):
        watched(lambda: torch.nn.functional.embedding(left, weight))
    with pytest.raises((AssertionError, RuntimeError), match="meta"):
        watched(lambda: weight[left])


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseFiles:
    return resolve_base(str(tiny_base))


@pytest.fixture(scope="module")
def files(base: BaseFiles) -> dict[str, bytes]:
    from sisa.lm.train.trainer import LoraTrainer

    trainer = LoraTrainer(base, 1)
    return trainer.train(job_for(base), None, RECORDS, lambda *_: None)


def on_meta(
    base: BaseFiles,
    adapters: dict[int, dict[str, bytes]],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Return an answerer whose base is on the `meta` device."""
    from sisa.lm.answer import answerer as answering
    from sisa.lm.base.weights import load_patched

    def loaded(*of: Any) -> Any:
        model, tokenizer = load_patched(*of)
        return model.to("meta"), tokenizer

    monkeypatch.setattr(answering, "load_patched", loaded)
    return answering.Answerer(base, adapters, 1, method=method)


@pytest.mark.parametrize("method", ["routed", "mean_logit", "vote", "merged"])
def test_answers_stay_on_the_bases_device(
    method: str, base: BaseFiles, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    asked = on_meta(base, {0: files, 1: files}, method, monkeypatch)
    routes, ids = [all_of((0, 1)), Route()], torch.tensor([[5, 6, 7], [8, 9, 10]])
    ran = watched(lambda: asked.logprobs(routes, input_ids=ids, attention_mask=torch.ones_like(ids)))
    assert ran["linear"] > 10
    again = watched(lambda: asked.generate([[5, 6], [7, 8, 9]], routes, 3))
    assert again["argmax"] >= 4
    assert again["linear"] > 10


@pytest.mark.parametrize("method", ["mean_prob", "mean_logit", "vote", "merged"])
def test_a_running_batch_stays_on_the_bases_device(
    method: str, base: BaseFiles, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the choice of tokens, which is made on the CPU."""
    from sisa.lm.answer.answer_text import Token
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    def chosen(batch: Any, logits_PV: Any, requests: Any) -> list[Any]:
        logs_QV = batch._combined(logits_PV, requests)
        assert (logs_QV.device.type, len(logs_QV)) == ("meta", len(requests))
        return [(each, Token(0, 0.0)) for each in requests]

    def answer() -> None:
        for key, (length, route) in enumerate([(3, all_of((0, 1))), (1, Route()), (4, all_of((0, 1)))]):
            batch.admit([5, 6, 7], route, Sampling(max_new_tokens=length), key)
            batch.step()
        while batch.running or batch.waiting:
            batch.step()

    monkeypatch.setattr(ContinuousBatching, "_chosen", chosen)
    asked = on_meta(base, {0: files, 1: files}, method, monkeypatch)
    asked.ends = frozenset()
    batch = ContinuousBatching(asked)
    assert watched(answer)["linear"] > 10


# --- what is set ----------------------------------------------------------------------------------


def test_kernels_are_set_to_repeat_and_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torch.backends import cuda as backend

    from sisa.lm.base.numerics import pin_threads

    def attention() -> tuple[bool, ...]:
        kinds: Any = (
            backend.math_sdp_enabled,
            backend.flash_sdp_enabled,
            backend.mem_efficient_sdp_enabled,
        )
        return tuple(each() for each in (*kinds, backend.cudnn_sdp_enabled))

    monkeypatch.setenv(cuda_device.WORKSPACE, ":4096:8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        pin_threads(1, GPU)
        assert attention() == (True, False, False, False)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.allow_tf32
        assert not backend.matmul.allow_tf32
        assert not backend.matmul.allow_bf16_reduced_precision_reduction
    finally:
        pin_threads(1)
    assert attention() == (True, True, True, True)


# --- without one ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_no_gpu")
def test_the_self_test_says_that_there_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--dtype", "bfloat16")):
        done = command(capsys, "doctor", "--numerics", "--device", "cuda", *more)
        assert (done.code, done.error["type"]) == (6, "EnvironmentFault")
        assert "sees none" in done.error["message"]
    assert cuda_device.describe_device() is None


@pytest.mark.usefixtures("_no_gpu")
def test_a_training_that_asks_for_one_ends_before_it_writes(
    base: BaseFiles, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, base.directory, device="cuda")
    for executor in ("serial", "ray"):
        done = command(capsys, "train", path, "--executor", executor)
        assert (done.code, done.error["where"]) == (6, "device: cuda")
    assert not (tmp_path / "model").exists()


@pytest.mark.usefixtures("_no_gpu")
def test_a_model_of_one_can_be_looked_at_but_not_asked_or_moved_to(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_run(tiny.run_file, device="cuda")
    before = all_files(tiny.directory)
    assert command(capsys, "train", tiny.run_file, "--reconfigure").code == 6
    assert all_files(tiny.directory) == before
    monkeypatch.setattr("sisa.train.require_device", lambda _: None)  # as on a machine that has one
    assert command(capsys, "train", tiny.run_file, "--reconfigure", "--executor", "serial").code == 6
    status = command(capsys, "status", "-m", tiny.directory)
    assert (status.code, len(status.json["shards"])) == (0, 3)
    assert command(capsys, "where", "-m", tiny.directory, "p001-q1").code == 0
    asked = command(capsys, "generate", "-m", tiny.directory, "--prompt", "Who is it?")
    assert (asked.code, asked.error["where"]) == (6, "device: cuda")
    gone = command(capsys, "forget", "-m", tiny.directory, "p001-q1", "--executor", "serial")
    assert (gone.code, gone.error["where"]) == (6, "device: cuda")
    (row,) = command(capsys, "where", "-m", tiny.directory, "p001-q1").json["records"]
    assert row["state"] == "deleted"
    assert not residue(tiny.directory, ["p001-q1"])
    both = command(capsys, "doctor", "--numerics", "-m", tiny.directory, "--device", "cpu")
    assert both.code == 2
    assert command(capsys, "doctor", "--numerics", "-m", tiny.directory).code == 6
    assert command(capsys, "doctor", "-m", tiny.directory, "--dtype", "bfloat16").code == 2


# --- with one -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("on", ON_GPU)
def test_this_device_repeats_itself(on: Precision, capsys: pytest.CaptureFixture[str]) -> None:
    done = command(capsys, "doctor", "--numerics", "--device", on.device, "--dtype", on.dtype)
    assert done.json["repeats"]
    description = done.json["description"]
    assert all(
        description["gpu"][each] for each in ("model", "capability", "driver", "cuda", "attention")
    )
    assert description["settings"][cuda_device.WORKSPACE] in cuda_device.REPEATING
    print(json.dumps(done.json))  # to be kept


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("on", ON_GPU)
def test_stages_go_on_there_from_their_parents_bytes(on: Precision, base: BaseFiles) -> None:
    from sisa.lm.train.trainer import LoraTrainer

    trainer = LoraTrainer(base, 1, precision=on)

    def train(job: SliceJob, parent: dict[str, bytes] | None, num_records: int) -> dict[str, bytes]:
        return trainer.train(job, parent, RECORDS[:num_records], lambda *_: None)

    first = train(job_for(base, 0, 5, **on.in_jobs()), None, 5)
    second = train(job_for(base, 1, **on.in_jobs()), first, 9)
    train(job_for(base, shard=3, **on.in_jobs()), None, 9)  # what dropout drew must not matter
    assert names(train(job_for(base, 1, **on.in_jobs()), dict(first), 9)) == names(second)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("on", ON_GPU)
def test_forgetting_there_equals_training_from_scratch(
    on: Precision, base: BaseFiles, tmp_path: Path
) -> None:
    how = {"device": on.device, "dtype": on.dtype}
    model = train_scratch(tmp_path / "one", base.directory, PEOPLE, **how)
    gone = ids_of(of_people("p001"))
    model.forget(gone)
    scratch = train_scratch(tmp_path / "other", base.directory, without(PEOPLE, gone), **how)
    assert held_files(model.directory) == held_files(scratch.directory)
    assert model.verify(replay="sample").ok
    assert model.generate(PEOPLE[2]["prompt"], max_new_tokens=4).text is not None
    answerer, _ = model.answerer()
    assert answerer.model.device.type == "cuda"
