"""Series of the service: their values, their labels, who may read them, and Grafana's dashboard."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cluster.jobs.kuberay import manifest
from cluster.serve.app import build_app
from cluster.serve.domain import AnswerEvent, Ended, Piece, Question, Service, Started
from cluster.serve.metrics import ROUTE_NAMES, AnswerMeters, MeasuredAnswers
from sisa.evidence.keys.keys import create_keys
from sisa.evidence.open_evidence import state_what_is_held
from sisa.evidence.revocations import publish
from sisa.flows.requests import Terms
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.model import Model
from tests.models.confessing import record
from tests.models.tiny_model import all_files
from tests.unit.serve.conftest import LOOPBACK

Sample = tuple[str, tuple[tuple[str, str], ...]]
LABELS = {"route", "le"}


def scraped(client: TestClient) -> dict[Sample, float]:
    """Return the value of every sample."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (each.name, tuple(sorted(each.labels.items()))): each.value
        for family in text_string_to_metric_families(answer.text)
        for each in family.samples
    }


def value(client: TestClient, name: str, **labels: str) -> float | None:
    return scraped(client).get((name, tuple(sorted(labels.items()))))


def submitted(model: Model, number: int, **terms: Any) -> str:
    return model.submit([record(number).id], terms=Terms(**terms)).request.request_id


def test_the_queue_is_read_at_each_scrape(client: TestClient, service: Service) -> None:
    assert value(client, "sisa_queue_depth") == 0
    assert value(client, "sisa_oldest_days_left") is None  # no request is open
    name = submitted(service.model, 1)
    submitted(service.model, 2, approver="dpo", regime="delete-act")
    assert value(client, "sisa_queue_depth") == 1
    assert value(client, "sisa_requests_undecided") == 1
    left = service.model.request(name).days_left
    assert value(client, "sisa_oldest_days_left") == left < 45
    assert value(client, "sisa_failed_erasures") == 0


def test_a_scrape_writes_nothing(client: TestClient, service: Service) -> None:
    submitted(service.model, 1)
    before = all_files(service.model.directory)
    scraped(client)
    assert all_files(service.model.directory) == before


def test_slices_that_a_batch_retrained_are_counted_once(client: TestClient, service: Service) -> None:
    assert value(client, "sisa_slices_retrained_total") == 0
    model = service.model
    for number in range(6):
        submitted(model, number, approver="dpo")
    assert value(client, "sisa_slices_retrained_total") == 0
    done = model.run()
    batch = {(shard, num) for each in done for shard, _, num in each.shards}
    assert len(batch) < sum(len(each.shards) for each in done)  # the requests share shards
    total = sum(num for _, num in batch)
    assert value(client, "sisa_slices_retrained_total") == total > 0
    submitted(model, 7, approver="dpo")
    (last,) = model.run()
    total += sum(num for _, _, num in last.shards)
    assert value(client, "sisa_slices_retrained_total") == total


def test_revoked_adapters_are_those_of_the_feed(client: TestClient, service: Service) -> None:
    model = service.model
    assert value(client, "sisa_revoked_adapters") is None  # the model has no keys
    create_keys(evidence_keys_dir(model.config, model.id), model.id)
    state_what_is_held(model)
    model.forget([record(3).id])
    assert value(client, "sisa_revoked_adapters") == publish(model).revoked > 0
    model.forget([record(4).id], defer=True)
    assert value(client, "sisa_revoked_adapters") == publish(model).revoked  # pending ones, too


class Scripted:
    """Answers with given events, each after a number of seconds."""

    def __init__(self, *events: tuple[float, int, AnswerEvent]) -> None:
        self.events = events
        self.closed = False

    async def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        del questions
        try:
            for seconds, number, event in self.events:
                await asyncio.sleep(seconds)
                yield number, event
        finally:
            self.closed = True


def measured(*events: tuple[float, int, AnswerEvent], most: int = 99) -> tuple[AnswerMeters, Scripted]:
    """Return what was measured of some events, of which a caller takes `most`."""
    meters, answers = AnswerMeters(), Scripted(*events)

    async def take() -> list[tuple[int, AnswerEvent]]:
        found = []
        stream = MeasuredAnswers(answers, meters).answer([Question("a"), Question("b")])
        async for each in stream:
            found.append(each)
            if len(found) == most:
                break
        await stream.aclose()
        return found

    assert asyncio.run(take()) == [(number, event) for _, number, event in events][:most]
    return meters, answers


def test_answers_are_counted_by_who_gave_them() -> None:
    meters, _ = measured(
        (0, 0, Started((), 3)),
        (0, 1, Started((2,), 3)),
        (0, 0, Piece("x")),
        (0, 0, Ended("stop", 5)),
        (0, 1, Piece("y")),
        (0, 1, Started((1, 3), 3)),  # a deletion cut it: it begins again on other shards
        (0, 1, Piece("z")),
        (0, 1, Ended("length", 7)),
    )
    value = meters.registry.get_sample_value
    routes = {name: value("sisa_answers_total", {"route": name}) for name in ROUTE_NAMES}
    assert routes == {"base": 1, "one": 0, "several": 1}
    assert value("sisa_answer_tokens_total") == 12
    assert value("sisa_time_to_first_token_seconds_count") == 2  # what a person saw first counts


def test_the_time_to_the_first_token_includes_waiting() -> None:
    meters, _ = measured((0.06, 0, Started((1,), 3)), (0.06, 0, Piece("x")), (0.2, 0, Ended("stop", 1)))
    value = meters.registry.get_sample_value
    assert 0.12 <= (value("sisa_time_to_first_token_seconds_sum") or 0) < 0.3
    assert value("sisa_time_to_first_token_seconds_bucket", {"le": "0.1"}) == 0


def test_an_answer_that_nobody_waits_for_is_given_up() -> None:
    meters, answers = measured(
        (0, 0, Started((1,), 3)), (0, 0, Piece("x")), (9, 0, Ended("stop", 1)), most=2
    )
    assert answers.closed
    assert meters.registry.get_sample_value("sisa_answer_tokens_total") == 0


def test_every_replica_shows_what_all_of_them_answered(service: Service) -> None:
    replicas = {name: AnswerMeters() for name in ("a", "b")}

    def everywhere() -> list[Metric]:
        return [family for name, each in replicas.items() for family in each.of(name)]

    client = TestClient(build_app(replace(service, measured_everywhere=everywhere)), LOOPBACK)
    replicas["a"].answered(Ended("stop", 5), (1,))
    replicas["b"].answered(Ended("stop", 3), ())
    assert value(client, "sisa_answers_total", replica="a", route="one") == 1
    assert value(client, "sisa_answers_total", replica="b", route="one") == 0
    tokens = [value(client, "sisa_answer_tokens_total", replica=name) for name in replicas]
    assert tokens == [5, 3]
    lines = client.get("/metrics").text.splitlines()
    heads = [each for each in lines if each.startswith("# TYPE")]
    assert len(set(heads)) == len(heads)  # a family is written once
    del replicas["a"]
    assert value(client, "sisa_answers_total", replica="a", route="one") is None


def ask(client: TestClient, text: str) -> None:
    asked = {"model": "model", "messages": [{"role": "user", "content": text}]}
    assert client.post("/v1/chat/completions", json=asked).status_code == 200


def test_no_series_names_a_record_a_text_or_a_caller(client: TestClient, service: Service) -> None:
    submitted(service.model, 1, external_id="ticket-of-somebody", reason="a reason")
    ask(client, "tell me of somebody")
    answer = client.get("/metrics").text
    words = (record(1).id, "ticket", "somebody", "reason", "local")
    assert not [each for each in words if each in re.sub(r"^#.*$", "", answer, flags=re.M)]
    assert {name for _, labels in scraped(client) for name, _ in labels} <= LABELS


def test_a_client_may_ask_for_openmetrics(client: TestClient) -> None:
    answer = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


# --- Grafana -------------------------------------------------------------------------------------

BOARD = json.loads(manifest("grafana"))
QUERIES = [each["expr"] for panel in BOARD["panels"] for each in panel["targets"]]
PROMQL = {"sum", "min", "max", "rate", "increase", "histogram_quantile", "by", "d"}
PROMQL |= {"le", "route", "replica"}  # labels


def test_every_query_of_the_dashboard_names_a_series_that_exists(
    client: TestClient, service: Service
) -> None:
    submitted(service.model, 1)
    names = {name for name, _ in scraped(client)} | {"sisa_revoked_adapters"}  # of a model with keys
    asked = {word for query in QUERIES for word in re.findall(r"sisa_\w+", query)}
    assert asked <= names
    named = {name for name in names if not name.endswith("_created")}
    series = {re.sub("_(bucket|sum|count)$", "", name) for name in named}
    assert series == {re.sub("_bucket$", "", name) for name in asked}  # each has a panel


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_has_nothing_else(query: str) -> None:
    words = set(re.findall(r"[a-z_]+", re.sub(r"\$__rate_interval|sisa_\w+", "", query)))
    assert words <= PROMQL
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize("query", [each for each in QUERIES if "sum" in each])
def test_what_every_replica_shows_is_counted_once(query: str) -> None:
    """Whoever scrapes each pod gets every series as often as there are pods."""
    assert re.search(r"sum(?: by \(\w+\) )?\(max by \((?:\w+, )?replica\) \(rate\(", query)


def test_the_dashboard_can_be_imported() -> None:
    panels = BOARD["panels"]
    assert len({each["id"] for each in panels}) == len(panels)
    (source,) = BOARD["templating"]["list"]
    assert (source["name"], source["query"]) == ("datasource", "prometheus")
    cells = [
        (x, y)
        for each in panels
        for x in range(each["gridPos"]["x"], each["gridPos"]["x"] + each["gridPos"]["w"])
        for y in range(each["gridPos"]["y"], each["gridPos"]["y"] + each["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel lies over another
    assert max(x for x, _ in cells) == 23
    for each in panels:
        assert each["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert each["title"]
        assert each["description"]
