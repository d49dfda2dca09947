"""A CUDA device: what names it in the numerics fingerprint, and what makes its bits repeat.

    cuBLAS            a workspace of fixed size (`CUBLAS_WORKSPACE_CONFIG`), before CUDA starts
    float32 products  in float32: no TF32, no reduced precision in the sums of bfloat16 products
    cuDNN             no trying out of kernels, deterministic ones alone
    attention         the plain kernel (matrix product, softmax, matrix product): the fused ones have
                      backward passes of their own, which differ by GPU generation and sum in no fixed
                      order unless told to; it takes memory in the square of the length

Rules: torch is imported by what needs it, after the environment is set. A setting of the environment
that would make bits differ is refused, never overridden. Random numbers need no state kept: the
trainer seeds all devices anew before each micro-batch.

Not covered: more than one device; a process that has used CUDA for other things before, without the
workspace; equality across GPU models, driver or CUDA versions, which are other fingerprints.

    require()
    describe()   # {"model": "NVIDIA H100 80GB HBM3", "capability": "9.0", ...}
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
    """What must be set before torch is imported."""
    own = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {WORKSPACE: REPEATING[0], **own}


def prepare_device() -> None:
    """Set this process's environment. Raises EnvironmentFault where that comes too late, or where it is
    set to something that does not repeat."""
    torch = sys.modules.get("torch")
    held = os.environ.get(WORKSPACE)
    if held is None and not (torch is not None and torch.cuda.is_initialized()):
        os.environ[WORKSPACE] = held = REPEATING[0]
    if held not in REPEATING:
        raise EnvironmentFault(
            "cuBLAS would not give the same bits again",
            where=WORKSPACE,
            expected=" or ".join(REPEATING) + ", before CUDA is first used in the process",
            got=held or "nothing, and CUDA is in use",
            next_step=f"export {WORKSPACE}={REPEATING[0]}, and start again",
        )


def require() -> None:
    """Raises EnvironmentFault where there is no CUDA device."""
    prepare_device()
    import torch

    if not torch.cuda.is_available():
        built = f"torch {torch.__version__}"
        raise EnvironmentFault(
            "the run file asks for a CUDA device, and this process sees none",
            where="device: cuda",
            expected="an NVIDIA GPU, its driver, and a CUDA build of torch",
            got=built if torch.version.cuda else f"{built}, a build without CUDA",
            next_step="run it on a machine with a GPU (see `nvidia-smi`, CUDA_VISIBLE_DEVICES and, on "
            "Ray, `cluster.num_gpus`), or set `device: cpu`",
        )


def pin() -> None:
    """Set this process to kernels that repeat. Raises EnvironmentFault without a device."""
    require()
    import torch

    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    fix_attention(plain=True)


def fix_attention(*, plain: bool) -> None:
    """The plain kernel alone, or as torch chooses. The switches are those of the CPU's kernels, too, so
    a process that goes back to the CPU must set them back."""
    from torch.backends import cuda

    cuda.enable_math_sdp(True)
    cuda.enable_flash_sdp(not plain)
    cuda.enable_mem_efficient_sdp(not plain)
    cuda.enable_cudnn_sdp(not plain)


@cache
def describe() -> dict[str, Any] | None:
    """What names the device in the fingerprint; None where there is none."""
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
    """The NVIDIA driver's version; None where the system does not tell.

    The first line reads `NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  <date>`.
    """
    if not path.is_file():
        return None
    words = path.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split()
    return next((word for word in words if word.replace(".", "").isdigit() and "." in word), None)
