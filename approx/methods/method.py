"""What a method of approximate unlearning is: checked hyper-parameters and a pure loss on logits.

Shapes: B examples, T positions, V words, as in `answer_tokens`.

Rules: a method is a frozen dataclass; whoever makes one with values that its loss is not defined for
gets all of them named at once. `reads` says which sets its loss looks at, `compares` for which of them
it needs the logits of the reference, the model as it was before. A loss holds no state, draws no random
number and never sees a model. The retain term has weight 0 where it is not wanted, and is then not
computed.

Not covered: how logits come about and what is done with the gradient (`unlearning`).

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
    """Negative log-likelihood of the answers, mean over the batch's answer tokens (nats per token)."""
    return -answer_logprobs_BT(logits_BTV, batch).sum() / batch.mask_BT.sum()


def mean_kl(reference_BTV: Tensor, current_BTV: Tensor, batch: AnswerBatch) -> Tensor:
    """KL(reference || current), mean over the batch's answer tokens (nats per token)."""
    num_positions = batch.targets_BT.shape[1]
    reference_NV = logprobs_BTV(reference_BTV[:, :num_positions][batch.mask_BT])
    current_NV = logprobs_BTV(current_BTV[:, :num_positions][batch.mask_BT])
    return (reference_NV.exp() * (reference_NV - current_NV)).sum(dim=-1).mean()


Role = Literal["forget", "retain", "preferred"]
RetainLoss = Literal["nll", "kl"]
RETAIN_LOSSES = ("nll", "kl")


@dataclass(frozen=True)
class Rows:
    """Examples of one role, their logits now and, where the method compares, the reference's logits or
    its log-probabilities of the whole answers."""

    batch: AnswerBatch
    current_BTV: Tensor
    reference_BTV: Tensor | None = None
    reference_answers_B: Tensor | None = None

    @property
    def compared_BTV(self) -> Tensor:
        """The reference's logits. Raises ValueError when the caller left them out."""
        if self.reference_BTV is None:
            raise ValueError("this loss compares with a reference, whose logits were not given")
        return self.reference_BTV

    @property
    def log_ratios_B(self) -> Tensor:
        """log(p_current(answer) / p_reference(answer)) of each whole answer."""
        reference_B = self.reference_answers_B
        if reference_B is None:
            reference_B = sum_logprobs_B(self.compared_BTV, self.batch)
        return sum_logprobs_B(self.current_BTV, self.batch) - reference_B


@dataclass(frozen=True)
class Losses:
    """The scalar to minimise, and its unweighted terms for the log (no gradient flows from these)."""

    total: Tensor
    forget: Tensor
    retain: Tensor | None


class Method(Protocol):
    """A frozen dataclass of hyper-parameters with a loss."""

    name: ClassVar[str]

    @property
    def reads(self) -> frozenset[Role]:
        """The sets that the loss looks at."""
        ...

    @property
    def compares(self) -> frozenset[Role]:
        """Those of them for which it needs the reference."""
        ...

    @property
    def compares_answers(self) -> frozenset[Role]:
        """Those of these for which the reference's log-probability of the whole answer is enough: it is
        the same at every step."""
        ...

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        """Scalar loss over the rows of one batch; `rows` has the roles that `reads` names."""
        ...


def holding(method: Method, factor: float) -> Method:
    """The same method with a retain term that weighs so many times as much, if it has one."""
    names = ("beta",) if method.name == "kl_minimisation" else ("retain_weight",)
    weights = {name: value for name, value in hyperparameters(method).items() if name in names}
    changed = {name: value * factor for name, value in weights.items()}
    return replace(cast(Any, method), **changed) if changed else method


def hyperparameters(method: Method) -> dict[str, Any]:
    """All hyper-parameters by name."""
    fields: dict[str, Any] = asdict(cast(Any, method))
    return fields


def weighted(
    forget: Tensor,
    forget_weight: float,
    rows: Mapping[Role, Rows],
    retain_weight: float,
    retain_loss: RetainLoss,
) -> Losses:
    """forget_weight * forget + retain_weight * (NLL or KL of the retain rows)."""
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
    """Values that are not finite numbers above 0."""
    for name, value in values.items():
        if not _is_number(value) or value <= 0:
            yield Problem(name, f"{value!r}, expected a number above 0")


def at_least_zero(**values: float) -> Iterator[Problem]:
    """Values that are not finite numbers of at least 0."""
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
    """Values that are not among the allowed ones."""
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
            next_step="mend the values",
            problems=problems,
        )


class WithRetainTerm:
    """Methods of the form forget_weight * F(forget) + retain_weight * R(retain): a method says F.

    No dataclass itself: the weights, and `retain_loss`, are fields of the method, in its own order.
    `positive` and `not_negative` name the fields that must be so; `looks_at` and `compared` the sets
    that F reads, and those of them for which it needs the reference.
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
        """F, a scalar."""
        raise NotImplementedError

    def loss(self, rows: Mapping[Role, Rows]) -> Losses:
        term = self.forget_term(rows)
        return weighted(term, self.forget_weight, rows, self.retain_weight, self.retain_loss)
