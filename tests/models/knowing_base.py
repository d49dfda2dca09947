"""Make a base that knows some records by heart: all its weights are trained on them for a short while.

    teach(resolved, records, to=folder / "knowing", steps=120)

The loss is on the answers only, and a fixed seed draws the order of an epoch. Training stops at the end
of an epoch in which no batch's loss was above `ENOUGH`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sisa.core.domain import Part, Record

BATCH = 8
ENOUGH = 0.02


def record(row: Mapping[str, str]) -> Record:
    """Return a row of `sisa.data.samples.make_people` as a record."""
    body = (Part("prompt", row["prompt"]), Part("completion", row["completion"]))
    return Record(row["id"], row["subject_id"], "completion", body)


def teach(
    base: Path,
    records: Sequence[Record],
    *,
    to: Path,
    steps: int,
    learning_rate: float = 3e-5,
) -> dict[str, Any]:
    """Train a copy of a base on records and save it; return the number of steps and the last loss."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from approx.evaluation.answers import collate, mean_logprobs_B
    from sisa.lm.base.numerics import pin_threads
    from sisa.lm.base.tokens import tokenize
    from sisa.lm.base.weights import load_tokenizer

    logging.disable_progress_bar()
    pin_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = load_tokenizer(base)
    tokens = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    drawn, losses, step = random.Random(1), [1.0], 0
    while step < steps and max(losses) > ENOUGH:
        drawn.shuffle(tokens)
        losses = []
        for at in range(0, len(tokens), BATCH):
            batch = collate(tokens[at : at + BATCH])
            loss = -mean_logprobs_B(model(input_ids=batch.ids_BT1).logits, batch).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            step += 1
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return {"steps": step, "last_loss": round(max(losses), 4)}
