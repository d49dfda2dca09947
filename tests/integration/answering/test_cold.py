"""What a process does before its first answer: nothing twice, and nothing that no answer needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sisa.core.digest import file_sha256
from sisa.lm.base import weights

pytestmark = pytest.mark.torch


def test_pinning_imports_no_compiler_and_is_as_strict() -> None:
    """Importing torch's compiler takes longer than an answer."""
    code = (
        "import sys, torch\nfrom sisa.lm.base.numerics import pin_threads\npin_threads(1)\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert not torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not {'torch._inductor', 'torch._dynamo'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_process_reads_a_models_bytes_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []

    def counting(path: Path) -> str:
        read.append(path)
        return file_sha256(path)

    monkeypatch.setattr(weights, "file_sha256", counting)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"a")
    first = weights.base_digest(tmp_path)
    assert (weights.base_digest(tmp_path), read) == (first, [file])
    file.write_bytes(b"another")
    assert weights.base_digest(tmp_path) != first
    assert read == [file, file]
