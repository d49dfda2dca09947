"""The numerics fingerprint: what reaches the bits of a weight besides the records and the run file.

Two machines with the same fingerprint train the same bytes, and a checkpoint's key covers it. torch
reads the settings when it is imported, so a worker's environment must hold `worker_environment` before
that. torch is not imported unless a CUDA device is described (`cuda_device.py`), so commands that only
compare fingerprints stay fast. If no CUDA device is present, the fingerprint is one under which nothing
was ever trained.

>>> describe_fingerprint(threads=1)["threads"], len(fingerprint(threads=1))
(1, 64)

Equality across processors, GPU models, driver versions or CUDA versions is not promised; they have
different fingerprints.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.domain import DEFAULT_PRECISION, Precision
from sisa.lm.base.cuda_device import CUDA_SETTINGS, cuda_environment, describe_device, require_device

# Raised with every change of code that reaches the bits of a stage: tests/procedure.py says how.
PROCEDURE_VERSION = 5
MMAP_THRESHOLD_BYTES, TRIM_THRESHOLD_BYTES = 64 << 20, 256 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIBRARIES = ("numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
KERNEL_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
)
_INSTRUCTION_SET = re.compile(r"s?sse|avx|fma|f16c|amx|bmi|asimd|sve|sme|fphp|bf16|i8mm|neon|vfp")


def fingerprint(threads: int, precision: Precision = DEFAULT_PRECISION) -> str:
    """Return the fingerprint, as every job of this environment holds it."""
    return digest_of(describe_fingerprint(threads, precision))


def describe_fingerprint(threads: int, precision: Precision = DEFAULT_PRECISION) -> dict[str, Any]:
    """Return the parts of the fingerprint, for comparing two environments."""
    on_cuda = precision.device == "cuda"
    settings = KERNEL_SETTINGS + CUDA_SETTINGS if on_cuda else KERNEL_SETTINGS
    return {
        "procedure": PROCEDURE_VERSION,
        "libraries": _versions(),
        "device": precision.device,
        "processor": _processor(),
        **({"gpu": describe_device()} if on_cuda else {}),
        "settings": {name: os.environ.get(name) for name in settings},
        "dtype": precision.dtype,
        "threads": threads,
    }


@cache
def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


@cache
def _processor() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return describe_processor(text, platform.machine(), platform.processor())


def describe_processor(cpuinfo: str, machine: str, processor: str) -> dict[str, str]:
    """Return machine, model and instruction sets, given the text of /proc/cpuinfo (empty elsewhere).

    >>> describe_processor("model name : EPYC\\nmodel : 17\\nflags : fpu avx2\\n", "x86_64", "")["model"]
    'EPYC 17'
    """
    fields: dict[str, str] = {}
    for line in cpuinfo.split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = fields.get("flags", fields.get("Features", "")).split()
    named = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
    model = " ".join(fields[name] for name in named if name in fields)
    sets = sorted(flag for flag in flags if _INSTRUCTION_SET.match(flag))
    return {"machine": machine, "model": model or processor, "instruction_sets": digest_of(sets)}


def worker_environment(threads: int, precision: Precision = DEFAULT_PRECISION) -> dict[str, str]:
    """Return the variables that a worker's environment must hold before torch is imported."""
    return {
        **(cuda_environment() if precision.device == "cuda" else {}),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads were 32 times slower on a busy core
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ[name] for name in KERNEL_SETTINGS if name in os.environ},
    }


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, which saves 3 to 5% of a step; do nothing without glibc."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def pin_threads(threads: int, precision: Precision = DEFAULT_PRECISION) -> None:
    """Set torch to the fingerprint's threads and kernels. Raise EnvironmentFault without the device."""
    require_device(precision)
    import torch
    from torch.backends import cuda

    on_cuda = precision.device == "cuda"
    cuda.enable_math_sdp(True)
    for enable in (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp):
        enable(not on_cuda)  # the switches concern the CPU's kernels too
    if on_cuda:
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.set_flags(True)  # type: ignore[no-untyped-call]
    torch.set_float32_matmul_precision("highest")
    torch.set_deterministic_debug_mode("error")  # the same switch, without importing the compiler
    # A debugging aid that costs time; the flag above turns it on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def usual_modes(precision: Precision = DEFAULT_PRECISION) -> Iterator[None]:
    """Run torch with its default modes, since others reach bits, and restore the caller's afterwards."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(precision.device, enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def seed_from(*parts: object) -> int:
    """Return a seed for torch that depends on all parts."""
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
