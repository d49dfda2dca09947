"""The interface of a method of approximate unlearning: hyper-parameters, a pure loss, and a run.

    method.apply(Run(target, sets, pace, bounds))     # steps down the loss, unless it says otherwise

Shapes: B examples, T positions, V words, as in `approx.evaluation.answers`; N answer tokens of the
whole batch.

A method is a frozen dataclass. Making one with values for which its loss is not defined raises
InvalidInput with all of them. The reference is the model as it was before. A loss holds no state, draws
no random number and never sees a model; the model is for `apply` and what prepares it. A retain term of
weight 0 is not computed. Where a weight changes from step to step, the method computes the next one, and
the loop holds it.

A mean over tokens runs over all answer tokens of the batch, and a mean over examples over its rows;
prompt and padding never count (TOFU and open-unlearning average the KL over both, so that its weight
depends on how batches are padded). KL(reference || current) is sum_v p_ref(v) (log p_ref(v) - log p(v))
for each answer token, and exactly 0 for equal logits. Words of probability exactly 0 (logits of minus
infinity) at answer tokens are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from approx.evaluation.answers import AnswerBatch, answer_logprobs_BT, logprobs_BTV
from approx.unlearning.causal_tracing import trace_layers
from approx.unlearning.descent import Descent
from approx.unlearning.examples import Sets
from approx.unlearning.stopping import End
from approx.unlearning.target import Rows
from approx.unlearning.unlearn import Run
from approx.unlearning.value_checks import above_zero, at_least_zero, check_values, one_of
from approx.unlearning.written.preferred import Prepared, Writing
from approx.unlearning.written.refusals import refuse_all
from sisa.core.errors import Problem


def mean_nll(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the negative log-likelihood per answer token of the batch, in nats."""
    return -answer_logprobs_BT(logits_BTV, batch).sum() / batch.mask_BT.sum()


def mean_kl(reference_BTV: Tensor, current_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return KL(reference || current) per answer token of the batch, in nats."""
    reference_NV = answer_logprobs_NV(reference_BTV, batch)
    current_NV = answer_logprobs_NV(current_BTV, batch)
    return (reference_NV.exp() * (reference_NV - current_NV)).sum(dim=-1).mean()


def answer_logprobs_NV(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the log-probabilities of all words at each answer token of the batch, row after row."""
    return logprobs_BTV(logits_BTV[:, : batch.targets_BT.shape[1]][batch.mask_BT])


def answer_values_NV(values_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return logits or hidden states at each answer token, row after row, in float32 or float64."""
    values_NV = values_BTV[:, : batch.targets_BT.shape[1]][batch.mask_BT]
    return values_NV.to(torch.promote_types(values_NV.dtype, torch.float32))


Family = Literal[
    "ascent",
    "preference",
    "distillation",
    "behaviour",
    "flattening",
    "representation",
    "editing",
    "task vectors",
]
Role = Literal["forget", "retain", "preferred"]
Alternative = Literal["refusals", "alternates", "generic labels"]
RetainLoss = Literal["nll", "kl"]
RETAIN_LOSSES = ("nll", "kl")
RETAIN: frozenset[Role] = frozenset({"retain"})


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise, and its retain term, unweighted and without a gradient, for the log."""

    total: Tensor
    retain: Tensor | None


@dataclass(frozen=True)
class Method:
    """A method whose loss is forget_weight * F(forget) + retain_weight * R(retain).

    A subclass defines F as `forget_term`, and its hyper-parameters as fields. `forget_weight`,
    `retain_weight`, `retain_loss` and `layer` are fields where they can be chosen, and have the values
    below where not. R is `retain_term`, which a method that acts at a layer defines, too: its rows hold
    hidden states. The class variables are

        name, family, paper   what `sisa approx methods` lists
        positive              the fields that must be above 0; names of no field do not count
        not_negative          the fields that must be 0 or more, likewise
        always_reads          the sets that the method needs whatever its weights are
        compares_tokens       the sets for which F, or an R of its own, needs the reference's logits or
                              hidden states
        prefers               what the preferred answers are, for a method that reads them
        at_subjects           whether the method edits at the subject of each forget example
        retain_field          the field with the weight of R
        in_a_patch            its defaults in a patch where they are others: there a method without a
                              retain term has one, because 24 steps raise the NLL of retained answers
                              on a tiny base from 0.03 to 1.6 (CE-U) and 0.9 (UNDIAL), and with one to
                              0.04 to 0.08

    The property `compares_answers` names the sets for which F needs the reference's log-probability of
    each whole answer, which is the same at every step. A method that does otherwise than step down its
    loss says so in `apply`, `write_preferred`, `layer_effects`, `adapter_values` and `patch_problems`;
    callers never ask which kind it is.
    """

    name: ClassVar[str]
    family: ClassVar[Family]
    paper: ClassVar[str]
    positive: ClassVar[tuple[str, ...]] = ("beta", "forget_weight")
    not_negative: ClassVar[tuple[str, ...]] = ("retain_weight",)
    always_reads: ClassVar[frozenset[Role]] = frozenset({"forget"})
    compares_tokens: ClassVar[frozenset[Role]] = frozenset()
    prefers: ClassVar[Alternative] = "refusals"
    at_subjects: ClassVar[bool] = False
    retain_field: ClassVar[str] = "retain_weight"
    in_a_patch: ClassVar[Mapping[str, Any]] = {}

    @property
    def forget_weight(self) -> float:
        return 1.0

    @property
    def retain_weight(self) -> float:
        return 0.0

    @property
    def retain_loss(self) -> RetainLoss:
        return "nll"

    @property
    def layer(self) -> int | None:
        """Return the number of the layer whose hidden states the loss reads, or None for logits.

        Where it is a field, None is chosen before the run: `unlearning/causal_tracing.py`.
        """
        return None

    @property
    def lacks_layer(self) -> bool:
        """Return whether the method acts at a layer that is not chosen yet."""
        return "layer" in asdict(self) and self.layer is None

    def __post_init__(self) -> None:
        check_values(self.name, self.problems())

    def problems(self) -> Iterator[Problem]:
        """Yield a problem for each value for which the loss is not defined."""
        given = asdict(self)
        yield from above_zero(**{each: given[each] for each in self.positive if each in given})
        yield from at_least_zero(**{each: given[each] for each in self.not_negative if each in given})
        yield from one_of(RETAIN_LOSSES, retain_loss=self.retain_loss)

    @property
    def reads(self) -> frozenset[Role]:
        """Return the sets that the method needs."""
        return self.always_reads | RETAIN if self.retain_weight > 0 else self.always_reads

    @property
    def compares_answers(self) -> frozenset[Role]:
        return frozenset()

    @property
    def compares(self) -> frozenset[Role]:
        """Return the sets for which the loss needs the reference."""
        kept = "retain" in self.reads and self.retain_loss == "kl"
        return self.compares_answers | self.compares_tokens | (RETAIN if kept else frozenset())

    @property
    def min_answer_tokens(self) -> int:
        """Return the number of answer tokens that each forget example must have."""
        return 1

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return F, a scalar."""
        raise NotImplementedError

    def retain_term(self, kept: Rows) -> Tensor:
        """Return R, a scalar."""
        if self.retain_loss == "nll":
            return mean_nll(kept.current_BTV, kept.batch)
        return mean_kl(kept.compared_BTV, kept.current_BTV, kept.batch)

    def next_retain_weight(
        self,
        weight: float,  # noqa: ARG002
        retain: float | None,  # noqa: ARG002
        num_epochs: float,  # noqa: ARG002
    ) -> float | None:
        """Return the weight of the retain term in the next step, or None where it is constant.

        `weight` and `retain` are the weight and the retain term of this step, and `num_epochs` the
        passes over the forget set after it.
        """
        return None

    def apply(self, run: Run) -> End:
        """Change a run's target within its bounds, and return how the run ended."""
        return Descent(self, run).run()

    def write_preferred(self, writing: Writing) -> Prepared:
        """Return the sets with the preferred answers, which are of the kind `prefers`."""
        tokens, seed = writing.sets.forget, writing.pace.seed
        refusals = refuse_all(writing.records, tokens, writing.tokenizer, seed, writing.sequence_len)
        return Prepared(replace(writing.sets, preferred=refusals), None)

    def layer_effects(self, model: Any, sets: Sets) -> list[float]:
        """Return how much each layer matters to what is forgotten; the largest effect is chosen."""
        return trace_layers(model, sets.forget, sets.retain)

    def adapter_values(self, base: Any, num_texts: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the values of the adapter that the method prescribes, none by default.

        Raise InvalidInput for a base in which the method can't act.
        """
        return {}

    def patch_problems(self, *, bounded: bool, selected: bool) -> Iterator[Problem]:  # noqa: ARG002
        """Yield a problem for each setting of a patch with which the method can't be used.

        `bounded` is whether utility has a bound, and `selected` whether only some modules may change.
        """
        yield from ()

    def with_retain_factor(self, factor: float) -> Method:
        """Return the method with its retain term, if it has one, weighted `factor` times as much."""
        given, name = asdict(self), self.retain_field
        return replace(self, **{name: given[name] * factor}) if name in given else self

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        """Return the loss over the rows of one batch, which has the roles that `reads` names."""
        total = self.forget_weight * self.forget_term(rows)
        if "retain" not in self.reads:
            return Losses(total, None)
        retain = self.retain_term(rows["retain"])
        return Losses(total + self.retain_weight * retain, retain.detach())
