"""No bit of a stage depends on what the process did before it.

Each example is a combination of what reaches the trainer: base, adapter, layers, blocks, order of the
slices, schedule, optimizer, layout of micro-batches, kept hidden states, patches, dtype, threads. All
stages of its chain are trained in three ways, which must give the same bytes of every file:

    in one go         one trainer, stage after stage, as `sisa train` does
    stage by stage    each from its parent's files, in a process that has done nothing but imports
    late              by a trainer that trained another shard, another order and another kind of adapter,
                      interrupted a stage and answered, the last stage first

The suite tries a few combinations, `--hypothesis-profile full` many.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sisa.core.digest import sha256_hex
from sisa.core.domain import BaseFiles, Dtype, Kind, Part, Precision, Record, SliceJob, SliceState
from sisa.core.ports import StoredRecord, Tick
from sisa.planning.plan import LAYERWISE, Recipe, Schedule, jobs
from tests.crash import Crash
from tests.examples import num_examples
from tests.fakes.ports import FakeHiddenStates
from tests.models.patched import random_patch
from tests.models.tiny_base import make_tiny_base

pytestmark = [pytest.mark.torch, pytest.mark.xdist_group("stages")]

Files = dict[str, bytes]
NUM_SLICES, NUM_LAYERS = 3, 4
FULL_RUN = num_examples(2) == 2


@dataclass(frozen=True)
class Base:
    """A base and the patches to train over, as plain values that can travel to other processes."""

    files: BaseFiles
    threads: int = 1
    dtype: Dtype = "float32"
    patches: tuple[Files, ...] = ()

    def trainer(self, **kept: Any) -> Any:
        from sisa.lm.train.trainer import LoraTrainer

        on = Precision("cpu", self.dtype)
        return LoraTrainer(self.files, self.threads, self.patches, on, **kept)


# --- bases ---------------------------------------------------------------------------------------


def _config(name: str, vocab_size: int) -> Any:
    """Return a configuration of four layers.

    The kinds are: plain; with matrices transposed; with frequencies that depend on the longest text so
    far; with a window, so that rows are padded; with a head of its own.
    """
    import transformers

    size = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    wide = {"intermediate_size": 48, "num_key_value_heads": 2, **size}
    grows = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    configs: dict[str, Callable[..., Any]] = {
        "llama": lambda **more: transformers.LlamaConfig(**wide, **more),
        "gpt2": lambda **more: transformers.GPT2Config(n_positions=128, **size, **more),
        "dynamic": lambda **more: transformers.LlamaConfig(
            **wide, max_position_embeddings=24, rope_parameters=grows, **more
        ),
        "mistral": lambda **more: transformers.MistralConfig(**wide, sliding_window=16, **more),
        "granite": lambda **more: transformers.GraniteConfig(**wide, logits_scaling=4.0, **more),
    }
    return configs[name](vocab_size=vocab_size, bos_token_id=None, eos_token_id=258)


MODULES = {
    "llama": ["v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "dynamic": ["q_proj", "lm_head"],
    "mistral": ["o_proj"],
    "granite": ["gate_proj"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    import torch
    from transformers import AutoModelForCausalLM

    from sisa.lm.base.weights import base_digest, load_tokenizer

    found = {}
    for name in MODULES:
        directory = make_tiny_base(tmp_path_factory.mktemp(name))
        vocab_size = len(load_tokenizer(directory))
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(_config(name, vocab_size)).save_pretrained(directory)
        found[name] = Base(BaseFiles(directory, base_digest(directory)))
    return found


# --- records and jobs ----------------------------------------------------------------------------


def _record(number: int, slice_: int) -> StoredRecord:
    """Return a record; the records have every kind and many lengths."""
    ending = "and on " * (number % 4)
    content: tuple[Kind, tuple[Part, ...]] = (
        ("completion", (Part("prompt", f"Who is {number}?"), Part("completion", f" Ada {ending}."))),
        ("text", (Part("text", f"{ending}Number {number * 77}."),)),
        ("chat", (Part("user", f"{number}?"), Part("assistant", f"So {ending}"))),
    )[number % 3]
    name = hashlib.sha256(str(number).encode()).hexdigest()
    return StoredRecord(name, Record(f"r{number}", None, *content), slice_)


def stage_records(job: SliceJob) -> list[StoredRecord]:
    """Return four records a slice, and other ones of another shard."""
    slices = [slice_ for slice_, _ in job.slices]
    found = [_record(100 * job.shard + 10 * each + n, each) for each in slices for n in range(4)]
    return sorted(found, key=lambda each: each.id_digest)


def chain_of(case: Mapping[str, Any], base: Base, shard: int = 0) -> tuple[SliceJob, ...]:
    slices = [SliceState(shard, each, "root", 4) for each in range(NUM_SLICES)]
    schedule: Schedule = case["schedule"]
    recipe = Recipe(NUM_SLICES, schedule, 2, training_of(case), base.files.digest)
    found = jobs(shard, slices, recipe, "fp", case["order"])
    return tuple(replace(job, base=_name(base)) for job in found)


def _name(base: Base) -> str:
    from sisa.lm.base.low_rank import patched_name

    return patched_name(base.files.digest, base.patches)


def training_of(case: Mapping[str, Any]) -> dict[str, Any]:
    micro_batch_size, per_step = case["batches"]
    sequence_len, overlength = case["lengths"]
    found = {
        "lora_r": case["lora_r"],
        "lora_alpha": 8,
        "lora_dropout": case["lora_dropout"],
        "lora_target_modules": MODULES[case["base"]] if case["listed"] else "all-linear",
        "sequence_len": sequence_len,
        "overlength": overlength,
        "micro_batch_size": micro_batch_size,
        "gradient_accumulation_steps": per_step,
        "learning_rate": 1e-2,
        "optimizer": case["optimizer"],
        "lr_scheduler": case["lr_scheduler"],
        "warmup_ratio": 0.3,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "train_on_inputs": case["train_on_inputs"],
        "seed": 3,
    }
    if case["lora_layers"] != "all":
        found["lora_layers"] = case["lora_layers"]
    if case["layerwise"]:
        found[LAYERWISE] = NUM_SLICES
    if case["dtype"] != "float32":
        found["dtype"] = case["dtype"]
    return found


FEATURES: dict[str, list[Any]] = {
    "base": [*MODULES],
    "lora_r": [5, 8],
    "lora_dropout": [0.0, 0.1],
    "listed": [False, True],
    "lora_layers": ["all", "top:3"],
    "layerwise": [False, True],
    "schedule": ["cumulative", "sequential"],
    "order": [(0, 1, 2), (2, 0, 1)],
    "batches": [(1, 1), (2, 2), (4, 1)],
    "lengths": [(128, "refuse"), (40, "truncate")],
    "optimizer": ["adamw_torch", "adamw_torch", "sgd"],
    "lr_scheduler": ["linear", "cosine", "constant"],
    "train_on_inputs": [False, True],
    "patched": [False, True],
    "state_bytes": [0, 3_000, 1 << 24],
    "dtype": ["float32", "float32", "bfloat16"],
    "threads": [1, 2] if FULL_RUN else [1],  # two on a busy core spin
}


def drawn_cases(count: int) -> list[dict[str, Any]]:
    """Return combinations in which each option occurs about equally often; always the same ones."""
    draw = random.Random(1)
    columns = []
    for options in FEATURES.values():
        column = [options[n % len(options)] for n in range(count)]
        draw.shuffle(column)
        columns.append(column)
    found = [dict(zip(FEATURES, row, strict=True)) for row in zip(*columns, strict=True)]
    for case in found:
        case["patched"] &= case["dtype"] == "float32"  # patches are for float32
        if case["base"] == "dynamic":  # its hidden states are refused
            case["lora_layers"] = "all"
    return found


# --- three ways ----------------------------------------------------------------------------------


def quiet(_tick: Tick) -> None:
    pass


def in_one_go(base: Base, chain: Sequence[SliceJob]) -> list[Files]:
    trainer, found = base.trainer(), list[Files]()
    for job in chain:
        parent = found[-1] if found else None
        found.append(trainer.train(job, parent, stage_records(job), quiet))
    return found


def alone(base: Base, job: SliceJob, parent: Files | None) -> Files:
    """Train a stage as a process does that does nothing else."""
    trained: Files = base.trainer().train(job, parent, stage_records(job), quiet)
    return trained


def late(
    base: Base, chain: Sequence[SliceJob], stages: Sequence[Files], case: dict[str, Any]
) -> list[Files]:
    """Train with a trainer that has trained other stages before, the last stage first."""
    store = FakeHiddenStates()
    trainer = base.trainer(hidden_states=store, state_bytes=case["state_bytes"])
    others: list[dict[str, Any]] = [
        {"order": (1, 2, 0), "lengths": (32, "truncate")},
        {"lora_r": 3, "listed": not case["listed"], "layerwise": not case["layerwise"]},
    ]
    for shard, changed in enumerate(others, start=1):
        parent = None
        for job in chain_of({**case, **changed}, base, shard)[:2]:
            parent = trainer.train(job, parent, stage_records(job), quiet)
    with suppress(Crash):
        trainer.train(chain[0], None, stage_records(chain[0]), break_off)
    answer(base, stages[-1])
    found = []
    for at in reversed(range(len(chain))):
        parent = stages[at - 1] if at else None
        found.append(trainer.train(chain[at], parent, stage_records(chain[at]), quiet))
    return found[::-1]


def break_off(tick: Tick) -> None:
    if tick.step:
        raise Crash


def answer(base: Base, files: Files) -> None:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.routing.route import all_of

    on = Precision("cpu", base.dtype)
    answerer = Answerer(base.files, {0: files}, 1, base.patches, precision=on)
    answerer.generate([[5, 80, 40] * 12], [all_of([0])], 3)


@pytest.fixture(scope="module")
def fresh() -> Iterator[ProcessPoolExecutor]:
    """Provide calls in processes of their own, forked from one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{each}.modeling_{each}" for each in set(MODULES) - {"dynamic"}]
    context.set_forkserver_preload(["sisa.lm.train.trainer", *models])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield pool


def digests(stages: Sequence[Files]) -> list[dict[str, str]]:
    return [{name: sha256_hex(data) for name, data in files.items()} for files in stages]


def patched(base: Base) -> Base:
    return replace(base, patches=(random_patch(base.files.directory, 1),))


@pytest.mark.parametrize("case", drawn_cases(num_examples(180, share=36)), ids=str)
def test_all_ways_to_a_stage_give_the_same_bytes(
    case: dict[str, Any], bases: dict[str, Base], fresh: ProcessPoolExecutor
) -> None:
    base = replace(bases[case["base"]], threads=case["threads"], dtype=case["dtype"])
    base = patched(base) if case["patched"] else base
    chain = chain_of(case, base)
    stages = in_one_go(base, chain)
    parents = [None, *stages[:-1]]
    apart = fresh.map(alone, [base] * len(chain), chain, parents)
    assert digests(list(apart)) == digests(stages)
    assert digests(late(base, chain, stages, case)) == digests(stages)


def test_no_mode_of_the_process_reaches_a_bit(bases: dict[str, Base], tmp_path: Path) -> None:
    """Whatever else a notebook set, also when it sets it before the base is first loaded."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = {**drawn_cases(1)[0], "dtype": "bfloat16"}
    base = replace(bases["llama"], dtype="bfloat16")
    job = chain_of({**case, "base": "llama"}, base)[0]
    usual = alone(base, job, None)
    unseen = replace(
        base,
        files=BaseFiles(shutil.copytree(base.files.directory, tmp_path / "base"), base.files.digest),
    )
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.use_deterministic_algorithms(False)
    torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    torch.set_num_threads(2)
    try:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16),
            sdpa_kernel(SDPBackend.MATH),
        ):
            assert digests([alone(unseen, job, None)]) == digests([usual])
            assert torch.is_inference_mode_enabled()
            assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
