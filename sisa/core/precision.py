"""Device and data type that a shard's base computes with.

    device   cpu, or cuda: the first CUDA device that the process sees
    dtype    of the base's weights and activations. Adapters, their gradients and the optimizer's moments
             are always in float32: in bfloat16, with 8 bits of precision, most steps of a small learning
             rate would round away, and moments that decay by 0.999 would stop changing

Both affect the bits, so they are in the numerics fingerprint and, unless they are the defaults, in every
job. Jobs with the defaults name neither, so their keys equal those of versions without a choice.

>>> Precision().in_jobs(), Precision("cuda", "bfloat16").in_jobs()
({}, {'device': 'cuda', 'dtype': 'bfloat16'})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

DeviceName = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Precision:
    """A device and a data type."""

    device: DeviceName = "cpu"
    dtype: Dtype = "float32"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the keys that a job may have."""
        return tuple(_DEFAULTS)

    def in_jobs(self) -> dict[str, Any]:
        """Return what a job's `training` says of it."""
        return {name: value for name, value in asdict(self).items() if value != _DEFAULTS[name]}

    def is_of(self, training: Mapping[str, Any]) -> bool:
        """Return whether a job with this `training` is to be computed with this device and data type."""
        return {each: training[each] for each in _DEFAULTS if each in training} == self.in_jobs()


DEFAULT_PRECISION = Precision()
_DEFAULTS = {"device": DEFAULT_PRECISION.device, "dtype": DEFAULT_PRECISION.dtype}
