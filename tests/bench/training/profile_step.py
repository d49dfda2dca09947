"""The share of the machine's matrix products that a training step achieves, and where the rest goes.

    python -m tests.bench.training.profile_step --tofu DIRECTORY \\
        --out tests/bench/training/profile_step.json

For each row, a step of the real trainer (forward, backward, clipping, AdamW) and its matrix products
alone are timed in turn, `ROUNDS` times, on one thread, in seconds of its own CPU time so that other
processes matter little; the median of each is taken. The products alone are those of the step: the
same shapes over the same weights in the same order, including those of the adapters and of the head,
without attention's own products. Some rows also get the split of `step_parts.py`.

    of_peak      products alone / step: achieved FLOP/s over the machine's peak for the shapes in use
    square       FLOP/s of one product of square matrices, as a measure of the core
    page_faults  of a step and its products; system_s: their CPU seconds in the operating system
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sisa.core.domain import Precision, SliceJob
from sisa.lm.base.adapter import first_adapted
from sisa.lm.base.numerics import keep_freed_memory, pin_threads
from sisa.lm.base.tokens import Tokens, tokenize
from sisa.lm.base.weights import load_base, resolve_base
from sisa.lm.train.lanes import finish
from sisa.lm.train.losses import PIECE, count_labels
from sisa.lm.train.stage import Stage
from sisa.lm.train.trainable import Trainable
from tests.bench.command import BASE, TOFU, arguments, data_name, markdown, people, write
from tests.bench.training.step_parts import ADAPTERS, HEAD, PRODUCTS, Shape, seconds, split
from tests.endurance.ground import environment
from tests.models.knowing_base import record

ROUNDS, RANK, SQUARE, LONG = 5, 8, 1536, 512


@dataclass(frozen=True)
class Row:
    """A step to measure: its records, and what its run file changes."""

    name: str
    size: int
    tokens: int = 0  # of each record; 0: about the median length of the data
    in_parts: bool = False
    changed: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("all linear, 1 record a step", 1, in_parts=True),
    Row("all linear, 2 records a step", 2),
    Row("all linear, 8 records a step", 8, in_parts=True),
    Row(f"all linear, 1 record of {LONG} tokens a step", 1, LONG, in_parts=True),
    Row("top third, lower layers kept, 8 records a step", 8, changed={"lora_layers": "third"}),
    Row("all linear, 8 records a step, base in bfloat16", 8, changed={"dtype": "bfloat16"}),
)
TRAINING: dict[str, Any] = {
    "lora_r": RANK,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 1,
    "sequence_len": 512,
}


def batch_of(tokenizer: Any, row: Row, tofu: Path | None) -> list[Tokens]:
    """Return records of about the median length, or of the row's length, cut from records end to end."""
    records = map(record, people(tofu)[:64])
    found = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    if row.tokens:
        ids = cycle(chain.from_iterable(each.input_ids for each in found))
        labels = cycle(chain.from_iterable(each.labels for each in found))
        sizes = (row.tokens,) * row.size
        return [Tokens(list(islice(ids, each)), list(islice(labels, each))) for each in sizes]
    found.sort(key=lambda each: len(each.input_ids))
    middle = (len(found) - row.size) // 2
    return found[middle : middle + row.size]


def products(
    base: Any, first: int, batch: Sequence[Tokens], parts: Sequence[str] = (PRODUCTS, ADAPTERS, HEAD)
) -> tuple[Callable[[], None], float]:
    """Return a function that runs the step's matrix products of some parts, and all parts' FLOPs."""
    rows = sum(len(each.input_ids) for each in batch)
    adapted = [
        (each.weight, _layer(name) > first or not name.endswith(("q_proj", "k_proj", "v_proj")))
        for name, each in base.named_modules()
        if isinstance(each, torch.nn.Linear) and _layer(name) >= first
    ]  # and whether the gradient of its input is needed
    head: Tensor = base.get_output_embeddings().weight
    labels = count_labels(batch)
    wide = {n: torch.randn(rows, n) for weight, _ in adapted for n in weight.shape}
    thin = {n: torch.randn(RANK, n) for n in wide}
    of_base = {n: each.to(head.dtype) for n, each in wide.items()}  # adapters are in float32
    sums = {n: torch.zeros_like(each) for n, each in wide.items()}
    low, hidden = torch.randn(RANK, rows), torch.randn(labels, head.shape[1], dtype=head.dtype)

    def forward(weight: Tensor) -> None:
        num_out, num_in = weight.shape
        if PRODUCTS in parts:
            _ = of_base[num_in] @ weight.t()
        if ADAPTERS in parts:
            sums[num_out].addmm_((thin[num_in] @ wide[num_in].t()).t(), thin[num_out])

    def backward(weight: Tensor, of_input: bool) -> None:
        num_out, num_in = weight.shape
        if ADAPTERS in parts:
            _ = low @ wide[num_out]
            up = wide[num_out] @ thin[num_out].t()
            _ = up.t() @ wide[num_in]
            if of_input:
                sums[num_in].addmm_(up, thin[num_in])
        if PRODUCTS in parts and of_input:
            _ = of_base[num_out] @ weight

    def run() -> None:
        for weight, _ in adapted:
            forward(weight)
        for piece in torch.split(hidden, PIECE) if HEAD in parts else ():
            _ = piece @ head.t() @ head
        for weight, of_input in reversed(adapted):
            backward(weight, of_input)

    flops = sum(
        (2 + 2 * of_input) * rows * weight.numel()
        + RANK * rows * (6 * weight.shape[0] + (4 + 2 * of_input) * weight.shape[1])
        for weight, of_input in adapted
    )
    return run, flops + 4 * labels * head.numel()


def _layer(name: str) -> int:
    """Return the layer of a module; -1 outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def square_gflops_per_s() -> float:
    """Return the speed of one product of square matrices in float32."""
    one, other = torch.randn(2, SQUARE, SQUARE)
    taken = median(seconds(lambda: one @ other) for _ in range(2 * ROUNDS))
    return round(2 * SQUARE**3 / taken / 1e9, 1)


def measure(base_model: str, row: Row, tofu: Path | None) -> dict[str, Any]:
    """Return one row of the table."""
    base_files = resolve_base(base_model)
    precision = Precision(dtype=row.changed.get("dtype", "float32"))
    base, tokenizer = load_base(base_files, precision)
    training = {**TRAINING, "micro_batch_size": row.size, **row.changed}
    if "lora_layers" in training:
        training["lora_layers"] = f"top:{max(1, base.config.num_hidden_layers // 3)}"
    batch, first = batch_of(tokenizer, row, tofu), first_adapted(training, base)
    run, flops = products(base, first, batch)
    alone = {part: products(base, first, batch, [part])[0] for part in (PRODUCTS, ADAPTERS, HEAD)}
    shape = Shape([len(each.input_ids) for each in batch], count_labels(batch), base.config)
    job = SliceJob(0, 0, None, ((0, ""),), len(batch), (1, 1), training, "", "")
    pin_threads(1, precision)
    stage = Stage(job, Trainable(base, training), None, num_steps=10**6)

    def step() -> None:
        finish(stage.step([batch]))

    step()
    run()
    before = resource.getrusage(resource.RUSAGE_THREAD)
    pairs = [(seconds(step), seconds(run)) for _ in range(ROUNDS)]
    after = resource.getrusage(resource.RUSAGE_THREAD)
    step_s, alone_s = (median(each) for each in zip(*pairs, strict=True))
    model = stage._own.model
    return {
        "tokens": shape.rows,
        "step_s": round(step_s, 4),
        "tokens_per_s": round(shape.rows / step_s, 1),
        "gflops_per_s": round(flops / step_s / 1e9, 1),
        "peak_gflops_per_s": round(flops / alone_s / 1e9, 1),
        "of_peak": round(median(one / each for each, one in pairs), 3),
        "page_faults": (after.ru_minflt - before.ru_minflt) // ROUNDS,
        "system_s": round((after.ru_stime - before.ru_stime) / ROUNDS, 4),
        **({"parts": split(step, model, shape, alone, RANK)} if row.in_parts else {}),
    }


def step_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a training step costs beside its matrix products."""
    lines = [
        (
            name,
            f"{row['tokens_per_s']:.0f}",
            f"{row['gflops_per_s']:.0f}",
            f"{row['peak_gflops_per_s']:.0f}",
            f"{row['of_peak']:.2f}",
        )
        for name, row in found["rows"].items()
    ]
    header = ("step", "tokens/s", "GFLOP/s", "products alone", "of them")
    yield from markdown(header, lines)


def part_table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield where a training step's time goes, in percent of the step, and the bounds of each part."""
    split = {name: row for name, row in found["rows"].items() if "parts" in row}
    names = next(iter(split.values()))["parts"]
    columns = [("of a step", *names, "sum", "products alone, of the sum")]
    for step, row in split.items():
        parts, short = row["parts"].values(), step.removeprefix("all linear, ").removesuffix(" a step")
        whole = sum(each["s"] for each in parts)
        products = sum(row["parts"][each]["moved_s"] for each in (PRODUCTS, ADAPTERS, HEAD))
        for kind, title in {"s": "now", "moved_s": "moved", "fused_s": "fused"}.items():
            took = sum(each[kind] for each in parts)
            share = row["of_peak"] if kind == "s" else products / took  # of_peak was timed beside steps
            cells = (f"{each[kind] / whole:.1%}" for each in parts)
            columns.append((f"{short}: {title}", *cells, f"{took / whole:.0%}", f"{share:.2f}"))
    header, *lines = zip(*columns, strict=True)
    yield from markdown(header, lines)


def main() -> None:
    given = arguments(__doc__, out=Path("profile_step.json"), tofu=TOFU, base_model=BASE)
    pin_threads(1)
    keep_freed_memory()
    square = square_gflops_per_s()
    rows = {each.name: measure(given.base_model, each, given.tofu) for each in ROWS}
    found = {
        **environment(),
        "base_model": given.base_model,
        "data": data_name(given.tofu),
        "square_gflops_per_s": square,
        "rows": rows,
    }
    write(given.out, found)
    print("\n".join([*step_table(found), "", *part_table(found)]))


if __name__ == "__main__":
    main()
