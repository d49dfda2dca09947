"""Attack a model with each attack in turn; every finished attack is a line of the model's log.

    {"log": "attacks", "version": 1, "model": digest, "questions": digest, "settings": {...}}
    {"attack": "quantisation", "measure": "probability", "values": {"8": [0.1, ...], "4": [...]}, ...}

An interrupted run continues from its log. A log holds numbers by question, and no text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from approx.attacks.attack import Attack, AttackSets, Curve, probabilities
from approx.attacks.depth import Depth, of_one_shape
from approx.attacks.linear_probe import LEAST, LinearProbe
from approx.attacks.membership import Membership, privleak_against
from approx.attacks.other_questions import OtherQuestions
from approx.evaluation.answers import asks_by_prompt
from approx.evaluation.question_log import Header, LogWriter
from approx.metrics.auc import Auc
from approx.metrics.privleak import PrivLeak
from sisa.core.digest import canonical_json

UNATTACKED, PRIVLEAK = "as_it_is", "privleak"


@dataclass(frozen=True)
class AttackRow:
    """The result of one attack: the measure and values of a curve, AUCs, or PrivLeak."""

    attack: str
    measure: str | None = None
    values: dict[str, list[float]] | None = None
    aucs: dict[str, Auc] | None = None
    privleak: PrivLeak | None = None

    @property
    def place(self) -> str:
        return self.attack

    def line(self) -> bytes:
        return canonical_json(asdict(self)) + b"\n"

    @property
    def curve(self) -> Curve | None:
        """Return the curve, in the order of its strengths."""
        if self.measure is None or self.values is None:
            return None
        ordered = sorted(self.values, key=_order)
        return Curve(self.measure, {each: self.values[each] for each in ordered})


_ROW = TypeAdapter(AttackRow)


def _order(strength: str) -> tuple[bool, int, str]:
    return not strength.isdigit(), int(strength) if strength.isdigit() else 0, strength


def why_not(attack: Attack, model: Any, sets: AttackSets) -> str | None:
    """Return why an attack can't be made on a model, or None if it can."""
    if attack.on_weights and asks_by_prompt(model):
        return "needs one set of weights: attack the adapters that `sisa export` writes"
    if isinstance(attack, OtherQuestions) and not sets.also:
        return "needs sets of questions: --also NAME=FILE"
    if isinstance(attack, Depth):
        if attack.before is None or attack.retained is None:
            return "needs two models: --before and --reference"
        models = (model, attack.before, attack.retained)
        if any(map(asks_by_prompt, models)) or not of_one_shape(*models):
            return "needs models of one base, each of one set of weights: --before and --reference"
    least = {Membership.name: 2, LinearProbe.name: LEAST}.get(attack.name, 1)
    lacking = [role for role in attack.needs if len(sets.tokens(getattr(sets, role))) < least]
    if not lacking:
        return None
    option = "data" if lacking[0] == "asked" else lacking[0]
    return f"needs {least} texts or more: --{option}"


def attack_model(
    model: Any, sets: AttackSets, attacks: Sequence[Attack], seed: int, path: Path, header: Header
) -> dict[str, AttackRow]:
    """Make the attacks that a model's log lacks, and return all results by name.

    PrivLeak is measured where membership has a reference. Raise ConfigConflict for a log of another
    evaluation.
    """
    with LogWriter(path, header, _ROW.validate_json) as writer:
        held = {row.attack for row in writer.rows}
        if UNATTACKED not in held:
            values = {"0": probabilities(model, sets.examples("asked"))}
            writer.append([AttackRow(UNATTACKED, "probability", values)])
        for attack in attacks:
            if attack.name not in held:
                writer.append([_row(attack.name, attack(model, sets, seed))])
            if isinstance(attack, Membership) and attack.references and PRIVLEAK not in held:
                leak = privleak_against(attack.references[0], model, sets, seed)
                writer.append([AttackRow(PRIVLEAK, privleak=leak)])
        return {row.attack: row for row in writer.rows}


def _row(name: str, found: Curve | Mapping[str, Auc]) -> AttackRow:
    if isinstance(found, Curve):
        values = {str(strength): list(each) for strength, each in found.values.items()}
        return AttackRow(name, found.measure, values)
    return AttackRow(name, aucs=dict(found))
