"""The interface of a method of approximate unlearning: hyper-parameters and a pure loss on logits.

Shapes: B examples, T positions, V words, as in `approx.evaluation.answers`; N answer tokens of the
whole batch.

A method is a frozen dataclass. Making one with values for which its loss is not defined raises
InvalidInput with all of them. `reads` names the sets that its loss needs, `compares` those for which it
needs the logits of the reference, the model as it was before. A loss holds no state, draws no random
number and never sees a model. A retain term of weight 0 is not computed.

A mean over tokens runs over all answer tokens of the batch, and a mean over examples over its rows;
prompt and padding never count. KL(reference || current) is sum_v p_ref(v) (log p_ref(v) - log p(v)) for
each answer token, and exactly 0 for equal logits. Words of probability exactly 0 (logits of minus
infinity) at answer tokens are not supported. Upstream code (TOFU, open-unlearning) averages the KL over
all positions, including prompt and padding, so that its weight depends on how batches are padded.

>>> list(above_zero(beta=0.1, gamma=-1.0))
[Problem(where='gamma', what='-1.0, expected a number above 0')]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, cast

from torch import Tensor

from approx.evaluation.answers import AnswerBatch, answer_logprobs_BT, logprobs_BTV, sum_logprobs_B
from sisa.core.errors import InvalidInput, Problem


def mean_nll(logits_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return the negative log-likelihood per answer token of the batch, in nats."""
    return -answer_logprobs_BT(logits_BTV, batch).sum() / batch.mask_BT.sum()


def mean_kl(reference_BTV: Tensor, current_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """Return KL(reference || current) per answer token of the batch, in nats."""
    num_positions = batch.targets_BT.shape[1]
    reference_NV = logprobs_BTV(reference_BTV[:, :num_positions][batch.mask_BT])
    current_NV = logprobs_BTV(current_BTV[:, :num_positions][batch.mask_BT])
    return (reference_NV.exp() * (reference_NV - current_NV)).sum(dim=-1).mean()


Role = Literal["forget", "retain", "preferred"]
RetainLoss = Literal["nll", "kl"]
RETAIN_LOSSES = ("nll", "kl")


@dataclass(frozen=True)
class Rows:
    """Examples of one role with their current logits.

    Where the method compares, they have the reference's logits, or its log-probabilities of the whole
    answers.
    """

    batch: AnswerBatch
    current_BTV: Tensor
    reference_BTV: Tensor | None = None
    reference_answers_B: Tensor | None = None

    @property
    def compared_BTV(self) -> Tensor:
        """Return the reference's logits. Raise ValueError if the caller left them out."""
        if self.reference_BTV is None:
            raise ValueError("this loss compares with a reference, whose logits were not given")
        return self.reference_BTV

    @property
    def log_ratios_B(self) -> Tensor:
        """Return log(p_current(answer) / p_reference(answer)) of each whole answer."""
        reference_B = self.reference_answers_B
        if reference_B is None:
            reference_B = sum_logprobs_B(self.compared_BTV, self.batch)
        return sum_logprobs_B(self.current_BTV, self.batch) - reference_B


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise, and its unweighted terms for the log, which carry no gradient."""

    total: Tensor
    forget: Tensor
    retain: Tensor | None


class Method(Protocol):
    """A frozen dataclass of hyper-parameters with a loss."""

    name: ClassVar[str]

    @property
    def reads(self) -> frozenset[Role]:
        """Return the sets that the loss needs."""
        ...

    @property
    def compares(self) -> frozenset[Role]:
        """Return those of them for which it needs the reference."""
        ...

    @property
    def compares_answers(self) -> frozenset[Role]:
        """Return those of these for which the reference's log-probability of the whole answer is
        enough.

        It is the same at every step.
        """
        ...

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        """Return the loss over the rows of one batch, which has the roles that `reads` names."""
        ...


def with_retain_factor(method: Method, factor: float) -> Method:
    """Return the method with its retain term, if it has one, weighted `factor` times as much."""
    names = ("beta",) if method.name == "kl_minimisation" else ("retain_weight",)
    weights = {name: value for name, value in hyperparameters(method).items() if name in names}
    changed = {name: value * factor for name, value in weights.items()}
    return replace(cast(Any, method), **changed) if changed else method


def hyperparameters(method: Method) -> dict[str, Any]:
    """Return all hyper-parameters by name."""
    fields: dict[str, Any] = asdict(cast(Any, method))
    return fields


def add_retain_term(
    forget: Tensor,
    forget_weight: float,
    rows: Mapping[Role, Rows],
    retain_weight: float,
    retain_loss: RetainLoss,
) -> Losses:
    """Return forget_weight * forget + retain_weight * (NLL or KL of the retain rows)."""
    total = forget_weight * forget
    if retain_weight == 0:
        return Losses(total, forget.detach(), None)
    kept = rows["retain"]
    if retain_loss == "nll":
        retain = mean_nll(kept.current_BTV, kept.batch)
    else:
        retain = mean_kl(kept.compared_BTV, kept.current_BTV, kept.batch)
    return Losses(total + retain_weight * retain, forget.detach(), retain.detach())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def above_zero(**values: float) -> Iterator[Problem]:
    """Yield a problem for each value that is not a finite number above 0."""
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            yield Problem(name, f"{value!r}, expected a number above 0")


def at_least_zero(**values: float) -> Iterator[Problem]:
    """Yield a problem for each value that is not a finite number of at least 0."""
    for name, value in values.items():
        if not _is_number(value) or value < 0:
            yield Problem(name, f"{value!r}, expected a number of at least 0")


def whole_numbers(low: float = -math.inf, high: float = math.inf, **values: object) -> Iterator[Problem]:
    """Yield a problem for each value that is not a whole number from `low` to `high`."""
    span = f" from {low}" * (low > -math.inf) + f" to {high}" * (high < math.inf)
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            yield Problem(name, f"{value!r}, expected a whole number{span}")


def one_of(allowed: tuple[str, ...], **values: str) -> Iterator[Problem]:
    """Yield a problem for each value that is not among the allowed ones."""
    for name, value in values.items():
        if value not in allowed:
            yield Problem(name, f"{value!r}, expected one of {', '.join(allowed)}")


def check_values(what: str, *found: Iterable[Problem]) -> None:
    """Raise InvalidInput with all problems, if there are any."""
    problems = list(chain(*found))
    if problems:
        raise InvalidInput(
            f"{what} can't be used with these values",
            where=", ".join(each.where for each in problems),
            next_step="correct the values",
            problems=problems,
        )


class WithRetainTerm:
    """The base of methods of the form forget_weight * F(forget) + retain_weight * R(retain).

    A method defines F. The weights and `retain_loss` are fields of the method, in its own order, so
    this class is not a dataclass. `positive` and `not_negative` name the fields with such values;
    `looks_at` and `compared` name the sets that F reads, and those of them for which it needs the
    reference.
    """

    name: ClassVar[str]
    positive: ClassVar[tuple[str, ...]] = ("beta", "forget_weight")
    not_negative: ClassVar[tuple[str, ...]] = ("retain_weight",)
    looks_at: ClassVar[frozenset[Role]] = frozenset({"forget"})
    compared: ClassVar[frozenset[Role]] = frozenset()

    if TYPE_CHECKING:

        @property
        def forget_weight(self) -> float: ...
        @property
        def retain_weight(self) -> float: ...
        @property
        def retain_loss(self) -> RetainLoss: ...

    def __post_init__(self) -> None:
        check_values(
            self.name,
            above_zero(**{each: getattr(self, each) for each in self.positive}),
            at_least_zero(**{each: getattr(self, each) for each in self.not_negative}),
            one_of(RETAIN_LOSSES, retain_loss=self.retain_loss),
        )

    @property
    def reads(self) -> frozenset[Role]:
        return self.looks_at | frozenset[Role]({"retain"} if self.retain_weight > 0 else ())

    @property
    def compares(self) -> frozenset[Role]:
        kept = self.retain_weight > 0 and self.retain_loss == "kl"
        return self.compared | frozenset[Role]({"retain"} if kept else ())

    @property
    def compares_answers(self) -> frozenset[Role]:
        return self.compared

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        """Return F, a scalar."""
        raise NotImplementedError

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        term = self.forget_term(rows)
        return add_retain_term(term, self.forget_weight, rows, self.retain_weight, self.retain_loss)
