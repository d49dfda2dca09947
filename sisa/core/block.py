"""Strict, frozen pydantic models: what the blocks of the run file are made of.

Numbers are strict (`true` and `'3'` are not integers) and finite; unknown keys are errors.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Strict
from pydantic_core import PydanticCustomError

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]


class Block(BaseModel):
    """A frozen model that refuses unknown keys and infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


def conflict(message: str) -> PydanticCustomError:
    """Return the validation error for a well-formed value that contradicts another one."""
    return PydanticCustomError("conflict", "{message}", {"message": message})
