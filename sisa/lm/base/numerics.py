"""The numerics fingerprint: what reaches the bits of a weight besides the records and the run file.

Two machines with the same fingerprint train the same bytes, and a checkpoint's key covers it. torch
reads the settings when it is imported, so a worker's environment must hold `worker_environment` before
that. This module does not import torch unless it describes a CUDA device, so commands that only compare
fingerprints stay fast. If no CUDA device is present, the fingerprint is one under which nothing was ever
trained.

>>> describe_fingerprint(threads=1)["threads"], len(fingerprint(threads=1))
(1, 64)

These settings make the bits of a CUDA device repeat:

    cuBLAS            a workspace of fixed size (`CUBLAS_WORKSPACE_CONFIG`), set before CUDA starts
    float32 products  in float32: no TF32, no reduced precision in the sums of bfloat16 products
    cuDNN             deterministic kernels only, without trying out which is fastest
    attention         the plain kernel: fused ones have backward passes that differ between GPU
                      generations and, by default, sum in no fixed order

An environment setting that would change bits is refused, never overridden. Equality across processors,
GPU models, driver versions or CUDA versions is not promised; they have different fingerprints.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.domain import DEFAULT_PRECISION, Precision
from sisa.core.errors import EnvironmentFault

# Raised with every change of code that reaches the bits of a stage: tests/procedure.py says how.
PROCEDURE_VERSION = 5
MMAP_THRESHOLD_BYTES, TRIM_THRESHOLD_BYTES = 64 << 20, 256 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LIBRARIES = ("numpy", "peft", "safetensors", "tokenizers", "torch", "transformers")
KERNEL_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
)
WORKSPACE, REPEATING = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # values whose results repeat
CUDA_SETTINGS = (
    *(WORKSPACE, "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT"),
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


def cuda_environment() -> dict[str, str]:
    """Return the environment variables that must be set before torch is imported."""
    own = {name: os.environ[name] for name in CUDA_SETTINGS if name in os.environ}
    return {WORKSPACE: REPEATING[0], **own}


def prepare_device() -> None:
    """Set cuBLAS's workspace. Raise EnvironmentFault if it is too late, or set to another kind."""
    torch = sys.modules.get("torch")
    held = os.environ.get(WORKSPACE)
    if held is None and not (torch is not None and torch.cuda.is_initialized()):
        os.environ[WORKSPACE] = held = REPEATING[0]
    if held not in REPEATING:
        raise EnvironmentFault(
            "cuBLAS would not repeat its results bit for bit",
            where=WORKSPACE,
            expected=" or ".join(REPEATING) + ", before CUDA is first used in the process",
            got=held or "nothing, and CUDA is already in use",
            next_step=f"export {WORKSPACE}={REPEATING[0]} and run the command again",
        )


def require_device(precision: Precision) -> None:
    """Raise EnvironmentFault if this process does not have the device."""
    if precision.device == "cpu":
        return
    prepare_device()
    import torch

    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}"
        raise EnvironmentFault(
            "the run file asks for a CUDA device, but this process sees none",
            where="device: cuda",
            expected="an NVIDIA GPU, its driver, and a CUDA build of torch",
            got=built if torch.version.cuda else f"{built}, a build without CUDA",
            next_step="use a machine with a GPU (check `nvidia-smi`, CUDA_VISIBLE_DEVICES and, on "
            "Ray, `cluster.num_gpus`), or set `device: cpu`",
        )


@cache
def describe_device() -> dict[str, Any] | None:
    """Return the device's part of the fingerprint; None if there is no device."""
    prepare_device()
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "model": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "attention": "math",
    }


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the NVIDIA driver's version; None if the system does not report it.

    The first line reads `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  <date>`.
    """
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split()
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)


def seed_from(*parts: object) -> int:
    """Return a seed for torch that depends on all parts."""
    name = "|".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
