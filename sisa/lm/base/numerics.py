"""The numerics fingerprint: what, besides the records and the config, reaches the bits of a weight.

Rules: two machines with one fingerprint train the same bytes; a checkpoint's key covers it. It holds
library versions, the version of our training procedure, the device, the processor with its
instruction sets, the settings by which MKL, oneDNN and ATen choose their kernels, the dtype and the
number of threads; of a CUDA device also what `cuda.py` says of it. The settings are read by torch when
it is imported: a worker's environment must hold `worker_environment` before that. Unless a CUDA device
is to be described this module does not import torch, so that commands that only compare fingerprints
stay fast. Where there is none to describe, the fingerprint is one under which nothing was ever trained.

Not covered: equality across processors (`MKL_CBWR` is the candidate, and part of the fingerprint).

>>> describe_fingerprint(threads=1)["threads"], len(fingerprint(threads=1))
(1, 64)
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.precision import DEFAULT_PRECISION, Precision
from sisa.lm.base import cuda

# Raise it with every change of stage.py, wrapped.py, adapter.py, losses.py, packed.py, flat.py,
# trained_linear.py, prefix.py, layers.py, layerwise.py, batches.py or tokens.py that reaches the bits.
PROCEDURE_VERSION = 5
MMAP_THRESHOLD_BYTES, TRIM_THRESHOLD_BYTES = 64 << 20, 256 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIBRARIES = ("numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
KERNEL_SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
_INSTRUCTION_SET = re.compile(r"s?sse|avx|fma|f16c|amx|bmi|asimd|sve|sme|fphp|bf16|i8mm|neon|vfp")


def fingerprint(threads: int, precision: Precision = DEFAULT_PRECISION) -> str:
    """The digest that stands in every job of this environment."""
    return digest_of(describe_fingerprint(threads, precision))


def describe_fingerprint(threads: int, precision: Precision = DEFAULT_PRECISION) -> dict[str, Any]:
    """The fingerprint in words, for people who compare two environments."""
    on_cuda = precision.device == "cuda"
    gpu = {"gpu": cuda.describe()} if on_cuda else {}
    settings = (*KERNEL_SETTINGS, *(cuda.SETTINGS if on_cuda else ()))
    return {
        "procedure": PROCEDURE_VERSION,
        "libraries": {name: _version(name) for name in LIBRARIES},
        "device": precision.device,
        "processor": dict(_processor()),
        **gpu,
        "settings": {name: os.environ.get(name) for name in settings},
        "dtype": precision.dtype,
        "threads": threads,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def _processor() -> tuple[tuple[str, str], ...]:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return tuple(describe_processor(text, platform.machine(), platform.processor()).items())


def describe_processor(cpuinfo: str, machine: str, processor: str) -> dict[str, str]:
    """Machine, model and instruction sets from the text of /proc/cpuinfo (empty elsewhere).

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
    """What a worker's environment must hold before torch is imported."""
    environment = cuda.environment() if precision.device == "cuda" else {}
    environment |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads on a busy core are 32 times slower
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name in KERNEL_SETTINGS:
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment


def require_device(precision: Precision) -> None:
    """Raises EnvironmentFault where this process does not have the device."""
    if precision.device == "cuda":
        cuda.require()


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one: tensors of a few MB would come back from the
    system page by page (3 to 5% of a step). Nothing elsewhere; reaches no bit."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def pin_threads(threads: int, precision: Precision = DEFAULT_PRECISION) -> None:
    """Set torch, in this process, to the number of threads and the kernels of the fingerprint. Raises
    EnvironmentFault without the device."""
    if precision.device == "cuda":
        cuda.pin()
    import torch

    if precision.device == "cpu":
        cuda.fix_attention(plain=False)

    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.mkldnn.set_flags(True)  # type: ignore[no-untyped-call]
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs time; the flag above would turn it on.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def usual_modes(precision: Precision = DEFAULT_PRECISION) -> Iterator[None]:
    """Run torch as in a process that has set none of its modes, then as before: autocast, inference,
    gradients switched off and another default dtype reach bits, too."""
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
