"""Open a model by its name and make an order of attacks on it, in the form in which it is asked.

    opened = OpenedModel("unlearned", "{question}{answer}", "cpu", "float32")
    attack_opened(opened, [], AttackOrder({"asked": [("Who?", "Ada.")]}, Path("logs"))).rows

Every finished attack is a line of the model's log (`attack_log.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from approx.attacks.attack import Attack, AttackSets, SetName
from approx.attacks.attack_log import PRIVLEAK, UNATTACKED, AttackRow, attack_model, why_not
from approx.attacks.depth import Depth
from approx.attacks.membership import Membership
from approx.attacks.registry import ATTACKS
from approx.attacks.sampling import LeakAtK
from approx.evaluation.asking import log_name
from approx.evaluation.evaluated import PromptForm
from approx.evaluation.evaluated_models import DeletionReadyModel, Dtype, open_evaluated, records_of
from approx.evaluation.question_log import Header
from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput
from sisa.lm.base.tokens import end_tokens

Asked = Sequence[tuple[str, str]]  # questions and answers
Texts = Mapping[SetName, Asked]


class OpenedModel:
    """A model as attacks see it: a causal `model`, its tokenizer, and the form of its prompts."""

    def __init__(self, spec: str, form: PromptForm | str, device: str, dtype: Dtype) -> None:
        """Open a model; a form that is a template is of the model's own kind.

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

    def sets(self, texts: Texts, also: Mapping[str, Asked] | None = None) -> AttackSets:
        """Return texts in the form in which this model is asked, up to the length that it can read."""
        made = {role: records_of(pairs, self.form) for role, pairs in texts.items()}
        return AttackSets(
            self.tokenizer,
            asked=made["asked"],
            taught=made.get("taught", []),
            others=made.get("others", []),
            holdout=made.get("holdout", []),
            sequence_len=getattr(self.model.config, "max_position_embeddings", None),
            also={name: records_of(pairs, self.form) for name, pairs in (also or {}).items()},
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
    """A model's finished log. `not_made` says why an attack was left out."""

    name: str
    digest: str
    log: Path
    settings: Mapping[str, Any]
    rows: Mapping[str, AttackRow]
    not_made: Mapping[str, str]


@dataclass(frozen=True)
class AttackOrder:
    """What is attacked, and how: everything but the models."""

    texts: Texts
    out: Path
    also: Mapping[str, Asked] = field(default_factory=dict)
    names: Sequence[str] = ()
    leak: LeakAtK = field(default_factory=LeakAtK)
    seed: int = 0


def chosen_attacks(
    order: AttackOrder, leak: LeakAtK, references: Sequence[Any], before: Any = None
) -> list[Attack]:
    """Return the named attacks, or all. Raise InvalidInput for unknown names."""
    if unknown := [each for each in order.names if each not in ATTACKS]:
        raise InvalidInput(
            "no such attacks",
            where="--attack",
            expected="among " + ", ".join(ATTACKS),
            got=", ".join(unknown),
            next_step="choose among these",
        )
    own: dict[str, Attack] = {
        Membership.name: Membership(references),
        LeakAtK.name: leak,
        Depth.name: Depth(before, references[0] if references else None),
    }
    return [own.get(name, ATTACKS[name]) for name in order.names or ATTACKS]


def attack_opened(
    opened: OpenedModel,
    references: Sequence[OpenedModel],
    order: AttackOrder,
    before: OpenedModel | None = None,
) -> AttackedModel:
    """Make the attacks that a model's log lacks.

    Raise as `attack_model`, and InvalidInput for other models of another tokenizer.
    """
    others = [*references, *filter(None, [before])]
    for each in others:
        opened.check_tokenizer(each)
    leak = replace(order.leak, ends=opened.ends)
    judges = [each.model for each in references]
    attacks = chosen_attacks(order, leak, judges, before.model if before else None)
    settings = {
        **asdict(opened.form),
        "samples": leak.samples,
        "max_new_tokens": leak.max_new_tokens,
        "seed": order.seed,
        "references": [each.evaluated.digest for each in references],
    }
    also = {"also": order.also} if order.also else {}
    if before is not None:
        settings["before"] = before.evaluated.digest
    header = Header(opened.evaluated.digest, digest_of({**order.texts, **also}), settings, "attacks")
    log = order.out / log_name(opened.evaluated, "attacks", header)
    sets = opened.sets(order.texts, order.also)
    reasons = {each.name: why_not(each, opened.model, sets) for each in attacks}
    not_made = {name: why for name, why in reasons.items() if why is not None}
    made = [each for each in attacks if each.name not in not_made]
    rows = attack_model(opened.model, sets, made, order.seed, log, header)
    wanted = {UNATTACKED, PRIVLEAK, *(each.name for each in attacks)}
    chosen = {name: row for name, row in rows.items() if name in wanted}
    name, digest = opened.evaluated.name, opened.evaluated.digest
    return AttackedModel(name, digest, log, settings, chosen, not_made)
