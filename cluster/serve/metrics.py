"""Provide metrics for Prometheus at `/metrics` (scope `operate`).

    scrape_configs:
      - job_name: sisa
        authorization: {credentials_file: /etc/prometheus/sisa.token}
        static_configs: [{targets: ["127.0.0.1:8808"]}]

The queue, the retrained slices and the revoked adapters are read from the ledger and the log at each
scrape; series that `sisa run --watch` exports through Ray have the same names here. Each replica counts
its own answers, and the replica that is scraped collects the counts of all. No label names a record, a
text, a token or a caller.

>>> meters = AnswerMeters()
>>> meters.answered(Ended("stop", num_tokens=7), shards=(1, 4))
>>> meters.registry.get_sample_value("sisa_answers_total", {"route": "several"})
1.0
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cluster.observe.ray_metrics import SERIES, queue_readings
from cluster.serve.domain import AnswerEvent, Answers, Ended, Piece, Question, Service, Started
from cluster.serve.tokens import MayOperate
from sisa.core.errors import InvalidInput
from sisa.evidence.revocations import num_revoked

ROUTE_NAMES = ("base", "one", "several")  # by how many shards answer
FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
FINISHED = ("retrained", "completed")  # states of requests whose slices are trained again

metrics_router = APIRouter(tags=["metrics"])


class AnswerMeters:
    """Count the answers of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        tokens = "Tokens of complete answers"
        self._tokens = Counter("sisa_answer_tokens", tokens, registry=self.registry)
        answers = "Complete answers, by who gave them: the base alone, one shard, several shards"
        self._answers = Counter("sisa_answers", answers, ["route"], registry=self.registry)
        self._first_token = Histogram(
            "sisa_time_to_first_token_seconds",
            "Seconds from a question until its answer begins",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        for name in ROUTE_NAMES:
            self._answers.labels(name)

    def of(self, replica: str) -> list[Metric]:
        """Return all series, labelled with the name of a replica."""
        found = list(self.registry.collect())
        for each in found:
            each.samples = [
                sample._replace(labels={**sample.labels, "replica": replica}) for sample in each.samples
            ]
        return found

    def began(self, seconds: float) -> None:
        """Count the beginning of an answer."""
        self._first_token.observe(seconds)

    def answered(self, ended: Ended, shards: Sequence[int]) -> None:
        """Count a complete answer."""
        self._tokens.inc(ended.num_tokens)
        self._answers.labels(ROUTE_NAMES[min(len(shards), 2)]).inc()


class MeasuredAnswers:
    """Pass answers on, and count them."""

    def __init__(self, answers: Answers, meters: AnswerMeters) -> None:
        self._answers, self._meters = answers, meters

    async def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        """Yield the events of the answers."""
        asked_at, begun = time.perf_counter(), set[int]()
        shards: dict[int, tuple[int, ...]] = {}
        async with aclosing(self._answers.answer(questions)) as events:
            async for number, event in events:
                if isinstance(event, Started):
                    shards[number] = event.shards
                elif isinstance(event, Piece) and number not in begun:
                    begun.add(number)
                    self._meters.began(time.perf_counter() - asked_at)
                elif isinstance(event, Ended):
                    self._meters.answered(event, shards[number])
                yield number, event


class ServiceMeters(Collector):
    """Collect all metrics of a service: the model's, read at each scrape, and its answers'."""

    def __init__(self, service: Service) -> None:
        self.answers = AnswerMeters()
        self._collect_answers = service.measured_everywhere or self.answers.registry.collect
        self._model = service.model
        self._revoked: tuple[int, int | None] = (-1, None)  # number of accepted requests, of adapters

    def collect(self) -> Iterator[Metric]:
        """Yield the model's series, then those of all replicas, one family after the other."""
        yield from self._of_model()
        families: dict[str, Metric] = {}
        for each in self._collect_answers():
            if each.name in families:
                families[each.name].samples += each.samples
            else:
                families[each.name] = each
        yield from families.values()

    def _of_model(self) -> Iterator[Metric]:
        """Yield the queue, the slices that deletions retrained, and the adapters that they revoked."""
        for name, value in queue_readings(self._model.queue(recorded=False)).items():
            if not math.isnan(value):
                yield GaugeMetricFamily(name, SERIES[name][1], value)
        accepted = [each.request for each in self._model.requests() if each.request.committed_at]
        batches = {  # requests of one batch share its commit
            (each.committed_at, shard): num_slices
            for each in accepted
            if each.state in FINISHED
            for shard, _, num_slices in each.shards
        }
        retrained = "Slices that deletions trained again"
        yield CounterMetricFamily("sisa_slices_retrained", retrained, sum(batches.values()))
        if (revoked := self._num_revoked(len(accepted))) is not None:
            what = "Adapters that deletions revoked, and that no holder may use"
            yield GaugeMetricFamily("sisa_revoked_adapters", what, revoked)

    def _num_revoked(self, num_accepted: int) -> int | None:
        """Return how many adapters were revoked, read again after a deletion; None without keys."""
        if self._revoked[0] != num_accepted:
            try:
                self._revoked = (num_accepted, num_revoked(self._model))
            except InvalidInput:
                self._revoked = (num_accepted, None)
        return self._revoked[1]


@metrics_router.get(
    "/metrics",
    summary="All metrics, for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}},
)
def read_metrics(request: Request, _caller: MayOperate) -> Response:
    """Return all series, in the format that the client prefers."""
    encode, kind = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(request.app.state.meters), media_type=kind)
