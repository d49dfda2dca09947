"""OpenAI's dialect over a fake of the engine: bodies, chunks, parameters, refusals, and answers cut."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.serve.app import build_app
from cluster.serve.domain import Service
from cluster.serve.tokens import Caller, Scope
from sisa.core.errors import Outdated
from tests.fakes.answers import FakeAnswers
from tests.fakes.tokens import KnownTokens
from tests.unit.serve.conftest import LOOPBACK

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "one two three"}]

Ask = Callable[..., Any]


@pytest.fixture
def answers(service: Service) -> FakeAnswers:
    assert isinstance(service.answers, FakeAnswers)
    return service.answers


@pytest.fixture
def ask(client: TestClient) -> Ask:
    """Post a chat, or a text if a prompt is given; return the response."""

    def post(**body: Any) -> Any:
        path = TEXT if "prompt" in body else CHAT
        asked = {"model": "model"} if path == TEXT else {"model": "model", "messages": HELLO}
        return client.post(path, json=asked | body)

    return post


def chunks(response: Any) -> list[dict[str, Any]]:
    """Return the events of a stream, without the last, which ends it."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-1] == ""
    return [json.loads(each.removeprefix("data: ")) for each in events[:-1] if "[DONE]" not in each]


def test_a_chat_has_openais_form(ask: Ask) -> None:
    body = ask(logprobs=True, top_logprobs=2).json()
    found = ChatCompletion.model_validate(body, strict=True)
    assert found.id.startswith("chatcmpl-")
    assert found.model == "model"
    (choice,) = found.choices
    assert choice.message.content == "one two three "
    assert choice.finish_reason == "stop"
    assert body["choices"][0]["shards"] == [1]
    assert found.usage is not None
    counted = found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens
    assert counted == (3, 3, 6)
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert [each.token for each in tokens] == ["one ", "two ", "three "]
    assert all(bytes(each.bytes or []).decode() == each.token for each in tokens)
    assert [each.logprob for each in tokens[0].top_logprobs] == [-2.0, -3.0]


def test_texts_have_openais_form(ask: Ask) -> None:
    body = ask(prompt=["a b", "c"], n=2, max_tokens=1, logprobs=1).json()
    found = Completion.model_validate(body, strict=True)
    assert [each.index for each in found.choices] == [0, 1, 2, 3]
    assert [each.text for each in found.choices] == ["a ", "a ", "c ", "c "]
    assert [each.finish_reason for each in found.choices] == ["length", "length", "stop", "stop"]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 4)
    (first, *_) = [each.logprobs for each in found.choices]
    assert first is not None
    assert (first.tokens, first.token_logprobs, first.text_offset) == (["a "], [-0.5], [0])
    assert first.top_logprobs == [{"other0": -2.0}]


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_says_what_the_whole_answer_does(ask: Ask, usage: bool) -> None:
    response = ask(stream=True, n=2, logprobs=True, stream_options={"include_usage": usage})
    assert response.text.endswith("data: [DONE]\n\n")
    events = chunks(response)
    parsed = [ChatCompletionChunk.model_validate(each, strict=True) for each in events]
    assert len({each.id for each in parsed}) == 1
    if usage:
        assert [each.usage for each in parsed[:-1]] == [None] * (len(parsed) - 1)
        assert parsed[-1].choices == []
        assert events[-1]["usage"] == ask(n=2).json()["usage"]
    assert any(each.usage for each in parsed) == usage
    assert ["usage" in each for each in events] == [usage] * len(events)
    for index in range(2):
        own = [each for chunk in parsed for each in chunk.choices if each.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(each.delta.content or "" for each in own) == "one two three "
        assert [each.finish_reason for each in own] == [None] * (len(own) - 1) + ["stop"]
        assert sum(len(each.logprobs.content or []) for each in own if each.logprobs) == 3
    last = [each["choices"][0] for each in events if each["choices"]]
    assert [each["shards"] for each in last if each["finish_reason"]] == [[1], [1]]


def test_a_stream_of_a_text(ask: Ask) -> None:
    choices = [each["choices"][0] for each in chunks(ask(prompt="a b", stream=True, logprobs=0))]
    assert [each["text"] for each in choices] == ["a ", "b ", ""]
    assert [each["finish_reason"] for each in choices] == [None, None, "stop"]
    assert [each["logprobs"]["text_offset"] for each in choices[:2]] == [[0], [2]]


def test_parameters_reach_the_engine(ask: Ask, answers: FakeAnswers) -> None:
    sent = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "three", "n": 2}
    assert ask(**sent, max_completion_tokens=5, max_tokens=9).status_code == 200
    one, two = answers.asked
    assert one == replace(two, seed=7)
    assert (one.temperature, one.top_p, one.stop, one.max_new_tokens) == (0.5, 0.9, ("three",), 5)
    assert (one.seed, two.seed) == (7, 8)
    assert ask(prompt="a", form="completion", model="base", stream=True).status_code == 200
    last = answers.asked[-1]
    assert (last.kind, last.base_only, last.streamed, last.logprobs) == ("completion", True, True, None)
    developer = [{"role": "developer", "content": [{"type": "text", "text": "b"}], "name": "x"}, *HELLO]
    assert ask(messages=developer).status_code == 200
    prompt = answers.asked[-1].prompt
    assert not isinstance(prompt, str)
    assert [each["role"] for each in prompt] == ["system", "user"]


NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
}
HARMFUL = {
    "tools": [{"type": "function"}],
    "response_format": {"type": "json_object"},
    "logit_bias": {"5": 1},
    "presence_penalty": 0.5,
    "echo": True,
    "best_of": 2,
}


def test_what_is_neutral_or_absent_or_ignored_is_accepted(ask: Ask) -> None:
    ignored = {"user": "somebody", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    nothing = {"temperature": None, "stop": None, "max_tokens": None, "stream_options": None}
    assert ask(**NEUTRAL, **ignored, **nothing).status_code == 200


@pytest.mark.parametrize("name", sorted(HARMFUL))
def test_what_is_not_supported_is_refused_by_name(ask: Ask, answers: FakeAnswers, name: str) -> None:
    found = ask(**{name: HARMFUL[name]})
    error = found.json()["error"]
    assert (found.status_code, error["param"]) == (422, name)
    assert error["code"] == "unsupported_parameter"
    assert answers.asked == []


BAD: dict[str, Any] = {
    "temperature": 2.1,
    "top_p": 0,
    "n": 0,
    "max_tokens": 0,
    "stop": [""],
    "top_logprobs": 21,
    "messages": [],
    "no_such_parameter": 1,
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_values_are_refused_by_name(ask: Ask, name: str) -> None:
    found = ask(**{name: BAD[name]})
    assert (found.status_code, found.json()["error"]["param"]) == (422, name)
    assert name in found.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_answered_is_refused_before_the_response(ask: Ask, stream: bool) -> None:
    found = ask(messages=[{"role": "user", "content": ""}], stream=stream)
    assert (found.status_code, found.json()["error"]["code"]) == (400, "InvalidInput")


def test_the_model_and_its_base_are_there_and_no_other(client: TestClient, ask: Ask) -> None:
    listed = client.get("/v1/models").json()
    assert [Model.model_validate(each, strict=True).id for each in listed["data"]] == ["model", "base"]
    assert client.get("/v1/models/model").json() == listed["data"][0]
    assert ask(model="base").json()["choices"][0]["shards"] == []
    for found in (client.get("/v1/models/other"), ask(model="other"), ask(prompt="a", model="other")):
        error = found.json()["error"]
        assert found.status_code == 404
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_begins_again_is_only_the_second(
    ask: Ask, answers: FakeAnswers, stream: bool
) -> None:
    answers.cut_after = 0 if stream else 2  # a stream begins again only before its text
    response = ask(stream=stream)
    if stream:
        choices = [each["choices"][0] for each in chunks(response)]
        assert [each["delta"].get("role") for each in choices].count("assistant") == 1
        text = "".join(each["delta"].get("content", "") for each in choices)
        assert (text, choices[-1]["shards"]) == ("one two three ", [2])
    else:
        (choice,) = response.json()["choices"]
        assert (choice["message"]["content"], choice["shards"]) == ("one two three ", [2])


@pytest.mark.parametrize("error", [Outdated("a deletion cut this answer"), KeyError("Mara Quill")])
def test_a_stream_that_fails_ends_with_the_error(
    ask: Ask,
    answers: FakeAnswers,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(FakeAnswers, "_events", failing_after_a_piece(FakeAnswers._events, error))
    with caplog.at_level(logging.DEBUG):
        response = ask(stream=True)
    last = chunks(response)[-1]
    assert set(last) == {"error"}
    assert last["error"]["type"] == "server_error"
    assert "[DONE]" not in response.text
    assert "Mara Quill" not in response.text + caplog.text
    assert answers.closed == 1


def failing_after_a_piece(events: Any, error: Exception) -> Any:
    def failing(self: FakeAnswers, question: Any) -> Any:
        yield from events(self, question)[:2]
        raise error

    return failing


def test_a_cut_answer_is_an_error_to_try_again(ask: Ask, answers: FakeAnswers) -> None:
    answers.cut_after, answers.error = 0, Outdated("a deletion cut this answer")
    found = ask()
    assert found.status_code == 503
    assert int(found.headers["retry-after"]) > 0
    assert found.json()["error"]["code"] == "Outdated"


@pytest.mark.parametrize("reads", [False, True])
def test_who_may_not_read_does_not_learn_which_shards_hold_a_person(
    service: Service, answers: FakeAnswers, reads: bool
) -> None:
    scopes: frozenset[Scope] = frozenset({"answer", "read"} if reads else {"answer"})
    tokens = KnownTokens(app=Caller("app", "app", scopes, frozenset({1})))
    app, headers = build_app(replace(service, tokens=tokens)), {"Authorization": "Bearer app"}
    with TestClient(app, base_url=LOOPBACK, headers=headers) as client:
        body = {"model": "model", "messages": HELLO}
        assert ("shards" in client.post(CHAT, json=body).text) == reads
        assert ("shards" in client.post(CHAT, json={**body, "stream": True}).text) == reads
    assert [each.shards for each in answers.asked] == [frozenset({1})] * 2
