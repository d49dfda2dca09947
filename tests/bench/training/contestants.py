"""The contestants of the race: Hugging Face's `Trainer`, TRL's `SFTTrainer` and ours, one process each.

All get the same tokens, labels, adapter, epochs, rate with linear decay and AdamW (each in its own
default form), with no dropout, no weight decay, gradients clipped to 1, in float32. The others train
one adapter on all records, and their loop is timed from the first step to the last, with tokens at
hand. Ours train chains of stages as a worker does (`open_serial`), and everything is timed, including
slice files, tokens and checkpoints. Nobody recomputes activations (TRL would by default). A process
that waits for its next race does not use its core. Threads are set before torch is imported. Packing is
left out, because it lets records of several subjects see each other.

    with Contestant("hf", threads=2) as hf:
        hf.start(Theirs(race, tokens))
        hf.ended().seconds
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from sisa.core.domain import Chain
from sisa.flows.chains import Site
from sisa.lm.base.tokens import NO_LOSS, Tokens
from tests.bench.command import Clock

Who = Literal["hf", "trl", "ours"]
RANK, ALPHA = 8, 16
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MODULES: dict[str, tuple[str, ...]] = {
    "q, v": (ATTENTION[0], ATTENTION[2]),
    "all linear": (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@dataclass(frozen=True)
class Race:
    """One adapter on all records. `layers` are the numbers of its layers, None for all."""

    base_dir: Path
    modules: str
    layers: tuple[int, ...] | None
    epochs: int
    batch: int
    rate: float

    def targets(self) -> tuple[str, ...]:
        """Return the names of modules, as PEFT finds them.

        >>> Race(Path(), "q, v", (28, 29), 1, 8, 1e-3).targets()[:2]
        ('28.self_attn.q_proj', '28.self_attn.v_proj')
        """
        names = MODULES[self.modules]
        return (
            names if self.layers is None else tuple(f"{n}.{each}" for n in self.layers for each in names)
        )


@dataclass(frozen=True)
class Theirs:
    """A race for Hugging Face or TRL; `grouped` batches records of similar length, as they do."""

    race: Race
    tokens: Sequence[Tokens]
    grouped: bool = False
    with_loss: bool = False


@dataclass(frozen=True)
class Ours:
    """A worker's share: its chains, the store of their slices, and the tokens of each chain."""

    site: Site
    chains: tuple[Chain, ...]
    tokens: tuple[tuple[Tokens, ...], ...]
    with_loss: bool = False


@dataclass(frozen=True)
class Ran:
    """The result of a training: seconds, and core-seconds of all threads without waiting.

    With `with_loss` it also has the loss afterwards, summed over `labels` labels.
    """

    seconds: float
    core_seconds: float
    loss_sum: float = 0.0
    labels: int = 0


def is_installed(who: Who) -> bool:
    """Return whether a contestant is installed."""
    return who != "trl" or find_spec("trl") is not None


class Contestant:
    """A process that trains whatever it is sent, one training after another."""

    def __init__(self, who: Who, threads: int) -> None:
        self._who, self._threads = who, threads

    def __enter__(self) -> Contestant:
        from sisa.lm.base.numerics import worker_environment

        before = dict(os.environ)
        os.environ.update(worker_environment(self._threads))
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            context = get_context("spawn")
            self._mine, other = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._who, self._threads, other))
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        return self

    def __exit__(self, *_: object) -> None:
        self._mine.send(None)
        self._process.join()

    def start(self, work: Theirs | Ours) -> None:
        """Start a training; `ended` waits for it."""
        self._mine.send(work)

    def ended(self) -> Ran:
        """Return the result of the training.

        Raise RuntimeError when it failed, and EOFError when the process died.
        """
        found = self._mine.recv()
        if isinstance(found, str):
            raise RuntimeError(f"{self._who}: {found}")
        ran: Ran = found
        return ran


def _serve(who: Who, threads: int, pipe: Connection) -> None:
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    while (work := pipe.recv()) is not None:
        try:
            pipe.send(_ours(work) if isinstance(work, Ours) else _theirs(who, work))
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _ours(work: Ours) -> Ran:
    from sisa.core.checkpoint_files import ADAPTER_FILE
    from sisa.flows.wiring.executors import open_serial, open_stores
    from sisa.lm.base.adapter import attach, read_config
    from sisa.lm.base.low_rank import read_tensors
    from sisa.lm.base.weights import load_base
    from sisa.store.blobs.local_blobs import LocalBlobs

    load_base(work.site.base)  # a worker has it from its first task on
    with tempfile.TemporaryDirectory() as folder:
        site = replace(work.site, checkpoints_at=LocalBlobs(Path(folder) / "checkpoints"))
        clock = Clock()
        open_serial(site, {}).run(work.chains, lambda _event: None)
        took = clock.took()
        ran = Ran(took["seconds"], took["core_seconds"])
        if not work.with_loss:
            return ran
        _, store = open_stores(site)
        found = []
        for chain, tokens in zip(work.chains, work.tokens, strict=True):
            key = chain.jobs[-1].key
            files = store.load(key, store.describe(key).manifest_sha256)
            base, _ = load_base(site.base)
            model = attach(base, read_config(files), read_tensors(files, ADAPTER_FILE), init_seed=0)
            found.append(_loss(model.eval(), tokens))
    losses, labels = zip(*found, strict=True)
    return replace(ran, loss_sum=sum(losses), labels=sum(labels))


def _theirs(who: Who, work: Theirs) -> Ran:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    race = work.race
    model = AutoModelForCausalLM.from_pretrained(race.base_dir, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(race.base_dir)
    rows = [{"input_ids": each.input_ids, "labels": each.labels} for each in work.tokens]
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        target_modules=list(race.targets()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        make = _make_trl if who == "trl" else _make_hf
        trainer = make(model, tokenizer, adapter, Dataset.from_list(rows), _settings(work, folder))
        trainer.remove_callback(PrinterCallback)
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
    loss = _loss(trainer.model.eval(), work.tokens) if work.with_loss else (0.0, 0)
    return Ran(clock.seconds, clock.core_seconds, *loss)


def _settings(work: Theirs, folder: str) -> dict[str, Any]:
    grouped = {"train_sampling_strategy": "group_by_length"} if work.grouped else {}
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": work.race.batch,
        "num_train_epochs": work.race.epochs,
        "learning_rate": work.race.rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 42,
        **grouped,
    }


def _make_hf(model: Any, tokenizer: Any, adapter: Any, rows: Any, settings: dict[str, Any]) -> Any:
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    return Trainer(
        model=get_peft_model(model, adapter),
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_LOSS),
    )


def _make_trl(model: Any, tokenizer: Any, adapter: Any, rows: Any, settings: dict[str, Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
    )


def _clock() -> Any:
    from transformers import TrainerCallback

    class FirstToLast(TrainerCallback):  # type: ignore[misc]
        """A clock from the first step to the last."""

        seconds = core_seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.seconds, self.core_seconds = -time.perf_counter(), -time.process_time()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.seconds += time.perf_counter()
            self.core_seconds += time.process_time()

    return FirstToLast()


def _loss(model: Any, tokens: Sequence[Tokens]) -> tuple[float, int]:
    """Return a model's loss on records, summed over their labels, and the number of labels."""
    import torch
    from torch.nn.functional import cross_entropy

    total, count = 0.0, 0
    with torch.no_grad():
        for each in tokens:
            logits_1TV = model(input_ids=torch.tensor([each.input_ids])).logits
            next_T = torch.tensor(each.labels[1:])
            loss = cross_entropy(
                logits_1TV[0, :-1].float(), next_T, ignore_index=NO_LOSS, reduction="sum"
            )
            total += loss.item()
            count += int((next_T != NO_LOSS).sum())
    return total, count
