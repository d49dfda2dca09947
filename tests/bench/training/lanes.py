"""Shards trained side by side against one after another, on one core: tokens a second, and equal bytes.

    python -m tests.bench.training.lanes --tofu DIRECTORY --out tests/bench/training/lanes.json

All shards are trained by the serial executor, from stored records to stored checkpoints, with each
number of lanes in turn; the seconds are those of this process's own CPU time, so that other processes
matter little, and include a self-test of the lanes. A trainer is new each time, but the base is loaded
before. It is an error if a byte of a checkpoint differs. What lanes can gain is what the base's matrix
products gain by more rows, which is measured beside. On the same code and machine, the same command
goes on after the last row that was written: each is measured by itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import torch

from sisa.core.digest import sha256_hex
from sisa.core.domain import BaseFiles, Chain, Record
from sisa.core.events import Event, Notice, SliceTrained
from sisa.core.ports import StoredRecord
from sisa.flows.chains import SerialExecutor
from sisa.lm.base.numerics import fingerprint, pin_threads
from sisa.lm.base.weights import load_base, resolve_base
from sisa.lm.train import trainer as lora_trainer
from sisa.planning.plan import Recipe, jobs
from tests.bench.command import (
    BASE,
    TOFU,
    arguments,
    data_name,
    markdown,
    people,
    read,
    write,
)
from tests.endurance.ground import environment
from tests.fakes.ports import FakeCheckpoints, FakeRecords
from tests.models.knowing_base import record

LANES, BATCHES, LAYERS = (1, 4, 8), (1, 2), ("all", "third")
ROWS, TURNS = (64, 128, 256, 512), 20  # of the products, of which the best counts
TRAINING: dict[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "sequence_len": 512,
    "overlength": "refuse",
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "lr_scheduler": "linear",
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "train_on_inputs": False,
    "seed": 1,
}


def records_of(tofu: Path | None, shards: int, per_shard: int) -> list[list[Record]]:
    """Return the records of each shard; questions begin again where they run out."""
    found = map(record, cycle(people(tofu)))
    return [list(islice(found, per_shard)) for _ in range(shards)]


def chains_of(
    base: BaseFiles, training: dict[str, Any], shards: Sequence[Sequence[Record]], store: FakeRecords
) -> list[Chain]:
    """Return one chain of one slice for each shard."""
    found = []
    for shard, records in enumerate(shards):
        stored = [StoredRecord(sha256_hex(each.id.encode()), each) for each in records]
        file = store.write(shard, 0, f"root-{shard}", stored)
        recipe = Recipe(1, "cumulative", 2, training, base.digest)
        found.append(Chain(shard, jobs(shard, [file], recipe, fingerprint(1)), None, (file,)))
    return found


def measure(
    base: BaseFiles, layers: str, batch: int, shards: Sequence[Sequence[Record]]
) -> dict[str, Any]:
    """Return tokens a second of CPU time by number of lanes. Raise ValueError if bytes differ."""
    model, _ = load_base(base)
    training = {**TRAINING, "micro_batch_size": batch}
    if layers == "third":
        training["lora_layers"] = f"top:{max(1, model.config.num_hidden_layers // 3)}"
    store, found, bytes_of = FakeRecords(), dict[str, Any](), list[Any]()
    chains = chains_of(base, training, shards, store)
    for lanes in LANES:
        lora_trainer._tested.clear()  # so that each run pays for its self-test
        checkpoints, events = FakeCheckpoints(), list[Event]()
        trainer = lora_trainer.LoraTrainer(base, threads=1)
        started = time.process_time()
        SerialExecutor(trainer, store, checkpoints, lanes).run(chains, events.append)
        seconds = time.process_time() - started
        if refused := [each.text for each in events if isinstance(each, Notice)]:
            raise ValueError(refused[0])
        bytes_of.append(checkpoints.stored)
        found[str(lanes)] = {
            "cpu_s": round(seconds, 2),
            "tokens_per_s": round(_tokens(events) / seconds, 1),
        }
    if any(each != bytes_of[0] for each in bytes_of):
        raise ValueError("lanes reached a byte of a checkpoint")
    return found


def products(base: BaseFiles) -> dict[str, float]:
    """Return GFLOP/s of a layer's frozen products, forward and backward, by the number of rows."""
    model, _ = load_base(base)
    layer = model.get_decoder().layers[0]
    weights = [each.weight for each in layer.modules() if isinstance(each, torch.nn.Linear)]
    found = dict.fromkeys(ROWS, math.inf)
    for _, num in product(range(TURNS), ROWS):
        sides = [[torch.randn(num, size) for size in each.shape] for each in weights]
        started = time.process_time()
        for weight_OI, (gradient_NO, x_NI) in zip(weights, sides, strict=True):
            torch.nn.functional.linear(x_NI, weight_OI)
            gradient_NO @ weight_OI
        found[num] = min(found[num], time.process_time() - started)
    operations = 4 * sum(each.numel() for each in weights)
    return {str(num): round(num * operations / took / 1e9, 1) for num, took in found.items()}


def _tokens(events: Sequence[Event]) -> int:
    return sum(each.tokens for each in events if isinstance(each, SliceTrained))


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what training shards side by side gains."""
    lines = []
    for name, by_lanes in found["rows"].items():
        layers, _, batch = name.partition(", ")
        alone = by_lanes["1"]["tokens_per_s"]
        for lanes, row in by_lanes.items():
            gain = f"{row['tokens_per_s'] / alone:.2f}"
            lines.append((layers, batch, lanes, f"{row['tokens_per_s']:.0f}", gain))
    header = ("adapted layers", "records a step", "lanes", "tokens per core-second", "to one lane")
    yield from markdown(header, lines)


def product_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield how fast the base's products are by their number of rows."""
    by_rows = found["products_gflops_per_s"]
    yield from markdown(("rows", *by_rows), [("GFLOP/s", *(f"{each:.0f}" for each in by_rows.values()))])


def main() -> None:
    given = arguments(__doc__, out=Path("lanes.json"), tofu=TOFU, base_model=BASE, shards=50, records=4)
    pin_threads(1)
    base = resolve_base(given.base_model)
    found: dict[str, Any] = {
        **environment(),
        "base_model": given.base_model,
        "data": data_name(given.tofu),
        "shards": given.shards,
        "records": given.records,
    }
    found |= {"rows": read(given.out, found).get("rows", {}), "products_gflops_per_s": products(base)}
    shards = records_of(given.tofu, given.shards, given.records)
    for layers, batch in product(LAYERS, BATCHES):
        if (name := f"{layers}, {batch}") not in found["rows"]:
            found["rows"][name] = measure(base, layers, batch, shards)
            write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
