"""The block `aggregation:` of the run file: how the shards answer together.

Rules: a bare name stands for a block with that method alone. What has no meaning for a method can't be
given beside it. No key reaches a bit of an adapter.

Not covered: the methods themselves (`lm/answer/aggregate.py`, `lm/answer/route.py`).

>>> Aggregation(method="mean_prob").model_dump()
'mean_prob'
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from sisa.core.config_types import Block, Float, Int, conflict


class Aggregation(Block):
    """How the shards answer together. All but `method` have a meaning for `routed` alone."""

    method: Literal["routed", "mean_prob", "mean_logit", "vote", "merged"] = Field(
        default="routed",
        description="Shards near the prompt; or all: means, vote, or one averaged adapter.",
    )
    top_k: Int = Field(
        default=1, ge=1, le=10_000, description="Number of shards that a prompt is routed to."
    )
    temperature: Float = Field(default=0.04, gt=0, description="The lower, the more the nearest counts.")
    min_score: Annotated[Float, Field(ge=-2, le=2)] | Literal["auto"] | None = Field(
        default="auto", description="Least nearness of a shard; auto: what was measured of the embedder."
    )
    below: Literal["base", "mean_prob"] = Field(default="base", description="Who answers below it.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _nothing_else_of_all(self) -> Aggregation:
        given = sorted(self.model_fields_set - {"method"})
        if self.method != "routed" and given:
            raise conflict(f"conflict: {self.method} asks all shards, so {given[0]} can't be given")
        return self

    @model_serializer
    def _shortest(self) -> str | dict[str, Any]:
        if self.method != "routed":
            return self.method
        fields = type(self).model_fields
        changed = {name: each for name, each in self.__dict__.items() if each != fields[name].default}
        return {"method": self.method, "top_k": self.top_k, **changed}
