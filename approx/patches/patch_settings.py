"""The settings of a patch, as the JSON values in its job, parsed with every problem reported at once.

    method           one of `methods/registry.py`, with its hyper-parameters
    adapter          rank, scale and modules of the LoRA patch
    pace             learning rate, batches, epochs, rounds, seed: `schedule.ScheduleSettings`
    bounds           max_utility_drop, target_probability, check_every: `stopping.BoundSettings`
    sequence_len     longer texts are cut to it or refused, as `overlength` says
    procedure        how patches are made; a job of another procedure is refused

All defaults are written out, so that a job names everything that reaches its bits. A limit in seconds
is not a setting: it says when to put a run aside, not what the patch becomes. On the command line
settings have one flat namespace.

Source of the defaults: a patch needs about ten times the rate of full weights (`schedule.py`). Each
later round is stronger (`descent.py`), until nothing is known or the bound on utility stops it.

>>> found = parse_settings(settings_of("npo", {"beta": 0.2, "num_epochs": 3}, Adapter(), seed=1))
>>> found.method, found.pace.num_epochs, found.bounds.max_utility_drop
(Npo(beta=0.2, forget_weight=1.0, retain_weight=1.0, retain_loss='nll'), 3, 0.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar, get_args

from approx.methods.method import (
    Method,
    check_values,
    hyperparameters,
    one_of,
    whole_numbers,
)
from approx.methods.registry import METHODS, make_method
from approx.methods.task_arithmetic import TaskArithmetic
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.stopping import BoundSettings
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import Overlength

_T = TypeVar("_T")
PROCEDURE = 2  # raise when the same settings would make another patch
DEFAULT_SEQUENCE_LEN = 512
DEFAULT_PACE = {
    "learning_rate": 3e-4,
    "num_epochs": 40,
    "max_steps": 40,
    "num_rounds": 10,
    "batch_size": 4,
    "retain_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "weight_decay": 0.0,
}
DEFAULT_BOUNDS = {"max_utility_drop": 0.1, "target_probability": 0.1, "check_every": 10}
METHOD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"dpo": {"retain_weight": 1.0}}
BLOCKS = ("hyperparameters", "adapter", "pace", "bounds")
NAMES = ("method", *BLOCKS, "sequence_len", "overlength", "procedure")


@dataclass(frozen=True)
class Adapter:
    """The LoRA patch: a module changes by (lora_alpha / lora_r) times the product of two factors."""

    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        check_values("the adapter", self._bad())

    def _bad(self) -> Iterator[Problem]:
        for name, largest in (("lora_r", 4096), ("lora_alpha", 65_536)):
            yield from whole_numbers(1, largest, **{name: getattr(self, name)})
        modules = self.lora_target_modules
        named = isinstance(modules, tuple) and modules and all(isinstance(each, str) for each in modules)
        if modules != "all-linear" and not named:
            yield Problem("lora_target_modules", f"{modules!r}, expected names, or all-linear")


@dataclass(frozen=True)
class PatchSettings:
    """Validated settings."""

    method: Method
    adapter: Adapter
    pace: ScheduleSettings
    bounds: BoundSettings
    sequence_len: int
    overlength: Overlength

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a job holds them: JSON values only."""
        return {
            "method": self.method.name,
            "hyperparameters": _listed(hyperparameters(self.method)),
            "adapter": _listed(asdict(self.adapter)),
            "pace": asdict(self.pace),
            "bounds": asdict(self.bounds),
            "sequence_len": self.sequence_len,
            "overlength": self.overlength,
            "procedure": PROCEDURE,
        }


def settings_of(
    method: str,
    values: Mapping[str, Any],
    adapter: Adapter,
    *,
    seed: int = 0,
    sequence_len: int = DEFAULT_SEQUENCE_LEN,
    overlength: Overlength = "refuse",
) -> dict[str, Any]:
    """Return settings as JSON values from flat `values`, with the method's defaults for the rest.

    `adapter`, `seed`, `sequence_len` and `overlength` are those of the run. Raise InvalidInput with
    every problem.
    """
    known = _flat_names(method)
    problems = [
        Problem(each, "unknown; known are " + ", ".join(sorted(known)))
        for each in values
        if each not in known
    ]
    blocks: dict[str, dict[str, Any]] = {
        "hyperparameters": dict(METHOD_DEFAULTS.get(method, {})),
        "adapter": asdict(adapter),
        "pace": {**DEFAULT_PACE, "seed": seed},
        "bounds": dict(DEFAULT_BOUNDS),
    }
    for name, value in values.items():
        if name in known:
            blocks[known[name]][name] = value
    texts = {"sequence_len": sequence_len, "overlength": overlength}
    return _parsed({"method": method, **blocks, **texts, "procedure": PROCEDURE}, problems).to_json()


def _flat_names(method: str) -> dict[str, str]:
    """Return the block of every name in a method's settings."""
    own = {each.name: "hyperparameters" for each in fields(METHODS[method])} if method in METHODS else {}
    return {
        **{each.name: "adapter" for each in fields(Adapter)},
        **{each.name: "pace" for each in fields(ScheduleSettings)},
        **{each.name: "bounds" for each in fields(BoundSettings)},
        **own,
    }


def parse_settings(given: Mapping[str, Any]) -> PatchSettings:
    """Return validated settings. Raise InvalidInput with every problem."""
    return _parsed(given, [])


@dataclass
class _Parts:
    """The blocks of settings, built one after another, and every problem found in them."""

    problems: list[Problem]
    made: dict[str, Any] = field(default_factory=dict)

    def make(self, name: str, build: Callable[[], Any]) -> None:
        try:
            self.made[name] = build()
        except InvalidInput as error:
            self.problems += error.as_problems(name)
        except TypeError:
            self.problems.append(Problem(name, "a value of the wrong type"))


def _parsed(given: Mapping[str, Any], problems: list[Problem]) -> PatchSettings:
    problems += [Problem(each, "unknown") for each in given if each not in NAMES]
    if given.get("procedure") != PROCEDURE:
        problems.append(
            Problem("procedure", "of another version: revert the patch and request it again")
        )
    blocks = {name: _block(given, name, problems) for name in BLOCKS}
    method = str(given.get("method", ""))
    parts = _Parts(problems)
    parts.make("hyperparameters", lambda: make_method(method, _tuples(blocks["hyperparameters"])))
    parts.make("adapter", lambda: _build("adapter", Adapter, _tuples(blocks["adapter"])))
    parts.make("pace", lambda: _build("pace", ScheduleSettings, blocks["pace"]))
    parts.make("bounds", lambda: _build("bounds", BoundSettings, blocks["bounds"]))
    length = given.get("sequence_len", DEFAULT_SEQUENCE_LEN)
    overlength = given.get("overlength", "refuse")
    parts.problems += one_of(get_args(Overlength), overlength=overlength)
    parts.problems += whole_numbers(2, sequence_len=length)
    found: Any = parts.made.get("hyperparameters")
    drop = blocks["bounds"].get("max_utility_drop")
    if isinstance(found, TaskArithmetic) and found.alpha is None and drop is None:
        parts.problems.append(
            Problem("alpha", "can't be searched without a bound: give it, or max_utility_drop")
        )
    if parts.problems:
        raise InvalidInput(
            "no patch can be made with these settings",
            where=", ".join(dict.fromkeys(each.where for each in parts.problems)),
            next_step="correct the settings",
            problems=parts.problems,
        )
    adapter, pace, bounds = (parts.made[name] for name in BLOCKS[1:])
    return PatchSettings(found, adapter, pace, bounds, length, overlength)


def _block(given: Mapping[str, Any], name: str, problems: list[Problem]) -> Mapping[str, Any]:
    found = given.get(name, {})
    if isinstance(found, Mapping):
        return found
    problems.append(Problem(name, "expected names and values"))
    return {}


def _build(what: str, kind: type[_T], values: Mapping[str, Any]) -> _T:
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    check_values(what, (Problem(each, "unknown") for each in values if each not in known))
    return kind(**values)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(each) if isinstance(each, tuple) else each for name, each in values.items()}
