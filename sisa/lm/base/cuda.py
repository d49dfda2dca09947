"""A CUDA device: its part of the numerics fingerprint, and the settings that make its bits repeat.

    cuBLAS            a workspace of fixed size (`CUBLAS_WORKSPACE_CONFIG`), set before CUDA starts
    float32 products  in float32: no TF32, no reduced precision in the sums of bfloat16 products
    cuDNN             deterministic kernels only, without trying out which is fastest
    attention         the plain kernel: matrix product, softmax, matrix product

Fused attention kernels have backward passes that differ between GPU generations and, by default, sum in
no fixed order. The plain kernel takes memory quadratic in the length.

This module imports torch inside functions, after the environment is set. An environment setting that
would change bits is refused, never overridden. The state of random generators need not be kept: the
trainer seeds all devices anew before each micro-batch. One device is used. Equality across GPU models,
driver versions or CUDA versions is not promised; they have different fingerprints.

    require()
    describe_device()   # {"model": "NVIDIA H100 80GB HBM3", "capability": "9.0", ...}
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sisa.core.errors import EnvironmentFault

WORKSPACE, REPEATING = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
SETTINGS = (WORKSPACE, "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT")
ATTENTION = "math"
NO_DEVICE = "no CUDA device"


def environment() -> dict[str, str]:
    """Return the environment variables that must be set before torch is imported."""
    own = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {WORKSPACE: REPEATING[0], **own}


def prepare_device() -> None:
    """Set this process's environment.

    Raises EnvironmentFault if CUDA is already in use without it, or if it is set to a value under which
    cuBLAS does not repeat its results.
    """
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


def require() -> None:
    """Raise EnvironmentFault if there is no CUDA device."""
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


def pin() -> None:
    """Restrict this process to deterministic kernels. Raises EnvironmentFault without a device."""
    require()
    import torch

    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    fix_attention(plain=True)


def fix_attention(*, plain: bool) -> None:
    """Allow the plain attention kernel only, or let torch choose.

    The switches also concern the CPU's kernels, so a process that returns to the CPU must reset them.
    """
    from torch.backends import cuda

    cuda.enable_math_sdp(True)
    cuda.enable_flash_sdp(not plain)
    cuda.enable_mem_efficient_sdp(not plain)
    cuda.enable_cudnn_sdp(not plain)


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
        "attention": ATTENTION,
    }


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the NVIDIA driver's version; None if the system does not report it.

    The first line reads `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  <date>`.
    """
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split()
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)
