"""Open a model by its name and make an order of attacks on it, in the form in which it is asked.

    opened = OpenedModel("unlearned", "{question}{answer}", "cpu", "float32")
    attack_opened(opened, [], AttackOrder({"asked": [("Who?", "Ada.")]}, Path("logs"))).rows

Every finished attack is a line of the model's log, from which an interrupted run continues. A log holds
numbers by question, and no text.

    {"log": "attacks", "version": 1, "model": digest, "questions": digest, "settings": {...}}
    {"attack": "quantisation", "measure": "probability", "values": {"8": [0.1, ...], "4": [...]}, ...}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import TypeAdapter

from approx.attacks.attack import LORA, Attack, AttackSets, Aucs, Curve, SetName, probabilities
from approx.attacks.registry import ATTACKS
from approx.attacks.sampling import LeakAtK
from approx.evaluation.answer_score import check_finite
from approx.evaluation.asking import log_name
from approx.evaluation.evaluated_models import DeletionReadyModel, Dtype, open_evaluated, records_of
from approx.evaluation.question_log import Header, LogWriter
from approx.evaluation.questions import PromptForm
from approx.metrics.auc import Auc
from approx.metrics.privleak import MIN_K, PrivLeak
from sisa.core.digest import canonical_json, digest_of
from sisa.core.errors import InvalidInput
from sisa.lm.base.tokens import end_tokens

Asked = Sequence[tuple[str, str]]  # questions and answers
Texts = Mapping[SetName, Asked]
UNATTACKED = "as_it_is"


@dataclass(frozen=True)
class AttackRow:
    """The result of one attack: the measure and values of a curve, or AUCs with their PrivLeak."""

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


class OpenedModel:
    """A model as attacks see it: a causal `model`, its tokenizer, and the form of its prompts."""

    def __init__(self, spec: str, form: PromptForm | str, device: str, dtype: Dtype) -> None:
        """Open a model. A template alone is asked in the form that suits the model.

        Raise InvalidInput, IntegrityError or EnvironmentFault.
        """
        self.evaluated = opened = open_evaluated(spec, device, dtype)
        self.form = PromptForm(opened.kind, form) if isinstance(form, str) else form
        if isinstance(opened, DeletionReadyModel):
            self.model: Any = opened.model.as_transformers()
            self.tokenizer: Any = self.model.tokenizer
            self.ends = end_tokens(self.model, self.tokenizer)
        else:
            self.model, self.tokenizer, self.ends = opened.model, opened.tokenizer, opened.ends

    def sets(self, order: AttackOrder) -> AttackSets:
        """Return texts in the form in which this model is asked, up to the length that it can read."""
        made = {role: records_of(pairs, self.form) for role, pairs in order.texts.items()}
        return AttackSets(
            self.tokenizer,
            **made,
            sequence_len=getattr(self.model.config, "max_position_embeddings", None),
            ends=self.ends,
            also={name: records_of(pairs, self.form) for name, pairs in order.also.items()},
        )

    def check_tokenizer(self, other: OpenedModel) -> None:
        """Raise InvalidInput if another model reads texts as other tokens."""
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise InvalidInput(
                "the reference has another tokenizer than the model",
                where=f"{other.evaluated.name} and {self.evaluated.name}",
                expected="equal vocabularies",
                got=f"{len(other.tokenizer)} and {len(self.tokenizer)} words",
                next_step="give a reference of the same base",
            )


@dataclass(frozen=True)
class AttackedModel:
    """A model's finished log. `not_made` says why an attack was left out.

    `known_before` is the mean probability of the asked answers in the model before unlearning.
    """

    name: str
    digest: str
    log: Path
    settings: Mapping[str, Any]
    rows: Mapping[str, AttackRow]
    not_made: Mapping[str, str]
    known_before: float | None


@dataclass(frozen=True)
class AttackOrder:
    """What is attacked, and how: everything but the models."""

    texts: Texts
    out: Path
    also: Mapping[str, Asked] = field(default_factory=dict)
    names: Sequence[str] = ()
    leak: LeakAtK = field(default_factory=LeakAtK)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise InvalidInput for names of no attack."""
        if unknown := [each for each in self.names if each not in ATTACKS]:
            raise InvalidInput(
                "no such attacks",
                where="--attack",
                expected="among " + ", ".join(ATTACKS),
                got=", ".join(unknown),
                next_step="choose among these",
            )

    @property
    def attacks(self) -> list[Attack]:
        """Return the named attacks, or all, each once, with samples as ordered."""
        held = {**ATTACKS, self.leak.name: self.leak}
        return [held[name] for name in dict.fromkeys(self.names or ATTACKS)]


def attack_opened(
    opened: OpenedModel,
    references: Sequence[OpenedModel],
    order: AttackOrder,
    before: OpenedModel | None = None,
) -> AttackedModel:
    """Make the attacks that a model's log lacks.

    Raise InvalidInput for other models of another tokenizer, and ConfigConflict for a log of another
    evaluation.
    """
    others = [*references, *filter(None, [before])]
    for each in others:
        opened.check_tokenizer(each)
    settings = {
        **asdict(opened.form),
        "samples": order.leak.samples,
        "max_new_tokens": order.leak.max_new_tokens,
        "seed": order.seed,
        "adapter": LORA,
        "references": [each.evaluated.digest for each in references],
    }
    if references:
        settings["privleak_k"] = MIN_K
    also = {"also": order.also} if order.also else {}
    known = None
    if before is not None:
        settings["before"] = before.evaluated.digest
        asked = probabilities(before.model, before.sets(order).examples("asked"))
        check_finite(asked, before.evaluated.name)
        known = fmean(asked)
    header = Header(opened.evaluated.digest, digest_of({**order.texts, **also}), settings, "attacks")
    log = order.out / log_name(opened.evaluated, "attacks", header)
    judges = [each.model for each in references]
    sets = replace(opened.sets(order), references=judges, before=before and before.model)
    reasons = {each.name: each.why_not(opened.model, sets) for each in order.attacks}
    not_made = {name: why for name, why in reasons.items() if why is not None}
    made = [each for each in order.attacks if each.name not in not_made]
    rows = _attack_model(opened, sets, made, order.seed, log, header)
    chosen = {name: row for name, row in rows.items() if name in {UNATTACKED, *reasons}}
    name, digest = opened.evaluated.name, opened.evaluated.digest
    return AttackedModel(name, digest, log, settings, chosen, not_made, known)


def _attack_model(
    opened: OpenedModel,
    sets: AttackSets,
    attacks: Sequence[Attack],
    seed: int,
    path: Path,
    header: Header,
) -> dict[str, AttackRow]:
    """Make the attacks that a log lacks. Raise InvalidInput for values that are not finite."""
    model = opened.model
    with LogWriter(path, header, _ROW.validate_json) as writer:
        held = {row.attack for row in writer.rows}
        if UNATTACKED not in held:
            plain = Curve("probability", {0: probabilities(model, sets.examples("asked"))})
            writer.append([_row(UNATTACKED, plain, opened.evaluated.name)])
        for attack in attacks:
            if attack.name not in held:
                writer.append([_row(attack.name, attack(model, sets, seed), opened.evaluated.name)])
        return {row.attack: row for row in writer.rows}


def _row(name: str, found: Curve | Aucs, model: str) -> AttackRow:
    if isinstance(found, Curve):
        values = {str(strength): list(each) for strength, each in found.values.items()}
        check_finite(chain.from_iterable(values.values()), f"{model}, {name}")
        return AttackRow(name, found.measure, values)
    return AttackRow(name, aucs=dict(found.values), privleak=found.privleak)
