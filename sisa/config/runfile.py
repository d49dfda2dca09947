"""Read a run file: parse its YAML once and list every problem with its line.

Unknown and repeated keys, wrong types, impossible values and conflicts are reported together. `1e-3` is
a number, as in YAML 1.2. Anchors, aliases, a second document and tags that change a kind are refused.

>>> text = 'datasets: [{path: a.jsonl}]\\noutput_dir: model\\nlearning_rate: 1e-3\\nsisa: {shards: 8}'
>>> config = parse_run_file(text, "run.yaml")
>>> config.layout, config.learning_rate
(Layout(num_shards=8, num_slices=3), 0.001)
>>> try:
...     parse_run_file(text + "\\nlora_rank: 8", "run.yaml")
... except InvalidInput as error:
...     error.problems[0].where, error.problems[0].what
('line 5: lora_rank', "unknown key; did you mean 'lora_r'?")
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sisa.config.config import BY_BLOCK, BY_NAME, KeyPath, RunConfig, keys, raw_schema, value_at
from sisa.config.fields import short, shown
from sisa.config.paths import resolve_paths, shared_path_problems
from sisa.core.errors import InvalidInput, Problem

MAX_RUN_FILE_BYTES = 1 << 18
MAX_RUN_FILE_DEPTH = 8
MAX_NUMBER_CHARS = 400  # more than any finite float has; longer ones take quadratic time to convert
MAX_PROBLEMS = 1000
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
PathProblems = Callable[[dict[str, Any]], Iterable[tuple[KeyPath, str]]]


def load_run_file(path: Path, unchecked: Collection[str] = ()) -> RunConfig:
    """Read a run file and make its local paths absolute. Raise InvalidInput with every problem.

    Paths below the keys in `unchecked` need not exist: the caller replaces them.
    """
    directory = Path(os.path.abspath(path)).parent

    def check_paths(data: dict[str, Any]) -> Iterator[tuple[KeyPath, str]]:
        found = resolve_paths(data, directory)
        return ((path, what) for path, what in found if not set(unchecked) & set(path))

    return parse_run_file(_read(path), str(path), check_paths)


def load_for_cluster(path: Path) -> tuple[str, RunConfig]:
    """Return a run file's text and config, to be sent to a cluster. Raise InvalidInput."""
    text, directory = _read(path), Path(os.path.abspath(path)).parent
    return text, parse_run_file(text, str(path), lambda data: shared_path_problems(data, directory))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RUN_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidInput(
            "the run file can't be read",
            where=str(path),
            got=str(error.strerror),
            next_step="name a run file; `sisa init DIR` writes one",
        ) from None
    if len(data) > MAX_RUN_FILE_BYTES:
        raise _refusal([Problem(path.name, f"longer than {MAX_RUN_FILE_BYTES} bytes")], str(path))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problem = Problem(f"line {line}", f"invalid UTF-8 at byte {error.start + 1} of the file")
        raise _refusal([problem], str(path)) from None


def parse_run_file(text: str, where: str, check_paths: PathProblems = lambda _data: ()) -> RunConfig:
    """Parse a run file's text. Raise InvalidInput with every problem. `check_paths` may change paths."""
    parser = _Parser()
    data = parser.read(text)
    if not isinstance(data, dict):
        raise _refusal(parser.problems, where)
    for path, what in check_paths(data):
        parser.add(path, what)
    try:
        config = RunConfig.model_validate(data)
        if not parser.problems:
            return config
    except ValidationError as error:
        known = {each.where for each in parser.problems}
        for path, what in _explained(error, data):
            parser.add(path, what, known)
    raise _refusal(parser.problems, where)


def _refusal(problems: list[Problem], where: str) -> InvalidInput:
    def line_of(problem: Problem) -> int:
        found = re.match(r"line (\d+)", problem.where)
        return int(found[1]) if found else 0

    unique = sorted(dict.fromkeys(problems), key=line_of)
    listed = unique[:MAX_PROBLEMS]
    if left := len(unique) - len(listed):
        listed.append(Problem("the run file", f"{left} more problems are not listed"))
    return InvalidInput(
        f"{len(unique)} problem{'s' * (len(unique) != 1)} in the run file; nothing was done",
        where=where,
        next_step="correct the run file; `sisa config schema` describes every key",
        problems=listed,
    )


@dataclass
class _Parser:
    """Parser of YAML text into plain data; keeps the line of every key and every problem."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    loader: Any = field(default_factory=lambda: yaml.SafeLoader(""))

    def add(self, path: KeyPath, what: str, known: Collection[str] = ()) -> None:
        """Add a problem of a key, unless its location is among those `known` to have one."""
        at = path
        while at and at not in self.lines:
            at = at[:-1]
        self._add(self.lines.get(at, 1), what, path, known)

    def _add(self, line: int, what: str, path: KeyPath = (), known: Collection[str] = ()) -> None:
        where = f"line {line}: {_dotted(path)}" if path else f"line {line}"
        if where not in known:
            self.problems.append(Problem(where, what))

    def read(self, text: str) -> Any:
        """Return the document's mapping, or None with at least one problem."""
        try:
            if not self._is_plain(text):
                return None
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            self._add(_line(error.problem_mark), f"not valid YAML: {error.problem}")
            return None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._add(line, "not valid YAML: a character that isn't allowed")
            return None
        if not isinstance(node, yaml.MappingNode):
            kind = "an empty document" if node is None else "something else"
            self._add(1, f"expected a mapping of keys to values, got {kind}")
            return None
        return self._value(node, ())

    def _is_plain(self, text: str) -> bool:
        """Return whether a text is one shallow document without anchors, which could grow or loop."""
        depth = documents = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            line = _line(event.start_mark)
            documents += isinstance(event, yaml.DocumentStartEvent)
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) is not None:
                self._add(line, "anchors and aliases aren't allowed")
            elif depth > MAX_RUN_FILE_DEPTH or documents > 1:
                what = (
                    "more than one document"
                    if documents > 1
                    else f"nested deeper than {MAX_RUN_FILE_DEPTH}"
                )
                self._add(line, what)
                return False
        return not self.problems

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, _line(node.start_mark))
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if node.tag != self.loader.resolve(type(node), node.value, (plain, not plain)):
            self.add(path, f"the tag {shown(node.tag)} isn't allowed")
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path))
        if isinstance(node, yaml.SequenceNode):
            return [self._value(each, (*path, index)) for index, each in enumerate(node.value)]
        return self._scalar(node, path)

    def _items(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, Any]]:
        for key_node, value_node in node.value:
            line = _line(key_node.start_mark)
            key = key_node.value
            if not isinstance(key, str) or not key_node.tag.endswith((":str", ":merge", ":value")):
                self._add(line, "expected a string as a key", path)
                continue
            inner = (*path, key)
            if inner in self.lines:
                self._add(line, f"given twice, first on line {self.lines[inner]}", inner)
                continue
            self.lines[inner] = line
            yield key, self._value(value_node, inner)

    def _scalar(self, node: Any, path: KeyPath) -> Any:
        plain, short_enough = node.style is None, len(node.value) <= MAX_NUMBER_CHARS
        if plain and short_enough and _EXPONENT.fullmatch(node.value):
            return float(node.value)  # YAML 1.2; PyYAML takes 1e-3 for a text
        try:
            if not short_enough and node.tag.endswith((":int", ":float")):
                raise ValueError
            return self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError, ArithmeticError):
            self.add(path, f"not a value of its type: {shown(node.value)}")
            return None


def _line(mark: Any) -> int:
    return 1 if mark is None else int(mark.line) + 1


def _dotted(path: KeyPath) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{short(part)}" for part in path)
    return text.removeprefix(".")


def _explained(error: ValidationError, data: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield (key path, problem) in the words of the schema, once for all members of a union."""
    seen: set[tuple[KeyPath, str, str]] = set()
    for each in error.errors(include_url=False):
        loc = tuple(part for part in each["loc"] if part not in (BY_NAME, BY_BLOCK))
        path, fragment = (loc, {}) if each["type"] == "extra_forbidden" else _fragment(loc)
        if (key := (path, each["type"], each["msg"])) not in seen:
            seen.add(key)
            yield path, _what(each, path, fragment, data)


def _what(error: Any, path: KeyPath, fragment: dict[str, Any], data: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key" + _suggestion(path)
    if error["type"] == "conflict":
        return str(error["msg"])
    if error["type"] == "missing":
        return f"missing; expected {in_words(fragment)}"
    try:
        got = shown(value_at(data, path))
    except (KeyError, TypeError, IndexError):
        got = shown(error["input"])  # `aggregation: routed` has no `method` of its own
    return f"expected {in_words(fragment)}, got {got}"


def _suggestion(path: KeyPath) -> str:
    name = str(path[-1])
    beside = _properties(_fragment(path[:-1])[1])
    elsewhere = [key for key in keys() if key.rsplit(".", 1)[-1] == name]
    close = elsewhere or difflib.get_close_matches(name, beside, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known here: {', '.join(beside)}"


def _fragment(loc: KeyPath) -> tuple[KeyPath, dict[str, Any]]:
    """Return a location without pydantic's tags of union members, and its schema."""
    schema = raw_schema()
    for depth, part in enumerate(loc):
        known = _properties(schema)
        if isinstance(part, int) and "items" in schema:
            schema = schema["items"]
        elif part in known:
            schema = known[part]
        elif isinstance(schema.get("additionalProperties"), dict):  # names that the user chooses
            schema = schema["additionalProperties"]
        else:
            return loc[:depth], schema
    return loc, schema


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    schema = _followed(schema)
    found: dict[str, Any] = dict(schema.get("properties", {}))
    for each in (*schema.get("oneOf", []), *schema.get("anyOf", [])):
        found |= _properties(each)
    return found


def _followed(schema: dict[str, Any]) -> dict[str, Any]:
    target: dict[str, Any] = schema
    if "$ref" in schema:
        target = raw_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    return target


_TYPES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def in_words(schema: dict[str, Any]) -> str:
    """Return what a value must be, by its JSON Schema.

    >>> in_words({"type": "integer", "minimum": 1, "maximum": 64})
    'an integer from 1 to 64'
    >>> in_words({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]})
    'a number above 0 or null'
    """
    schema = _followed(schema)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(in_words(each) for each in choices))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(map(repr, schema["enum"]))
    kind = "a path" if schema.get("format") == "path" else _TYPES[schema["type"]]
    if "pattern" in schema:
        kind = "a printable string"
    if schema.get("minItems"):
        kind = "a non-empty list"
    if {"minimum", "maximum"} <= schema.keys():
        return f"{kind} from {schema['minimum']} to {schema['maximum']}"
    bounds = [f"{words} {schema[name]}" for name, words in _BOUNDS.items() if name in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()
