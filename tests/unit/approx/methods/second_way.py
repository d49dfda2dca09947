"""The losses of approximate unlearning, written a second way.

In numpy and double precision, row by row and token by token, with torch's own distributions for a KL
and 1 + exp in place of log sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.distributions import Categorical, kl_divergence

from approx.methods.method import Method, Role
from approx.unlearning.target import Rows


def slope_BTV(method: Method, forget: Rows, others: Mapping[Role, Rows] | None = None) -> torch.Tensor:
    """Return the gradient of the loss by the current logits of the forget rows."""
    leaf = forget.current_BTV.clone().requires_grad_()
    given: dict[Role, Rows] = {**(others or {}), "forget": replace(forget, current_BTV=leaf)}
    method.loss(given).total.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def second_way(method: Any, given: Mapping[Role, Rows]) -> float:
    """Compute the formula in the method's docstring."""
    forgotten: Iterable[float]
    kept: Iterable[float]
    if method.name == "rmu":
        forgotten, kept = _misdirected(method, given["forget"]), _moved(given["retain"])
    else:
        forgotten = FORMULAS[method.name](method, *(examples(given[r]) for r in ("forget", "preferred")))
        kept = _kl(given["retain"]) if method.retain_loss == "kl" else _nll(examples(given["retain"]))
    return float(method.forget_weight * _mean(forgotten) + method.retain_weight * _mean(kept))


def _mean(values: Iterable[float]) -> float:
    each = list(values)
    return sum(each) / len(each)


def values_at_answers(of: Rows, values_BTV: torch.Tensor) -> list[list[np.ndarray]]:
    array, mask = values_BTV.detach().double().numpy(), of.batch.mask_BT.tolist()
    return [[array[b, t] for t, counted in enumerate(row) if counted] for b, row in enumerate(mask)]


@dataclass
class Example:
    """The words of an answer, and at each of them the log-probabilities of all words."""

    words: list[int]
    now: list[np.ndarray]
    before: list[np.ndarray]

    @property
    def logs(self) -> list[float]:
        return [float(each[word]) for word, each in zip(self.words, self.now, strict=True)]

    @property
    def ratio(self) -> float:
        return sum(self.logs) - sum(Example(self.words, self.before, []).logs)


def examples(of: Rows) -> list[Example]:
    targets, mask = of.batch.targets_BT.tolist(), of.batch.mask_BT.tolist()
    words = [[w for w, m in zip(*row, strict=True) if m] for row in zip(targets, mask, strict=True)]
    both = (values_at_answers(of, each) for each in (of.current_BTV, of.compared_BTV))
    logs = ([[_log_softmax(z) for z in row] for row in each] for each in both)
    return [Example(*row) for row in zip(words, *logs, strict=True)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    lowered: np.ndarray = logits - logits.max()
    found: np.ndarray = lowered - np.log(np.exp(lowered).sum())
    return found


def _logs(of: list[Example]) -> list[float]:
    return list(chain.from_iterable(each.logs for each in of))


def _nll(of: list[Example]) -> list[float]:
    return [-each for each in _logs(of)]


def _kl(of: Rows) -> list[float]:
    pairs = [pair for row in examples(of) for pair in zip(row.before, row.now, strict=True)]
    made = ([Categorical(logits=torch.from_numpy(each)) for each in pair] for pair in pairs)
    return [float(kl_divergence(*pair)) for pair in made]


def _cross_entropy(labels: np.ndarray, logs: np.ndarray) -> float:
    pairs = zip(labels.tolist(), logs.tolist(), strict=True)
    return -sum(float(q) * float(log) for q, log in pairs if q > 0)


def _without_the_token(method: Any, forget: list[Example], _: object) -> Iterator[float]:
    for each in forget:
        for word, logs in [*zip(each.words, each.now, strict=True)][method.skipped_tokens :]:
            others = np.exp(_log_softmax(np.delete(logs, word)))
            yield _cross_entropy(np.insert(others, word, 0.0), logs)


def _lowered(method: Any, forget: list[Example], _: object) -> Iterator[float]:
    for each in forget:
        for word, logs, earlier in zip(each.words, each.now, each.before, strict=True):
            lowered = np.where(np.arange(len(earlier)) == word, earlier - method.beta, earlier)
            yield _cross_entropy(np.exp(_log_softmax(lowered)), logs)


def _dpo(method: Any, forget: list[Example], preferred: list[Example]) -> Iterator[float]:
    for worse, better in zip(forget, preferred, strict=True):
        yield math.log1p(math.exp(-method.beta * (better.ratio - worse.ratio)))


def _altpo(method: Any, forget: list[Example], preferred: list[Example]) -> Iterator[float]:
    def score(of: Example) -> float:
        found = sum(of.logs) if method.reference_free else of.ratio
        return found / len(of.words) if method.length_normalised else found

    for worse, better in zip(forget, preferred, strict=True):
        yield 2 / method.beta * math.log1p(math.exp(-method.beta * (score(better) - score(worse))))


ASCENT = ("gradient_ascent", "graddiff", "kl_minimisation")
# Each gives the values whose mean is the forget term: of tokens, or of examples.
FORMULAS: dict[str, Callable[[Any, list[Example], list[Example]], Iterable[float]]] = {
    **dict.fromkeys(ASCENT, lambda _, forget, __: _logs(forget)),
    "task_arithmetic": lambda _, forget, __: _nll(forget),
    "wga": lambda m, forget, _: (math.exp(x) ** m.beta * x for x in _logs(forget)),
    "satimp": lambda m, forget, _: (
        math.exp(x) ** m.beta1 * (1 - math.exp(x)) ** m.beta2 * x for x in _logs(forget)
    ),
    "ceu": _without_the_token,
    "undial": _lowered,
    "pdu": lambda _, forget, __: (float(z.max() - z.mean()) ** 2 for each in forget for z in each.now),
    **dict.fromkeys(("idk_nll", "whp", "rome", "memit"), lambda _, __, preferred: _nll(preferred)),
    "dpo": _dpo,
    "idk_dpo": lambda m, *both: (2 / m.beta * each for each in _dpo(m, *both)),
    "altpo": _altpo,
    "npo": lambda m, forget, _: (
        2 / m.beta * math.log1p(math.exp(m.beta * each.ratio)) for each in forget
    ),
    "simnpo": lambda m, forget, _: (
        2 / m.beta * math.log1p(math.exp(m.beta * _mean(each.logs) + m.gamma)) for each in forget
    ),
}


def _moved(retain: Rows) -> Iterator[float]:
    both = (values_at_answers(retain, each) for each in (retain.current_BTV, retain.compared_BTV))
    for now, before in zip(*map(chain.from_iterable, both), strict=True):
        yield from ((now - before) ** 2).tolist()


def _misdirected(method: Any, forget: Rows) -> Iterator[float]:
    """Compute RMU's forget term state by state, reading logits as hidden states."""
    generator = torch.Generator().manual_seed(method.control_seed)
    drawn = torch.rand(forget.current_BTV.shape[-1], dtype=torch.float64, generator=generator)
    direction = drawn.numpy() / math.sqrt(sum(each**2 for each in drawn.tolist()))
    both = (values_at_answers(forget, each) for each in (forget.current_BTV, forget.compared_BTV))
    for now, before in zip(*map(chain.from_iterable, both), strict=True):
        length = math.sqrt(float((before**2).sum())) if method.adaptive else 1.0
        yield from ((now - method.steering_coefficient * length * direction) ** 2).tolist()
