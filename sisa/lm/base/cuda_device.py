"""The CUDA device: whether this process has one, its part of the fingerprint, and how its bits repeat.

    cuBLAS            a workspace of fixed size (`CUBLAS_WORKSPACE_CONFIG`), set before CUDA starts
    float32 products  in float32: no TF32, no reduced precision in the sums of bfloat16 products
    cuDNN             deterministic kernels only, without trying out which is fastest
    attention         the plain kernel: fused ones have backward passes that differ between GPU
                      generations and, by default, sum in no fixed order

The first is set here, the others by `numerics.pin_threads`. An environment setting that would change
bits is refused, never overridden. torch is imported only to ask for the device.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sisa.core.domain import Precision
from sisa.core.errors import EnvironmentFault

WORKSPACE, REPEATING = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # values whose results repeat
CUDA_SETTINGS = (
    *(WORKSPACE, "CUBLASLT_WORKSPACE_SIZE", "NVIDIA_TF32_OVERRIDE", "TORCH_BLAS_PREFER_CUBLASLT"),
)


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
