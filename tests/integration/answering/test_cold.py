"""What a process does before its first answer: nothing twice, and nothing that no answer needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sisa.core.digest import file_sha256
from sisa.lm.base import weights
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import Tiny

pytestmark = pytest.mark.torch
HEAVY = (
    "'accelerate', 'peft', 'scipy', 'sympy', 'torch._decomp', 'torch._dynamo.convert_frame', "
    "'torch.distributed.tensor', 'torch.export.unflatten'"
)
COMMAND = f"""
import sys
from sisa.__main__ import main
try:
    main()
except SystemExit as ended:
    assert not ended.code
assert sys.modules["torch"]
assert not any(map(sys.modules.get, [{HEAVY}]))
"""
LOGITS = """
import hashlib, sys
from pathlib import Path
from sisa.lm.base.quick_import import import_quickly
base, digest, *quickly = sys.argv[1:]
if quickly:
    import_quickly()
import torch
from sisa.core.domain import BaseFiles
from sisa.lm.base.weights import load_base
model, _ = load_base(BaseFiles(Path(base), digest))
heavy = {"sympy", "torch._decomp", "torch._dynamo.convert_frame"} & sys.modules.keys()
assert len(heavy) == (0 if quickly else 3)
print(hashlib.sha256(model(torch.arange(40).reshape(2, 20)).logits.numpy().tobytes()).hexdigest())
assert torch.compile(lambda a: a + 1, backend="eager")(torch.ones(1)) == 2
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
assert torch.export.Dim("rows").__name__ == "rows"
assert torch.ones(3, device="meta").normal_().is_meta and "torch._decomp" in sys.modules
"""

TRAINED = """
import hashlib, sys
from pathlib import Path
from sisa.lm.base.quick_import import import_quickly
base, digest, *quickly = sys.argv[1:]
if quickly:
    import_quickly(trains=True)
from sisa.core.domain import BaseFiles, Part, Record, SliceJob
from sisa.core.ports import StoredRecord
from sisa.lm.train.trainer import LoraTrainer
training = dict(
    lora_r=2, lora_alpha=4, lora_dropout=0.1, lora_target_modules="all-linear", optimizer="adamw_torch",
    learning_rate=0.01, lr_scheduler="linear", warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0,
    micro_batch_size=2, gradient_accumulation_steps=1, seed=1, sequence_len=64, overlength="refuse",
    train_on_inputs=False,
)
text = Record("r", None, "text", (Part("text", "A mill by the river."),))
job = SliceJob(0, 0, None, ((0, ""),), 1, (2, 1), training, digest, "f")
trainer = LoraTrainer(BaseFiles(Path(base), digest), 1)
files = trainer.train(job, None, [StoredRecord("r", text)], lambda _: None)
heavy = {"boto3", "scipy", "sympy", "torch._decomp", "torch._dynamo.convert_frame"} & sys.modules.keys()
assert len(heavy) == (0 if quickly else 5)
print([hashlib.sha256(files[name]).hexdigest() for name in sorted(files)])
import scipy.stats
from accelerate import Accelerator
"""


def process(code: str, *arguments: object) -> str:
    """Run code in a process of its own, and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_pinning_imports_no_compiler_and_is_as_strict() -> None:
    """Importing torch's compiler takes longer than an answer."""
    code = (
        "import sys, torch\nfrom sisa.lm.base.numerics import pin_threads\npin_threads(1)\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert not torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not {'torch._inductor', 'torch._dynamo'} & sys.modules.keys()"
    )
    process(code)


def test_a_command_that_asks_once_imports_nothing_that_takes_longer(tiny: Tiny) -> None:
    assert process(COMMAND, "generate", "-m", tiny.directory, "--prompt", "Where was Mara born?")


def test_a_deletion_from_one_shard_starts_no_ray(tiny: Tiny) -> None:
    code = (
        "import sys, sisa\nmodel = sisa.open_model(sys.argv[1])\n"
        "print(model.forget(subject='p003').request.record_epochs_retrained)\n"
        "assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    assert int(process(code, tiny.directory)) > 0


def test_a_quick_import_changes_no_bit_and_keeps_what_others_import(tmp_path: Path) -> None:
    """Neither of answers nor of training; torch's compiler, SciPy and accelerate remain at hand."""
    base = make_tiny_base(tmp_path / "base")
    digest = weights.base_digest(base)
    plainly = process(LOGITS + TRAINED, base, digest)
    assert plainly.count("\n") == 2
    assert (
        process(LOGITS, base, digest, "quickly") + process(TRAINED, base, digest, "quickly") == plainly
    )


def test_a_process_reads_a_models_bytes_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr("sisa.core.digest.file_sha256", counting)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a")
    first = weights.base_digest(tmp_path)
    assert (weights.base_digest(tmp_path), read) == (first, [file])
    file.write_bytes(b"another")
    assert weights.base_digest(tmp_path) != first
    assert read == [file, file]
