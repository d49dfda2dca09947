"""Define the nouns of the service: `Service`, `Question`, and the events of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from fastapi import Depends, Request

from cluster.serve.tokens import Tokens
from sisa.config.config import ServiceBlock
from sisa.core.domain import Kind
from sisa.flows.answers.ask import Prompt
from sisa.model import Model

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True)
class Question:
    """What to answer, and how."""

    prompt: Prompt
    kind: Kind | None = None  # the form of a text; None: as the model was trained
    max_new_tokens: int | None = None  # None: DEFAULT_TOKENS, or as many as fit
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # most likely tokens to name at each position; None: no probabilities
    shards: frozenset[int] | None = None  # those that the caller may read; None: all
    partition: str = ""  # in which the shards were named
    base_only: bool = False
    streamed: bool = False  # the client sees pieces before the end, so the answer may not begin again


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer: its text, its log-probability, and the likeliest tokens in its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Started:
    """An answer begins, or begins again after a deletion: what came before is void."""

    shards: tuple[int, ...]  # whose models answer; none: the base alone
    num_prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The next part of an answer; tokens are given if probabilities were asked for."""

    text: str
    tokens: tuple[AnswerToken, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer is complete."""

    reason: Literal["stop", "length"]
    num_tokens: int


AnswerEvent = Started | Piece | Ended


class Answers(Protocol):
    """The port to the models: a replica's engine, or a fake."""

    def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        """Yield the events of each question's answer, by its position, until all have ended.

        Raise InvalidInput for a question that can't be answered, before anything is yielded; Outdated
        if a deletion cuts an answer that may not begin again. Closing the generator cancels the answers.
        """


@dataclass(frozen=True)
class Service:
    """A model and what its endpoints need; every call of `model` adopts what others have committed."""

    model: Model
    answers: Answers
    tokens: Tokens | None  # None: anybody on this machine may do everything
    settings: ServiceBlock
    measured_everywhere: Callable[[], list[Metric]] | None = None  # None: this is the only process

    @property
    def name(self) -> str:
        """Return the model's name for clients: that of its directory."""
        return self.model.directory.resolve().name


def service_of(request: Request) -> Service:
    """Return the service that an application was built for; a dependency of its endpoints."""
    found: Service = request.app.state.service
    return found


TheService = Annotated[Service, Depends(service_of)]  # as a parameter of an endpoint
