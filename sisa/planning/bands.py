"""Bands: a record's own deletion risk chooses its slice; the likeliest to be deleted get the last ones.

    bands:
      thresholds: [0.01, 0.1]      # three bands: below 0.01, from 0.01 on, from 0.1 on
      classes: {trial: 0.3}        # names that records may carry instead of a number
      unknown: 0.0                 # the risk of a record that carries none

The band of a record is the number of thresholds that its risk reaches. Of `n` bands, band `b` has the
slices from b * slices // n up to those of the next. Within a band, a record hashes to a slice.
Thresholds are fixed in the run file and never fitted on the data, so a deletion moves no other record.
A deletion from slice r retrains the slices from r on; records that are often deleted therefore belong
in late slices. All records of a subject carry the same risk, because they share a slice.

>>> bands = Bands(thresholds=(0.1,), classes={"trial": 0.3})
>>> [list(bands.slices(risk, 5)) for risk in (None, 0.05, 0.1, "trial")]
[[0, 1], [0, 1], [2, 3, 4], [2, 3, 4]]

Source: SISA, Bourtoule et al. 2021, section VI (a priori knowledge of who asks), on slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from sisa.core.block import Block, Float, conflict
from sisa.core.domain import RISK_COLUMN, Record, Risk
from sisa.core.errors import InvalidInput, Problem

NO_CLASS = f"'{RISK_COLUMN}' is not a class of sisa.bands.classes"
AtLeastZero = Annotated[Float, Field(ge=0)]


class Bands(Block):
    """The slices that a record's deletion risk allows."""

    thresholds: tuple[AtLeastZero, ...] = Field(description="Ascending risks, each the start of a band.")
    classes: dict[str, AtLeastZero] = Field(
        default={}, description="Risk of each class that records may name."
    )
    unknown: AtLeastZero = Field(default=0.0, description="Risk of a record without one.")

    @model_validator(mode="after")
    def _ascending(self) -> Bands:
        if not self.thresholds:
            raise conflict("conflict: bands need a threshold")
        if sorted(set(self.thresholds)) != list(self.thresholds):
            raise conflict("conflict: thresholds must ascend")
        return self

    @property
    def num_bands(self) -> int:
        return len(self.thresholds) + 1

    def fits(self, num_slices: int) -> bool:
        """Return whether there is a slice for each band."""
        return self.num_bands <= num_slices

    def slices(self, risk: Risk, num_slices: int) -> range:
        """Return the slices of a risk's band. Raise InvalidInput for an unknown class."""
        if isinstance(risk, str):
            if risk not in self.classes:
                raise InvalidInput(f"a record's {NO_CLASS}", next_step="name the class there")
            risk = self.classes[risk]
        value = self.unknown if risk is None else risk
        return self._of_band(sum(value >= each for each in self.thresholds), num_slices)

    def _of_band(self, band: int, num_slices: int) -> range:
        return range(band * num_slices // self.num_bands, (band + 1) * num_slices // self.num_bands)

    def slice_risks(self, num_slices: int) -> tuple[float, ...]:
        """Return a risk for each slice: the middle of its band, or the threshold of the last band.

        >>> Bands(thresholds=(0.1, 0.3)).slice_risks(3)
        (0.05, 0.2, 0.3)
        """
        edges = (0.0, *self.thresholds, self.thresholds[-1])
        return tuple(
            (low + high) / 2
            for band, (low, high) in enumerate(pairwise(edges))
            for _ in self._of_band(band, num_slices)
        )


def risk_problems(bands: Bands | None, records: Sequence[Record]) -> Iterator[Problem]:
    """Yield what is wrong with the risks of records, by position from 1, without names."""
    first: dict[str, tuple[int, Risk]] = {}
    for position, record in enumerate(records, start=1):
        where, risk = f"record {position}", record.deletion_risk
        if bands is not None and isinstance(risk, str) and risk not in bands.classes:
            yield Problem(where, f"its {NO_CLASS}")
        if record.subject_id is None:
            continue
        at, other = first.setdefault(record.subject_id, (position, risk))
        if risk != other:
            yield Problem(
                where, f"its '{RISK_COLUMN}' differs from that of record {at} of the same subject"
            )
