"""The engine over a scripted model: what a commit does to answers that wait, run, or were seen.

Heads confess: a token of an answer is the commit at which its model was loaded. A commit may taint them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.torch

from cluster.serve.domain import Ended, Piece, Question, Service, Started  # noqa: E402
from cluster.serve.replica import Engine, application  # noqa: E402
from cluster.serve.tokens import Tokens  # noqa: E402
from sisa.config.config import ServiceBlock  # noqa: E402
from sisa.core.errors import (  # noqa: E402
    Busy,
    ConfigConflict,
    EnvironmentFault,
    InvalidInput,
    Outdated,
    SisaError,
)
from sisa.flows.answers.ask import Routed  # noqa: E402
from sisa.lm.answer import continuous  # noqa: E402
from sisa.lm.answer.answer_text import Token  # noqa: E402
from sisa.lm.routing.route import Route  # noqa: E402
from sisa.store.ledger.backend import Watch  # noqa: E402

WINDOW = 1000
Answered = list[tuple[int, Any]]


class ScriptedBatch:
    """A batch that says at each step which commit loaded its models, once the gate is open."""

    def __init__(self, most: int) -> None:
        self.max_waiting = most
        self.loaded = 0
        self.running: list[Any] = []
        self.waiting: list[Any] = []
        self.left: dict[Any, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.broken: Exception | None = None
        self.answerer = SimpleNamespace(
            max_length=WINDOW, tokenizer=SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
        )

    def admit(self, ids: Sequence[int], _route: Route, sampling: Any, key: Any) -> None:
        """Let a request wait."""
        if len(ids) + sampling.max_new_tokens > WINDOW:
            raise InvalidInput("too long")
        if len(self.waiting) >= self.max_waiting:
            raise Busy("too many wait")
        self.waiting.append(key)
        self.left[key] = sampling.max_new_tokens

    def cancel(self, key: Any) -> None:
        """Forget a request."""
        self.running = [each for each in self.running if each is not key]
        self.waiting = [each for each in self.waiting if each is not key]

    def step(self) -> list[Any]:
        """Append a word to each answer."""
        if self.broken is not None:
            broken, self.broken = self.broken, None
            raise broken
        if not self.gate.wait(0.01):
            return []
        self.running, self.waiting = [*self.running, *self.waiting], []
        found: list[Any] = []
        for key in list(self.running):
            self.left[key] -= 1
            token = Token(self.loaded, -0.5, ((7, -1.0),))
            found.append(continuous.Piece(key, f"{self.loaded} ", (token,)))
            if not self.left[key]:
                found.append(continuous.Ended(key, "length", 3, 1))
                self.cancel(key)
        return found


class ScriptedModel:
    """A model whose commits are numbered, and may taint what runs."""

    partition = "p"
    shards: Collection[int] = (1,)

    def __init__(self) -> None:
        self.seq, self.tainted, self.asked, self.watches = 0, False, 0, 0
        self.config = SimpleNamespace(service=ServiceBlock(max_concurrent=2))

    def set(self, on_deletion: Any) -> None:
        """Change the run file."""
        self.config.service = ServiceBlock(max_concurrent=2, on_deletion=on_deletion)

    def commit(self, *, taints: bool = True) -> None:
        self.tainted |= taints
        self.seq += 1

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Wait for a commit; the first watch is lost at once, as a connection may be."""
        self.watches += 1
        if self.watches == 1:
            raise EnvironmentFault("the connection is lost")
        seen = self.seq

        def wait(timeout_s: float) -> bool:
            nonlocal seen
            deadline = time.monotonic() + timeout_s
            while (before := seen) == (seen := self.seq) and time.monotonic() < deadline:
                time.sleep(0.001)
            return seen != before

        yield wait

    def serving(self, max_waiting: int, **_limits: int) -> Any:
        self.made = SimpleNamespace(
            batch=ScriptedBatch(max_waiting), served=SimpleNamespace(seq=self.seq)
        )
        return self.made

    def adopt(self, serving: Any) -> list[Any]:
        """Load what was committed; return what that cuts."""
        if serving.served.seq == self.seq:
            return []
        serving.served, batch = SimpleNamespace(seq=self.seq), serving.batch
        batch.loaded = self.seq
        cut = [*batch.running, *batch.waiting] if self.tainted else []
        self.tainted = False
        for each in cut:
            batch.cancel(each)
        return cut

    def within(self, shards: Collection[int], partition: str) -> ScriptedModel:
        """Return the model as who may read some shards alone sees it."""
        assert partition == self.partition
        self.shards = shards
        return self

    def routed(self, prompts: Sequence[Any], **_named: Any) -> list[Routed]:
        """Route every prompt to shard 1; a word is a token."""
        self.asked += len(prompts)
        if not all(prompts):
            raise InvalidInput("nothing is asked")
        route = Route((1,), (1.0,)) if 1 in self.shards else Route()
        return [Routed([5] * len(str(each).split()), route, self.seq) for each in prompts]


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
def engine(model: ScriptedModel) -> Iterator[Engine]:
    """Return an engine that answers 2 at a time."""
    with opened(model, "retry") as made:
        yield made


@contextlib.contextmanager
def opened(model: ScriptedModel, on_deletion: Any) -> Iterator[Engine]:
    model.set(on_deletion)
    scripted: Any = model
    with contextlib.closing(Engine(scripted, scripted.config.service)) as made:
        yield made


async def hear(engine: Engine, *questions: Question) -> Answered:
    return [each async for each in engine.answer(questions)]


def words(found: Answered, number: int = 0) -> list[str]:
    """Return the words of an answer since it last began."""
    own = [event for at, event in found if at == number]
    last = max(at for at, event in enumerate(own) if isinstance(event, Started))
    return [event.text for event in own[last:] if isinstance(event, Piece)]


def test_questions_are_answered_side_by_side(engine: Engine, model: ScriptedModel) -> None:
    prompt = "a b c"
    found = asyncio.run(
        hear(engine, *(Question(prompt, max_new_tokens=n, logprobs=n or None) for n in (1, 2)))
    )
    assert next(event for at, event in found if at == 1) == Started((1,), 3)
    assert (words(found, 0), words(found, 1)) == (["0 "], ["0 ", "0 "])
    assert found[-1] == (1, Ended("length", 1))
    pieces = [event for _, event in found if isinstance(event, Piece)]
    assert [(each.text, each.top) for each in pieces[0].tokens] == [("<0>", (("<7>", -1.0),))]
    assert model.asked == 1 + 1, "the same prompt is looked up once, and one at the start"


def test_probabilities_are_given_only_where_asked_for(engine: Engine) -> None:
    found = asyncio.run(hear(engine, Question("a", max_new_tokens=1)))
    assert [event.tokens for _, event in found if isinstance(event, Piece)] == [()]


def test_the_base_alone_and_the_shards_of_a_caller(engine: Engine) -> None:
    alone, others = (
        Question("a", max_new_tokens=1, base_only=True),
        Question("a", shards=frozenset({0}), partition="p"),
    )
    for each in (alone, others):
        assert asyncio.run(hear(engine, each))[0] == (0, Started((), 1))


def test_an_answer_has_as_many_tokens_as_fit(engine: Engine) -> None:
    long = " ".join("a" * (WINDOW - 3))
    assert len(words(asyncio.run(hear(engine, Question(long))))) == 3
    assert len(words(asyncio.run(hear(engine, Question("a"))))) == 256
    with pytest.raises(InvalidInput):
        asyncio.run(hear(engine, Question("a", max_new_tokens=1), Question(long, max_new_tokens=4)))
    assert asyncio.run(hear(engine, Question("b", max_new_tokens=1)))[-1] == (0, Ended("length", 1))
    with pytest.raises(InvalidInput):
        asyncio.run(hear(engine, Question("")))


async def cut_while_running(engine: Engine, model: ScriptedModel, question: Question) -> Answered:
    """Return what is heard of an answer under which everything is tainted after its first word."""
    found: Answered = []
    async for each in engine.answer([question]):
        found.append(each)
        if isinstance(each[1], Piece) and model.seq == 0:
            model.commit()
    return found


LONG = 40  # words; the scripted batch says them faster than the ledger is looked at


def slowly(model: ScriptedModel) -> None:
    """Let each step of the batch take a while, so that commits fall between them."""
    batch, step = model.made.batch, model.made.batch.step

    def slow() -> Any:
        threading.Event().wait(0.02)
        return step()

    batch.step = slow


def test_nobody_saw_it_so_it_begins_again_on_the_clean_model(
    engine: Engine, model: ScriptedModel
) -> None:
    slowly(model)
    found = asyncio.run(cut_while_running(engine, model, Question("a", max_new_tokens=LONG)))
    assert words(found) == ["1 "] * LONG
    assert [event for _, event in found if isinstance(event, Started)] == [Started((1,), 1)] * 2


def test_what_was_seen_ends_in_an_error(engine: Engine, model: ScriptedModel) -> None:
    slowly(model)
    seen = Question("a", max_new_tokens=LONG, streamed=True)
    with pytest.raises(Outdated, match="deletion"):
        asyncio.run(cut_while_running(engine, model, seen))
    assert model.made.batch.running == []


@pytest.mark.parametrize("before", ["end", "retry"])
def test_a_run_file_may_end_all_that_is_cut(model: ScriptedModel, before: str) -> None:
    """As it is when the deletion commits: a service follows a run file that is changed meanwhile."""
    with opened(model, before) as engine:
        slowly(model)
        model.set("end")
        with pytest.raises(Outdated):
            asyncio.run(cut_while_running(engine, model, Question("a", max_new_tokens=LONG)))


def test_a_commit_that_taints_nothing_cuts_nothing(engine: Engine, model: ScriptedModel) -> None:
    async def asked() -> Answered:
        found: Answered = []
        async for each in engine.answer([Question("a", max_new_tokens=LONG, streamed=True)]):
            found.append(each)
            if len(found) == 2:
                model.commit(taints=False)
        return found

    slowly(model)
    found = asyncio.run(asked())
    assert {*words(found)} == {"0 ", "1 "}
    assert len(words(found)) == LONG


@pytest.mark.parametrize("on_deletion", ["retry", "end"])
def test_what_begins_after_a_commit_meets_no_tainted_model(
    model: ScriptedModel, on_deletion: str
) -> None:
    """However the commit falls: before a question, or between its routing and its turn."""
    with opened(model, on_deletion) as engine:
        model.commit()
        assert {*words(asyncio.run(hear(engine, Question("a", max_new_tokens=3))))} == {"1 "}
        route = model.routed

        def then_commit(*given: Any, **named: Any) -> list[Routed]:
            found = route(*given, **named)
            if model.seq < 4:  # three times in a row
                model.commit()
            return found

        model.routed = then_commit  # type: ignore[method-assign]
        seen = Question("a", max_new_tokens=3, streamed=True)
        assert {*words(asyncio.run(hear(engine, seen)))} == {"4 "}


def test_many_clients_and_commits_drop_nothing_and_mix_nothing(
    engine: Engine, model: ScriptedModel
) -> None:
    async def client(number: int) -> None:
        for _ in range(10):
            began_at = model.seq
            found = await hear(engine, Question(f"q {number}", max_new_tokens=5))
            said = [int(each) for each in words(found)]
            assert len(said) == 5
            assert min(said) >= began_at, "a token of a model that was tainted before the question"

    async def deletions() -> None:
        for _ in range(30):
            await asyncio.sleep(0.01)
            model.commit()

    async def all_of_it() -> None:
        await asyncio.gather(deletions(), *(client(number) for number in range(16)))

    asyncio.run(all_of_it())


def test_who_gives_up_frees_the_batch(engine: Engine, model: ScriptedModel) -> None:
    batch = model.made.batch

    async def give_up() -> None:
        events = engine.answer([Question("a", max_new_tokens=100_000 // 200, streamed=True)] * 2)
        assert isinstance((await anext(events))[1], Started)
        await events.aclose()
        for _ in range(200):
            if not batch.running and not batch.waiting:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the batch still answers")

    slowly(model)
    asyncio.run(give_up())


def test_who_gives_up_before_the_turn_is_not_answered(engine: Engine, model: ScriptedModel) -> None:
    batch, entered, resumed = model.made.batch, threading.Event(), threading.Event()
    step = batch.step

    def held() -> Any:
        entered.set()
        resumed.wait(30)
        return step()

    batch.step = held

    async def give_up_meanwhile() -> None:
        first = asyncio.create_task(hear(engine, Question("a", max_new_tokens=3)))
        await asyncio.to_thread(entered.wait)
        second = asyncio.create_task(hear(engine, Question("b")))
        while not engine._groups:
            await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait([second])
        resumed.set()
        assert words(await first) == ["0 "] * 3

    asyncio.run(give_up_meanwhile())
    assert len(batch.left) == 1, "the second question joined the batch"


def test_too_many_are_told_to_come_again(engine: Engine, model: ScriptedModel) -> None:
    batch = model.made.batch
    batch.gate.clear()
    batch.max_waiting = 1
    with pytest.raises(Busy):
        asyncio.run(hear(engine, Question("a"), Question("b")))
    batch.gate.set()
    assert words(asyncio.run(hear(engine, Question("a", max_new_tokens=1)))) == ["0 "]


@pytest.mark.parametrize("error", [KeyError("Mara Quill"), EnvironmentFault("the disk is gone")])
def test_a_fault_is_told_and_survived(engine: Engine, model: ScriptedModel, error: Exception) -> None:
    model.made.batch.broken = error
    with pytest.raises(SisaError) as caught:
        asyncio.run(hear(engine, Question("a")))
    assert "Mara" not in str(caught.value)
    assert words(asyncio.run(hear(engine, Question("a", max_new_tokens=1)))) == ["0 "]
    engine.check()


def test_a_stopped_engine_says_so(model: ScriptedModel) -> None:
    async def ask_and_stop(engine: Engine) -> Answered:
        found: Answered = []
        async for each in engine.answer([Question("a", max_new_tokens=1)]):
            found.append(each)
            await asyncio.to_thread(engine.close)
        return found

    with opened(model, "retry") as engine:
        model.made.batch.gate.clear()
        with pytest.raises(EnvironmentFault, match="stopped"):
            asyncio.run(ask_and_stop(engine))
        with pytest.raises(EnvironmentFault):
            engine.check()


def test_a_config_file_starts_no_service_without_tokens(service: Service) -> None:
    directory = service.model.directory
    asked = {"model": str(directory)}
    with pytest.raises(ConfigConflict, match="no token is active"):
        application(asked)
    Tokens(directory).add("anna", "officer")
    assert application(asked)._bound_deployment.name == "answers"
    (directory / "tokens.json").unlink()
    assert not Tokens(directory).demanded()
    assert Tokens(directory, owner="").demanded()  # a replica that starts later opens no door
    assert Tokens(directory, owner="").caller("") is None
