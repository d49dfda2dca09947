"""A base of one's own: the block `base_model: {scratch: ...}` of the run file.

Rules: the corpus is declared to hold no deletable record; what it is not can't be checked here, but what
it shares with the records is refused (`overlap.py`).

Not covered: training it (`scratch.py`).

>>> ScratchBase.model_validate({"scratch": {"corpus": [{"path": "corpus.jsonl"}]}}).scratch.layers
6
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from sisa.core.config_types import Block, DatasetSource, Float, Int, LocalPath, Name, conflict

PATH_FIELDS = ("corpus", "directory")  # of the block, what names places and not the base
NAMED, MADE = "<name>", "<block>"  # never a key: they stand in the places of errors


class Scratch(Block):
    """What the base is and what it is trained on."""

    corpus: Annotated[tuple[DatasetSource, ...], Field(min_length=1)] = Field(
        description="Texts without deletable records: JSONL, Parquet or dataset with a column `text`."
    )
    directory: LocalPath | None = Field(
        default=None, description="Where the base is kept; null: beside output_dir, named after it."
    )
    architecture: Literal["llama"] = Field(default="llama", description="Kind of decoder.")
    vocab_size: Int = Field(default=4096, ge=512, le=1 << 18, description="Words of its tokenizer.")
    layers: Int = Field(default=6, ge=1, le=256, description="Decoder layers.")
    hidden_size: Int = Field(default=320, ge=8, le=1 << 15, description="Width.")
    intermediate_size: Int = Field(default=896, ge=8, le=1 << 17, description="Width within a layer.")
    heads: Int = Field(default=5, ge=1, le=1024, description="Attention heads; they divide hidden_size.")
    context_len: Int = Field(default=256, ge=16, le=1 << 20, description="Longest text, in tokens.")
    tokens: Int = Field(default=1_000_000, ge=1, description="Tokens of the training, passes counted.")
    batch_size: Int = Field(default=16, ge=1, le=65_536, description="Rows of context_len in a step.")
    learning_rate: Float = Field(default=2e-3, gt=0, le=100, description="Peak learning rate (cosine).")
    weight_decay: Float = Field(default=0.01, ge=0, le=100, description="Weight decay per step.")
    seed: Int = Field(default=42, ge=0, le=(1 << 31) - 1, description="Seed of weights and orders.")
    workers: Int = Field(default=1, ge=1, le=1024, description="Ray Train workers (data parallel).")
    threads: Int = Field(default=1, ge=1, le=1024, description="CPU threads of a worker.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Scratch:
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            message = (
                f"conflict: hidden_size {self.hidden_size} is no even multiple of heads {self.heads}"
            )
            raise conflict(message)
        return self


class ScratchBase(Block):
    """A base that is trained before the first shard, and frozen."""

    scratch: Scratch = Field(description="The base and its corpus.")


def same_base(one: Any, other: Any) -> bool:
    """Whether two blocks, as JSON values, differ in nothing but where corpus and base lie.

    >>> same_base({"scratch": {"layers": 2, "directory": "a"}}, {"scratch": {"layers": 2}})
    True
    """
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one == other)
    kept = [{k: v for k, v in each["scratch"].items() if k not in PATH_FIELDS} for each in (one, other)]
    return bool(kept[0] == kept[1])


def _form(value: Any) -> str:
    return MADE if isinstance(value, dict | ScratchBase) else NAMED


BaseModelKey = Annotated[
    Annotated[Name, Tag(NAMED)] | Annotated[ScratchBase, Tag(MADE)], Discriminator(_form)
]
