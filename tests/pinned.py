"""Print the result of a small fixed training and deletion, to compare before and after a refactoring.

    python -m tests.pinned > before.txt
    ... move code ...
    python -m tests.pinned | diff before.txt -

Two runs on one machine print the same lines as long as no byte of an adapter and no key changed.
Digests differ by processor and by library version, so none is kept in the repository.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import sisa
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import KEY

NUM_RECORDS = 24


def model_lines(directory: Path) -> list[str]:
    """Train on fixed records, delete one, and return a line for each digest and checkpoint key."""
    rows = [
        {
            "id": f"r{n}",
            "subject_id": f"s{n % 8}",
            "prompt": f"Who is {n}?",
            "completion": f"Number {n}.",
        }
        for n in range(NUM_RECORDS)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "key").write_text(KEY)
    (directory / "key").chmod(0o600)
    settings = {
        "base_model": str(make_tiny_base(directory / "base")),
        "datasets": [{"path": str(directory / "rows.jsonl")}],
        "output_dir": str(directory / "model"),
        "num_epochs": 2,
        "lora_dropout": 0.1,
        "sisa": {
            "shards": 2,
            "slices": 2,
            "embedder": "hashing",
            "partition_key_file": str(directory / "key"),
        },
        "witness": str(directory / "witness"),
    }
    (directory / "run.yaml").write_text(json.dumps(settings))
    model, taken = sisa.train_model(directory / "run.yaml", executor="serial")
    lines = [f"trained {taken.model_digest}", *_keys(directory)]
    outcome = model.forget(["r3"])
    return [*lines, f"deleted {outcome.model_digest}", *_keys(directory)]


def _keys(directory: Path) -> list[str]:
    return sorted(each.name for each in (directory / "model" / "checkpoints").iterdir())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print("\n".join(model_lines(Path(scratch))))
