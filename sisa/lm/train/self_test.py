"""Self-test of the numerics: whether this machine repeats training to the byte, also in another process.

    two fresh processes, each trains twice -> four digests of a checkpoint's files -> all must be equal

Each training is two stages as `stage.py` trains them, on a small random Llama with the widths of
SmolLM2-135M. No user data takes part. Two machines with the same fingerprint should have the same
digest; a machine with another digest must not train for the model. Faults that show only in long runs or
at other widths, and GPUs other than the first, are not tested.

    check(threads=1, precision=Precision("cuda", "bfloat16")).repeats
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of, sha256_hex
from sisa.core.domain import DEFAULT_PRECISION, Precision, SliceJob
from sisa.core.errors import EnvironmentFault
from sisa.lm.base.cuda_device import require_device
from sisa.lm.base.numerics import describe_fingerprint, pin_threads, worker_environment

NUM_PROCESSES, TEST_TIMEOUT_S = 2, 600
WIDTHS = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 2048,
}
ROW_LENGTHS = (5, 17, 33, 64, 9, 40, 64, 12)  # in tokens
TRAINING = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "lora_target_modules": "all-linear",
    "sequence_len": 64,
    "micro_batch_size": 4,
    "learning_rate": 1e-3,
    "optimizer": "adamw_torch",
    "lr_scheduler": "linear",
    "warmup_ratio": 0.25,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "seed": 42,
}


@dataclass(frozen=True)
class Numerics:
    """The fingerprint, its description, and the digest of each training's files."""

    fingerprint: str
    description: Mapping[str, Any]
    digests: tuple[str, ...]

    @property
    def repeats(self) -> bool:
        """Return whether all trainings gave the same bytes."""
        return len(set(self.digests)) == 1


def check(threads: int, precision: Precision = DEFAULT_PRECISION) -> Numerics:
    """Train in fresh processes. Raise EnvironmentFault if one fails, or without the device."""
    require_device(precision)
    description = describe_fingerprint(threads, precision)
    found = [each for _ in range(NUM_PROCESSES) for each in _train_in_new_process(threads, precision)]
    return Numerics(digest_of(description), description, tuple(found))


def _train_in_new_process(threads: int, precision: Precision) -> list[str]:
    here = str(Path(__file__).resolve().parents[3])
    environment = {**os.environ, **worker_environment(threads, precision), "PYTHONPATH": here}
    arguments = json.dumps([threads, asdict(precision)])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sisa.lm.train.self_test", arguments],
            env=environment,
            capture_output=True,
            timeout=TEST_TIMEOUT_S,
            check=True,
        )
        found: list[str] = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise EnvironmentFault(
            "the self-test's process failed",
            where=sys.executable,
            expected="the digests of what it trained",
            got=type(error).__name__,
            next_step="check that this Python can import torch, and that there is enough memory",
        ) from None
    return found


def trained_digests(threads: int, times: int = 2, precision: Precision = DEFAULT_PRECISION) -> list[str]:
    """Train the same two stages `times` times in this process; return the digest of each training."""
    import torch

    from sisa.lm.base.tokens import NO_LOSS, Tokens
    from sisa.lm.train.lanes import finish
    from sisa.lm.train.stage import Stage
    from sisa.lm.train.trainable import Trainable

    pin_threads(threads, precision)
    drawn = torch.Generator().manual_seed(1)
    rows = [torch.randint(1, 2048, (length,), generator=drawn).tolist() for length in ROW_LENGTHS]
    tokens = [Tokens(each, [NO_LOSS, NO_LOSS, *each[2:]]) for each in rows]
    steps = [[tokens[:4], tokens[4:]], [tokens[2:6]], [tokens[::2], tokens[1::2]]]
    digests = []
    for _ in range(times):
        files: dict[str, bytes] | None = None
        for slice_ in range(2):
            job = SliceJob(0, slice_, None, ((0, ""),), len(rows), (1, 1), TRAINING, "", "")
            wrapped = Trainable(random_base(precision), TRAINING)
            stage = Stage(job, wrapped, files, num_steps=len(steps))
            for batches in steps:
                finish(stage.step(batches))
            files = stage.files()
        digests.append(digest_of({name: sha256_hex(data) for name, data in (files or {}).items()}))
    return digests


def random_base(precision: Precision) -> Any:
    """Return a base whose weights are the same on every device, rounded to the dtype."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base: Any = LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=True))
    for each in base.parameters():
        each.data = each.data.to(getattr(torch, precision.dtype))
    return base.requires_grad_(False).to(precision.device)


if __name__ == "__main__":
    threads, precision = json.loads(sys.argv[1])
    print(json.dumps(trained_digests(threads, precision=Precision(**precision))))
