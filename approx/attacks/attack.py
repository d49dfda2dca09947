"""An attack on forgetting: `attack(model, sets, seed)` gives a curve, or AUCs.

    found = Relearning((3, 20))(model, AttackSets(tokenizer, asked, taught), seed=0)
    found.means                 # {"0": 0.01, "3": 0.2, "20": 0.8}

`model` is a causal model of transformers, with or without PEFT's adapter "default", or
`as_transformers()` of a deletion-ready one; an attack changes it and restores it. Everything random
comes from the seed. No result holds a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean
from typing import Any, ClassVar, Literal

from peft import PeftModel

from approx.evaluation.answers import asks_by_prompt, examples_of, score_examples
from approx.metrics.auc import Auc
from approx.metrics.privleak import PrivLeak
from approx.metrics.probability import probability
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import attach, lora_config
from sisa.lm.base.tokens import Tokens, spans

SetName = Literal["asked", "taught", "others", "holdout"]
Strength = int | str
# the adapter that an attack trains, whatever adapter the model has
LORA = {"lora_target_modules": "all-linear", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}


@dataclass(frozen=True)
class AttackSets:
    """What an attack is given: texts, the tokenizer that makes examples of them, and other models.

    Results are about the texts that are `asked`. `taught` are of their kind and `others` of another one;
    relearning trains on either. `holdout` are texts like the asked ones that no model has seen. `also`
    are sets of other questions to the same knowledge, by a name for each. Texts are cut to
    `sequence_len` tokens. `ends` are the tokens that end an answer, by default those of the attacked
    model. `references` never saw the asked texts; `before` is the model before unlearning.
    """

    tokenizer: Any = field(repr=False)
    asked: Sequence[Record]
    taught: Sequence[Record] = ()
    others: Sequence[Record] = ()
    holdout: Sequence[Record] = ()
    sequence_len: int | None = None
    ends: Collection[int] | None = None
    also: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    references: Sequence[Any] = field(default=(), repr=False)
    before: Any = field(default=None, repr=False)

    def examples(self, role: SetName) -> list[Tokens]:
        """Return the examples of a set. Raise InvalidInput if it has none."""
        if not (found := self.tokens(getattr(self, role))):
            raise InvalidInput(
                "an attack lacks its texts",
                where=role,
                expected="records that have an answer",
                got="none",
                next_step="give some, or leave the attack out",
            )
        return found

    def tokens(self, records: Sequence[Record]) -> list[Tokens]:
        """Return records as examples, as `cut` does. Raise InvalidInput as `examples_of`."""
        return self.cut(examples_of(records, self.tokenizer))

    def cut(self, examples: Sequence[Tokens]) -> list[Tokens]:
        """Cut examples to `sequence_len` tokens, and leave out those that keep no answer token."""
        end = self.sequence_len
        found = [Tokens(each.input_ids[:end], each.labels[:end]) for each in examples]
        return [each for each in found if spans(each)]


@dataclass(frozen=True)
class Curve:
    """Values of the asked texts, in order, by the strength of the attack: steps, bits, a wording ...

    `measure` names the values: "probability" (of the answer, per token), "ROUGE-L recall" or "unlearning
    depth score".
    """

    measure: str
    values: Mapping[Strength, Sequence[float]]

    @property
    def means(self) -> dict[str, float]:
        """Return the mean at each strength that has a value."""
        return {str(strength): fmean(each) for strength, each in self.values.items() if each}

    @property
    def mean(self) -> float:
        """Return the mean over all strengths and texts."""
        return fmean([each for values in self.values.values() for each in values])

    def steps_until_half(self, known: float) -> float | None:
        """Return after how many steps of relearning half of what was forgotten is back, or None.

        Half is the middle between the mean after 0 steps and `known`, the mean before forgetting.
        Between measured steps the mean is taken as linear. 0: nothing was forgotten; None: half is not
        back within the measured steps.

        >>> Curve("probability", {0: [0.0], 2: [0.25], 10: [0.75]}).steps_until_half(known=1.0)
        6.0
        """
        points = sorted((int(steps), fmean(values)) for steps, values in self.values.items())
        half = (points[0][1] + known) / 2
        if points[0][1] >= half:
            return 0.0
        for (before, low), (after, high) in pairwise(points):
            if high >= half:
                return before + (after - before) * (half - low) / (high - low)
        return None


@dataclass(frozen=True)
class Aucs:
    """AUCs by score or layer; membership beside a reference has PrivLeak, where it is defined."""

    values: Mapping[str, Auc]
    privleak: PrivLeak | None = None


@dataclass(frozen=True)
class Attack:
    """An attack; a subclass has its strength as fields.

    `needs` are the sets that must have `least` texts or more. An attack `on_weights` needs one set of
    weights: it is not for a deletion-ready model as a whole, but for the adapter that a shard exports.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[SetName, ...]] = ("asked",)
    least: ClassVar[int] = 1
    on_weights: ClassVar[bool] = False

    def __call__(self, model: Any, sets: AttackSets, seed: int) -> Curve | Aucs:
        """Attack a model. Raise InvalidInput for a set that is needed and empty."""
        raise NotImplementedError

    def why_not(self, model: Any, sets: AttackSets) -> str | None:
        """Return why the attack can't be made on a model, or None if it can."""
        if self.on_weights and asks_by_prompt(model):
            return "needs one set of weights: attack the adapters that `sisa export` writes"
        for role in self.needs:
            if len(sets.tokens(getattr(sets, role))) < self.least:
                number = f"{self.least} texts or more" if self.least > 1 else "texts"
                return f"needs {number}: --{'data' if role == 'asked' else role}"
        return None

    def check(self, model: Any, sets: AttackSets) -> None:
        """Raise InvalidInput if the attack can't be made on a model."""
        if why := self.why_not(model, sets):
            next_step = "give what it needs, or leave the attack out"
            raise InvalidInput(f"the attack {why}", where=self.name, next_step=next_step)


def probabilities(model: Any, examples: Sequence[Tokens]) -> list[float]:
    """Return the probability of each example's answer, per token."""
    return [probability(each.loss) for each in score_examples(model, examples)]


@contextmanager
def as_peft_model(model: Any) -> Iterator[Any]:
    """Yield a model as a PEFT model; a plain one gets an adapter that changes nothing."""
    if isinstance(model, PeftModel):
        yield model
        return
    with trained_as_before(model):
        patched = attach(model, lora_config(LORA, model), None, init_seed=0).eval()
        try:
            yield patched
        finally:
            patched.unload()


@contextmanager
def trained_as_before(model: Any) -> Iterator[None]:
    """Restore at the end of the block which of a model's parameters are trained."""
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    try:
        yield
    finally:
        for name, each in model.named_parameters():
            each.requires_grad_(wanted[name])
