"""A replica of the service: one process that holds the base and all adapters, and answers.

    engine = Engine(open_model("model"), ServiceBlock())
    async for number, event in engine.answer([Question("Who is it?")]):
        ...                          # (0, Started(...)), (0, Piece(...)), ..., (0, Ended(...))

One thread routes prompts, one watches the ledger, and one runs the batch
(`sisa/lm/answer/continuous.py`). The last adopts what others have committed: before a request joins the
batch, and after each commit. So no answer that starts after a deletion's commit uses a model that the
deletion tainted. A running answer that it cuts is routed again and begins again, unless its client has
seen a part of it or the run file says `on_deletion: end`.

`sisa serve` deploys `replica(...)` (`service.py`); a config file of Ray Serve names `application`
(`cluster/jobs/manifests/rayservice.yaml`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI
from ray import serve

from cluster.serve.app import build_app
from cluster.serve.domain import AnswerEvent, AnswerToken, Ended, Piece, Question, Service, Started
from cluster.serve.tokens import Tokens
from sisa.config.config import RunConfig, ServiceBlock
from sisa.core.errors import EnvironmentFault, Outdated, SisaError, internal_fault
from sisa.flows.answers.ask import Routed
from sisa.lm.answer import continuous
from sisa.lm.answer.sampling import Sampling
from sisa.model import Model, open_model

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from cluster.serve.metrics import ServiceMeters

WATCH_S = 0.1  # for a commit, and before reading a ledger again that could not be read
DEFAULT_TOKENS = 256  # of an answer, if the context of the base has room
WAITING_PER_ROW = 16  # requests that may wait, for each row of the batch
_METERS_WAIT_S = 5.0  # for the metrics of other replicas
QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # a path may hold a record's id
NORMAL_PRIORITY = {"RAY_worker_niceness": "0"}  # by default Ray's workers yield to all other processes
CHECK_S = 3.0  # between looks at a replica; one that fails three times is replaced
MOST_AT_ONCE = 10_000  # requests of a replica; the engine refuses what is too much for it

_log = logging.getLogger(__name__)

Again = Literal["stale", "cut"]  # routed before the newest commit; or cut while it was answered
Happened = AnswerEvent | SisaError | Again  # to a question


@dataclass(eq=False)
class Pending:
    """A question on its way through the batch; it is its own key there."""

    number: int
    question: Question
    routed: Routed
    put: Callable[[tuple[Pending, Happened]], object]  # from any thread
    is_seen: bool = False  # whether the client has seen a part of the answer

    def report(self, what: Happened) -> None:
        self.put((self, what))


class Engine:
    """Load the models of a replica, and answer with them in threads of its own."""

    def __init__(self, model: Model, settings: ServiceBlock) -> None:
        """Load the base and all adapters. Raise IntegrityError."""
        self._model, rows = model, settings.max_concurrent
        self._limits = {"max_rows": rows, "max_waiting": rows * WAITING_PER_ROW}
        self._serving = model.serving(**self._limits)
        self._committed = threading.Event()  # since the last adoption, perhaps
        self._wake = threading.Condition()
        self._groups: list[list[Pending]] = []  # to admit: all questions of a request, or none
        self._cancelled: list[Pending] = []
        self._is_open = True
        self._router = ThreadPoolExecutor(1, thread_name_prefix="router")
        self._router.submit(self._routes_of, [Question("Who?")]).result()  # loads the embedder
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._thread.start()
        self._watcher.start()

    def close(self) -> None:
        """End the threads; answers that run end in an error."""
        with self._wake:
            self._is_open = False
            self._wake.notify()
        self._thread.join()
        self._watcher.join()
        self._router.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Raise EnvironmentFault if the batch does not run any more."""
        if not (self._thread.is_alive() and self._watcher.is_alive()):
            raise EnvironmentFault("the service's models do not answer any more")

    async def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        """Answer questions as `Answers` says."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[Pending, Happened]] = asyncio.Queue()

        def put(event: tuple[Pending, Happened]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        routed = await loop.run_in_executor(self._router, self._routes_of, questions)
        rows = [Pending(n, each, routed[n], put) for n, each in enumerate(questions)]
        unfinished = set(rows)
        try:
            self._submit(rows)
            while unfinished:
                row, what = await events.get()
                if isinstance(what, SisaError):
                    raise what
                if isinstance(what, str):  # it begins again
                    self._check_may_begin_again(row, what)
                    (row.routed,) = await loop.run_in_executor(
                        self._router, self._routes_of, [row.question]
                    )
                    self._submit([row])
                    continue
                if isinstance(what, Ended):
                    unfinished.discard(row)
                row.is_seen |= isinstance(what, Piece) and row.question.streamed
                yield row.number, what
        finally:
            with self._wake:
                self._cancelled += unfinished
                self._wake.notify()

    def _routes_of(self, questions: Sequence[Question]) -> list[Routed]:
        """Return the route of each question of one request; route the same prompt once."""
        first = questions[0]  # all have its caller and form
        prompts = {id(each.prompt): each.prompt for each in questions}
        model = self._model
        if first.base_only:
            model = model.within((), model.partition)
        elif first.shards is not None:
            model = model.within(first.shards, first.partition)
        routed = model.routed(list(prompts.values()), kind=first.kind)
        found = dict(zip(prompts, routed, strict=True))
        return [found[id(each.prompt)] for each in questions]

    def _check_may_begin_again(self, row: Pending, why: Again) -> None:
        """Raise Outdated for an answer that was cut and may not begin again.

        The model has adopted the commit that cut it, and with it a changed run file.
        """
        if why == "cut" and (row.is_seen or self._model.config.service.on_deletion == "end"):
            raise Outdated(
                "a deletion replaced the models while they answered",
                next_step="ask again: the models are clean now",
            )

    def _submit(self, rows: list[Pending]) -> None:
        with self._wake:
            if not (self._is_open and self._thread.is_alive()):
                raise _stopped()
            self._groups.append(rows)
            self._wake.notify()

    def _run(self) -> None:
        """Answer until the engine is closed."""
        while True:
            batch = self._serving.batch
            with self._wake:
                if not (self._groups or self._cancelled or batch.running or batch.waiting):
                    self._wake.wait(WATCH_S if self._is_open else 0)
                groups, self._groups = self._groups, []
                cancelled, self._cancelled = self._cancelled, []
                is_open = self._is_open
            try:
                if not is_open:
                    raise _stopped()
                self._turn(groups, cancelled)
            except Exception as error:
                self._end_all([row for group in groups for row in group], error)
            if not is_open:
                return

    def _end_all(self, new: Iterable[Pending], error: Exception) -> None:
        """Report an error to all questions; after an internal fault, load the models again."""
        batch = self._serving.batch
        rows: list[Any] = [*batch.running, *batch.waiting, *new]
        fault = error if isinstance(error, SisaError) else internal_fault(error)
        if rows:  # not ten times a second while a model stays damaged
            _log.error(fault.what)
        for row in rows:
            row.report(fault)
        if fault is not error:
            self._serving = self._model.serving(**self._limits)
            return
        for row in rows:
            batch.cancel(row)

    def _turn(self, groups: list[list[Pending]], cancelled: list[Pending]) -> None:
        """Adopt what was committed, admit requests, and append a token to each answer."""
        batch, gone = self._serving.batch, set(cancelled)
        groups = [each for each in groups if gone.isdisjoint(each)]
        for row in cancelled:
            batch.cancel(row)
        if groups or self._committed.is_set():
            self._adopt()
        for group in groups:
            self._admit(group)
        for event in batch.step():
            key: Any = event.key
            key.report(self._for_clients(event))

    def _adopt(self) -> None:
        """Replace models that are no longer served, and report which answers this cuts."""
        self._committed.clear()
        running = set(self._serving.batch.running)
        try:
            cut: list[Any] = [*self._model.adopt(self._serving)]
        except BaseException:
            self._committed.set()
            raise
        for row in cut:
            row.report("cut" if row in running else "stale")

    def _watch(self) -> None:
        """Wait for commits until the engine is closed."""
        while self._is_open:
            with contextlib.suppress(SisaError), self._model.watch() as wait:
                self._committed.set()  # perhaps, before the watch began
                while self._is_open:
                    if wait(WATCH_S):
                        self._committed.set()
            self._committed.set()
            if self._is_open:  # the ledger can't be read now, or was moved
                time.sleep(WATCH_S)

    def _admit(self, group: list[Pending]) -> None:
        """Admit all questions of a request to the batch, or none of them."""
        if any(row.routed.seq != self._serving.served.seq for row in group):
            for row in group:
                row.report("stale")
            return
        batch = self._serving.batch
        try:
            for row in group:
                batch.admit(row.routed.ids, row.routed.route, self._sampling(row), row)
        except SisaError as error:
            for row in group:
                batch.cancel(row)
                row.report(error)
            return
        for row in group:
            row.report(Started(row.routed.route.shards, len(row.routed.ids)))

    def _sampling(self, row: Pending) -> Sampling:
        asked = row.question
        room = self._serving.batch.answerer.max_length - len(row.routed.ids)
        most = asked.max_new_tokens or max(1, min(DEFAULT_TOKENS, room))
        top = asked.logprobs or 0
        return Sampling(int(most), asked.temperature, asked.top_p, asked.seed, asked.stop, top)

    def _for_clients(self, event: continuous.AnswerEvent) -> AnswerEvent:
        """Return an event of the batch without token ids."""
        if isinstance(event, continuous.Ended):
            return Ended(event.reason, event.num_tokens)
        row: Any = event.key
        if row.question.logprobs is None:
            return Piece(event.text)
        decode = self._serving.batch.answerer.tokenizer.decode
        tokens = [
            AnswerToken(
                decode([each.id]), each.logprob, tuple((decode([id_]), of) for id_, of in each.top)
            )
            for each in event.tokens
        ]
        return Piece(event.text, tuple(tokens))


def _stopped() -> EnvironmentFault:
    return EnvironmentFault("the service is being stopped", next_step="ask again")


class Replica:
    """Run an engine and the application that asks it, as an actor of Ray Serve."""

    def __init__(self, directory: str, owner: str) -> None:
        """Load the model in a directory, which this node must see; `owner` is that of `Tokens`."""
        path = Path(directory)
        model = open_model(path)  # the engine's own: its threads share it with nobody
        settings = model.config.service
        self._engine = Engine(model, settings)
        tokens = Tokens(path, settings.rate_per_minute, owner=owner)
        self._service = Service(open_model(path), self._engine, tokens, settings, _measured_everywhere)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application, for Ray Serve."""
        self._app = build_app(self._service)
        return self._app

    def measured(self) -> list[Metric]:
        """Return the metrics of this replica's answers."""
        meters: ServiceMeters = self._app.state.meters
        return meters.answers.of(serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Raise if the engine has stopped, so that Ray Serve replaces this replica."""
        self._engine.check()


def _measured_everywhere() -> list[Metric]:
    """Return the metrics of all replicas; those that end meanwhile are left out."""
    here = serve.get_replica_context()
    handle = serve.get_deployment_handle(here.deployment, here.app_name)
    found = handle.broadcast("measured").results(timeout_s=_METERS_WAIT_S, return_exceptions=True)
    return [each for families in found if isinstance(families, list) for each in families]


def application(args: Mapping[str, str]) -> Any:
    """Return the application for a config file of Ray Serve, such as the RayService manifest's.

    `args` names the `model`'s directory. Raise ConfigConflict without an active token.
    """
    directory = Path(args["model"])
    Tokens(directory).check_listening("0.0.0.0")  # noqa: S104 - where such a file has it listen
    return replica(directory, open_model(directory).config)


def replica(directory: Path, config: RunConfig, num_replicas: int = 1, owner: str = "") -> Any:
    """Return the application that Ray Serve runs for the model in a directory."""
    gpus = config.cluster.num_gpus or 1 if config.device == "cuda" else 0
    deployment: Any = serve.deployment(serve.ingress()(Replica))
    return deployment.options(
        name="answers",
        num_replicas=num_replicas,
        max_ongoing_requests=MOST_AT_ONCE,
        health_check_period_s=CHECK_S,
        graceful_shutdown_wait_loop_s=CHECK_S / 10,
        logging_config=QUIET,
        ray_actor_options={
            "num_cpus": config.sisa.threads_per_shard,
            "num_gpus": gpus,
            "runtime_env": {"env_vars": NORMAL_PRIORITY},
        },
    ).bind(str(directory.resolve()), owner)
