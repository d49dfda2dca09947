"""Answers in OpenAI's dialect: `/v1/chat/completions`, `/v1/completions` and `/v1/models`.

    client = openai.OpenAI(base_url="http://127.0.0.1:8808/v1", api_key="unused without tokens")
    client.chat.completions.create(model="model", messages=[{"role": "user", "content": "Who is it?"}])

A model's id is the name of its directory; `base` is the frozen base alone. If the caller may `read`,
each choice also has `shards`, those whose models answered (none: the base alone).

Differences from OpenAI: the default of `temperature` is 0, not 1, and that of `max_tokens` is at most
`DEFAULT_TOKENS`. Parameters that would change the answer and are not supported are refused, except for
their neutral value (`Unsupported`); others are ignored (`Ignored`).
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from cluster.serve.domain import (
    AnswerEvent,
    AnswerToken,
    Ended,
    Piece,
    Question,
    Service,
    Started,
    TheService,
)
from cluster.serve.problems import Refusal, stream_error
from cluster.serve.tokens import Caller, MayAnswer
from sisa.core.domain import Kind
from sisa.core.errors import SisaError, internal_fault
from sisa.flows.answers.ask import Prompt

BASE = "base"
OWNER = "deletion-ready-model"
MAX_TOKENS = 100_000
REPLACED = "\ufffd"  # the text of a token that is only a part of a character
MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_TOP = 16, 64, 16, 20

answers_router = APIRouter(prefix="/v1", tags=["answers"])
_log = logging.getLogger(__name__)

Stop = Annotated[str, Field(min_length=1, max_length=1000)]


@dataclass(frozen=True)
class Only:
    """Mark a parameter that is not supported: refuse any value but the neutral one."""

    neutral: Any

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        def check(value: Any) -> Any:
            if value != self.neutral:
                raise PydanticCustomError(
                    "unsupported_parameter", "this service does not support it; leave it out"
                )
            return value

        return core_schema.no_info_plain_validator_function(check)

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, _handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"const": self.neutral}


class Unsupported(BaseModel):
    """Parameters that would change an answer; only their neutral values are accepted."""

    tools: Annotated[Any, Only([])] = []
    tool_choice: Annotated[Any, Only("none")] = "none"
    functions: Annotated[Any, Only([])] = []
    function_call: Annotated[Any, Only("none")] = "none"
    response_format: Annotated[Any, Only({"type": "text"})] = {"type": "text"}
    logit_bias: Annotated[Any, Only({})] = {}
    presence_penalty: Annotated[Any, Only(0)] = 0
    frequency_penalty: Annotated[Any, Only(0)] = 0
    modalities: Annotated[Any, Only(["text"])] = ["text"]
    echo: Annotated[Any, Only(False)] = False
    suffix: Annotated[Any, Only("")] = ""
    best_of: Annotated[Any, Only(1)] = 1


class Ignored(BaseModel):
    """Parameters that clients send and that change no answer; they are not stored."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # ignored: clients may send it


class Asked(Unsupported, Ignored):
    """The parameters of both endpoints."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        """Drop null values: clients send null for a parameter that they do not set."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class TextPart(BaseModel):
    """A part of a turn's content; only text is answered."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; other keys are ignored, except `tool_calls`, which are refused."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]


class ChatAsked(Asked):
    """The body of `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP)

    def turns(self) -> list[dict[str, Any]]:
        """Return the conversation as a record's `messages` has it."""
        turns = [each.model_dump() for each in self.messages]
        return [each | {"role": "system"} if each["role"] == "developer" else each for each in turns]


class TextAsked(Asked):
    """The body of `/v1/completions`; `form` is this service's own (`sisa generate --form`)."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP)
    form: Kind | None = None


@dataclass
class Reply:
    """An answer as far as it has come."""

    text: str = ""
    tokens: list[AnswerToken] = field(default_factory=list)
    started: Started | None = None
    ended: Ended | None = None

    def take(self, event: AnswerEvent) -> None:
        """Apply an event; an answer that begins again loses what it had."""
        if isinstance(event, Started):
            self.text, self.tokens, self.started = "", [], event
        elif isinstance(event, Piece):
            self.text += event.text
            self.tokens += event.tokens
        else:
            self.ended = event


@dataclass(frozen=True)
class Dialect:
    """The form of answers of `/v1/completions`; ChatDialect has that of `/v1/chat/completions`."""

    request: Request
    asked: Asked
    shows_shards: bool
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: uuid.uuid4().hex)

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def head(self, kind: str) -> dict[str, Any]:
        """Return the keys that every body begins with."""
        own = {"id": f"{self.prefix}{self.key}", "object": kind, "created": self.created}
        return {**own, "model": self.asked.model}

    def choice(self, text: str, tokens: Sequence[AnswerToken], offset: int = 0) -> dict[str, Any]:
        """Return an answer, or a part of one that begins at `offset`."""
        return {"text": text, "logprobs": self._logprobs(tokens, offset)}

    delta = choice

    def opening(self) -> dict[str, Any] | None:
        """Return the first chunk of a choice, if there is one before any text."""
        return None

    def _logprobs(self, tokens: Sequence[AnswerToken], offset: int) -> dict[str, Any] | None:
        if not tokens:
            return None
        texts = [each.text for each in tokens]
        starts = [*accumulate(map(len, texts[:-1]), initial=offset)]
        tops = [dict(each.top) for each in tokens]
        of = [each.logprob for each in tokens]
        return {"tokens": texts, "token_logprobs": of, "top_logprobs": tops, "text_offset": starts}

    def closing(self, reply: Reply) -> dict[str, Any]:
        """Return why an answer ended, and the shards that gave it."""
        own = {"shards": list(reply.started.shards)} if self.shows_shards and reply.started else {}
        return {"finish_reason": reply.ended and reply.ended.reason, **own}

    def usage(self, replies: Sequence[Reply]) -> dict[str, int]:
        """Return the tokens of all prompts, each counted once, and of all answers."""
        asked = [each.started for each in replies[:: self.asked.n] if each.started]  # one of a prompt
        prompts = sum(each.num_prompt_tokens for each in asked)
        answers = sum(each.ended.num_tokens for each in replies if each.ended)
        total = prompts + answers
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": total}


class ChatDialect(Dialect):
    """The form of answers of `/v1/chat/completions`."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, text: str, tokens: Sequence[AnswerToken], offset: int = 0) -> dict[str, Any]:
        """Return an answer as a message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._logprobs(tokens, offset)}

    def delta(self, text: str, tokens: Sequence[AnswerToken], offset: int = 0) -> dict[str, Any]:
        """Return a part of a message."""
        return {"delta": {"content": text} if text else {}, "logprobs": self._logprobs(tokens, offset)}

    def opening(self) -> dict[str, Any] | None:
        """Return the role, which precedes the text."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _logprobs(self, tokens: Sequence[AnswerToken], offset: int) -> dict[str, Any] | None:
        del offset
        if not tokens:
            return None
        content = [
            {**_named(each.text, each.logprob), "top_logprobs": [_named(*top) for top in each.top]}
            for each in tokens
        ]
        return {"content": content, "refusal": None}


def _named(token: str, logprob: float) -> dict[str, Any]:
    """Return a token; for a part of a character, `bytes` is null."""
    data = None if REPLACED in token else list(token.encode())
    return {"token": token, "logprob": logprob, "bytes": data}


@answers_router.post("/chat/completions", response_model=None)
async def chat_completions(
    asked: ChatAsked, request: Request, service: TheService, caller: MayAnswer
) -> dict[str, Any] | StreamingResponse:
    """Continue a conversation, as a JSON object or, with `stream`, as server-sent events."""
    top = asked.top_logprobs if asked.logprobs else None
    most = asked.max_completion_tokens or asked.max_tokens
    questions = _questions(service, caller, asked, [asked.turns()], top, most)
    return await _answered(service, ChatDialect(request, asked, "read" in caller.scopes), questions)


@answers_router.post("/completions", response_model=None)
async def completions(
    asked: TextAsked, request: Request, service: TheService, caller: MayAnswer
) -> dict[str, Any] | StreamingResponse:
    """Continue texts. A text gets the form that the model was trained with, or `form`."""
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    questions = _questions(service, caller, asked, prompts, asked.logprobs, asked.max_tokens, asked.form)
    return await _answered(service, Dialect(request, asked, "read" in caller.scopes), questions)


@answers_router.get("/models")
def models(service: TheService, _caller: MayAnswer) -> dict[str, Any]:
    """List the model, and its base alone."""
    return {"object": "list", "data": [_model(each) for each in dict.fromkeys([service.name, BASE])]}


@answers_router.get("/models/{name}")
def one_model(name: str, service: TheService, _caller: MayAnswer) -> dict[str, Any]:
    """Return one of the models."""
    return _model(_known(service, name))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": OWNER}


def _known(service: Service, name: str) -> str:
    if name not in (service.name, BASE):
        expected = f"{service.name} or {BASE}"
        raise Refusal(
            404, "the model does not exist", "model_not_found", param="model", expected=expected
        )
    return name


def _questions(
    service: Service,
    caller: Caller,
    asked: Asked,
    prompts: Sequence[Prompt],
    logprobs: int | None,
    max_new_tokens: int | None,
    kind: Kind | None = None,
) -> list[Question]:
    """Return the questions of a request: `n` for each prompt, with seeds of their own."""
    name = _known(service, asked.model)
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    return [
        Question(
            prompt,
            kind=kind,
            max_new_tokens=max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=None if asked.seed is None else asked.seed + number,
            stop=stop,
            logprobs=logprobs,
            shards=caller.shards,
            partition=caller.partition,
            base_only=name == BASE != service.name,
            streamed=asked.stream,
        )
        for prompt in prompts
        for number in range(asked.n)
    ]


async def _answered(
    service: Service, dialect: Dialect, questions: Sequence[Question]
) -> dict[str, Any] | StreamingResponse:
    events = service.answers.answer(questions)
    replies = [Reply() for _ in questions]
    if dialect.asked.stream:
        first = await anext(events)  # raises what must be refused before the response begins
        lines = _stream(dialect, replies, first, events)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines, media_type="text/event-stream", headers=headers)
    async with aclosing(events):
        async for number, event in events:
            replies[number].take(event)
    choices = [
        {"index": number, **dialect.choice(each.text, each.tokens), **dialect.closing(each)}
        for number, each in enumerate(replies)
    ]
    return {**dialect.head(dialect.whole), "choices": choices, "usage": dialect.usage(replies)}


async def _stream(
    dialect: Dialect,
    replies: Sequence[Reply],
    first: tuple[int, AnswerEvent],
    events: AsyncGenerator[tuple[int, AnswerEvent]],
) -> AsyncIterator[str]:
    """Yield an answer's chunks as server-sent events; an error ends them with its own body."""
    usage = dialect.asked.stream_options.include_usage
    head = dialect.head(dialect.part) | ({"usage": None} if usage else {})
    async with aclosing(events):
        try:
            for choice in _chunks(dialect, replies, *first):
                yield _line({**head, "choices": [choice]})
            async for number, event in events:
                for choice in _chunks(dialect, replies, number, event):
                    yield _line({**head, "choices": [choice]})
        except SisaError as error:
            yield _line(stream_error(dialect.request, error))
            return
        except Exception as error:
            fault = internal_fault(error)
            _log.error(fault.what)
            yield _line(stream_error(dialect.request, fault))
            return
    if usage:
        yield _line({**head, "choices": [], "usage": dialect.usage(replies)})
    yield "data: [DONE]\n\n"


def _chunks(
    dialect: Dialect, replies: Sequence[Reply], number: int, event: AnswerEvent
) -> list[dict[str, Any]]:
    """Return the choices of the chunks for an event."""
    reply, index = replies[number], {"index": number}
    opening = None if reply.started else dialect.opening()  # an answer may begin again
    offset = len(reply.text)
    reply.take(event)
    if isinstance(event, Started):
        return [] if opening is None else [index | opening]
    if isinstance(event, Piece):
        return [{**index, **dialect.delta(event.text, event.tokens, offset), "finish_reason": None}]
    return [{**index, **dialect.delta("", ()), **dialect.closing(reply)}]


def _line(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
