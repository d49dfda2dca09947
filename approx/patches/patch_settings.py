"""The settings of a patch, as the JSON values in its job, parsed with every problem reported at once.

    method           one of `methods/registry.py`, with its hyper-parameters
    adapter          rank, scale and modules of the LoRA patch
    pace             learning rate, batches, epochs, rounds, seed: `schedule.Pace`
    selection        which of the adapter's modules: `selection.SelectionSettings`
    bounds           utility, target, how often to measure, patience: `stopping.BoundSettings`
    sequence_len     longer texts are cut to it or refused, as `overlength` says
    procedure        how patches are made; a job of another procedure is refused

All defaults are written out, so that a job names everything that reaches its bits; they are those of the
blocks' fields. On the command line settings have one flat namespace.

>>> found = parse_settings(settings_of("npo", {"beta": 0.2, "num_epochs": 3}, Adapter(), seed=1))
>>> found.method, found.pace.num_epochs, found.bounds.max_utility_drop
(Npo(beta=0.2, forget_weight=1.0, retain_weight=1.0, retain_loss='nll'), 3, 0.1)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from approx.methods.method import Method
from approx.methods.registry import METHODS, make_method
from approx.patches.selection import ALL, SelectionSettings
from approx.unlearning.schedule import Pace
from approx.unlearning.stopping import BoundSettings
from approx.unlearning.value_checks import check_values, one_of, whole_numbers
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import Overlength

PROCEDURE = 5  # raise when the same settings would make another patch
DEFAULT_SEQUENCE_LEN = 512


@dataclass(frozen=True)
class Adapter:
    """The LoRA patch: a module changes by (lora_alpha / lora_r) times the product of two factors."""

    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: tuple[str, ...] | str = "all-linear"

    def __post_init__(self) -> None:
        modules = self.lora_target_modules
        named = isinstance(modules, tuple) and modules and all(isinstance(each, str) for each in modules)
        other = Problem("lora_target_modules", f"{modules!r}, expected names, or all-linear")
        check_values(
            "the adapter",
            whole_numbers(1, 4096, lora_r=self.lora_r),
            whole_numbers(1, 65_536, lora_alpha=self.lora_alpha),
            () if named or modules == "all-linear" else (other,),
        )


KINDS: Mapping[str, type[Any]] = {
    "adapter": Adapter,
    "selection": SelectionSettings,
    "pace": Pace,
    "bounds": BoundSettings,
}
BLOCKS = ("hyperparameters", *KINDS)
NAMES = ("method", *BLOCKS, "sequence_len", "overlength", "procedure")


@dataclass(frozen=True)
class PatchSettings:
    """Validated settings."""

    method: Method
    adapter: Adapter
    selection: SelectionSettings
    pace: Pace
    bounds: BoundSettings
    sequence_len: int
    overlength: Overlength

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a job holds them: JSON values only."""
        made = {
            "method": self.method.name,
            "hyperparameters": asdict(self.method),
            **{name: asdict(getattr(self, name)) for name in KINDS},
            "sequence_len": self.sequence_len,
            "overlength": self.overlength,
            "procedure": PROCEDURE,
        }
        found: dict[str, Any] = json.loads(json.dumps(made))
        return found


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
    named = [METHODS[method]] if method in METHODS else METHODS.values()  # what no method has is unknown
    kinds = [*(("hyperparameters", each) for each in named), *KINDS.items()]
    known = {each.name: block for block, kind in kinds for each in fields(kind)}
    among = ", ".join(sorted(known))
    problems = [Problem(each, f"unknown; known are {among}") for each in values if each not in known]
    blocks: dict[str, dict[str, Any]] = {
        "hyperparameters": dict(METHODS[method].in_a_patch) if method in METHODS else {},
        "adapter": asdict(adapter),
        "selection": {},
        "pace": {"seed": seed},
        "bounds": {},
    }
    for name in known.keys() & values.keys():
        blocks[known[name]][name] = values[name]
    texts = {"sequence_len": sequence_len, "overlength": overlength, "procedure": PROCEDURE}
    return parse_settings({"method": method, **blocks, **texts}, *problems).to_json()


def describe_methods() -> list[dict[str, Any]]:
    """Return each method: what it is, what it needs, and its hyper-parameters in a patch."""
    found = []
    for name, kind in METHODS.items():
        method = make_method(name, kind.in_a_patch)
        needs = {
            "retain": "retain" in method.reads,
            "reference": bool(method.compares),
            "preferred": method.prefers if "preferred" in method.reads else None,
        }
        about = {"name": name, "family": kind.family, "paper": kind.paper}
        found.append({**about, "needs": needs, "defaults": asdict(method)})
    return found


def parse_settings(given: Mapping[str, Any], *found: Problem) -> PatchSettings:
    """Return validated settings. Raise InvalidInput with every problem, those already `found` too."""
    problems = [*found, *(Problem(each, "unknown") for each in given if each not in NAMES)]
    if given.get("procedure") != PROCEDURE:
        again = "of another version: revert the patch and request it again"
        problems.append(Problem("procedure", again))
    blocks: dict[str, Any] = {name: given.get(name, {}) for name in BLOCKS}
    for name in [name for name, each in blocks.items() if not isinstance(each, Mapping)]:
        problems.append(Problem(name, "expected names and values"))
        blocks[name] = {}
    named = str(given.get("method", ""))
    made = {name: _made(name, named, values, problems) for name, values in blocks.items()}
    length = given.get("sequence_len", DEFAULT_SEQUENCE_LEN)
    overlength = given.get("overlength", "refuse")
    problems += one_of(get_args(Overlength), overlength=overlength)
    problems += whole_numbers(2, sequence_len=length)
    method, selection, bounds = (made[name] for name in ("hyperparameters", "selection", "bounds"))
    if method and selection and bounds:
        selected, bounded = selection.selection != ALL, bounds.max_utility_drop is not None
        problems += method.patch_problems(bounded=bounded, selected=selected)
    if problems:
        raise InvalidInput(
            "no patch can be made with these settings",
            where=", ".join(dict.fromkeys(each.where for each in problems)),
            next_step="correct the settings",
            problems=problems,
        )
    kinds = {name: made[name] for name in KINDS}
    return PatchSettings(method, **kinds, sequence_len=length, overlength=overlength)


def _made(block: str, method: str, values: Mapping[str, Any], problems: list[Problem]) -> Any:
    """Return what a block describes; None if it can't be made, with its problems added to the list."""
    kind = KINDS.get(block)
    if kind in (None, Adapter):
        values = {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}
    try:
        if kind is None:
            return make_method(method, values)
        known = {each.name for each in fields(kind)}
        check_values(block, (Problem(each, "unknown") for each in values if each not in known))
        return kind(**values)
    except InvalidInput as error:
        problems += error.as_problems(block)
    except TypeError:
        problems.append(Problem(block, "a value of the wrong type"))
    return None
