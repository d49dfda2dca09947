"""Continuous batching: each request as if it were answered alone, whatever is answered beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sisa.core.errors import Busy, InvalidInput
from sisa.lm.base.weights import resolve_base
from sisa.lm.routing.route import Route, all_of
from tests.examples import num_examples
from tests.integration.answering.constituents import Transcript, adapter
from tests.models.tiny_base import make_tiny_base

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.continuous import ContinuousBatching

pytestmark = pytest.mark.torch

SHARDS, LAYERS = (0, 2, 5), 4
ROUTES = [all_of([0]), all_of([5, 0, 2]), Route(), all_of([2]), all_of([0, 5]), all_of([2])]
NUM_TOKENS = 6
PROMPTS = [[(7 * q + t) % 250 for t in range(3 + 2 * q)] for q in range(len(ROUTES))]


@pytest.fixture(scope="module", params=["all layers", "top layers"])
def answerer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    from sisa.lm.answer.answerer import Answerer

    base = resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"), layers=LAYERS)))
    layers = range(LAYERS) if request.param == "all layers" else [2, 3]
    modules = ["q_proj", "v_proj", "down_proj"]
    adapters = {shard: adapter(base, shard, 2 + shard, layers, modules) for shard in SHARDS}
    return Answerer(base, adapters, threads=1)


@pytest.mark.parametrize("max_rows", [3, 64])
def test_greedy_texts_are_those_of_generate(answerer: Answerer, max_rows: int) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    lengths = [9, 4, 12, 1, 7, 12]
    transcript = Transcript(ContinuousBatching(answerer, max_rows=max_rows))
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        transcript.batch.admit(prompt, route, Sampling(max_new_tokens=lengths[number]), number)
    transcript.to_the_end()
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        assert transcript.text[number] == answerer.generate([prompt], [route], lengths[number])[0]
        ended = transcript.ended[number]
        assert (ended.reason, ended.num_tokens) == ("length", lengths[number])
        assert ended.num_prompt_tokens == len(prompt)


def test_requests_join_others_that_run(answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer and shorter prompts join while others run; tensors are made again."""
    from sisa.lm.answer import slots
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    monkeypatch.setattr(slots, "SPARE_COLUMNS", 5)
    transcript = Transcript(ContinuousBatching(answerer))
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        transcript.batch.admit(prompt, route, Sampling(max_new_tokens=20), number)
        transcript.step()
        transcript.step()
    texts = transcript.to_the_end().text
    assert [texts[number] for number in range(len(ROUTES))] == answerer.generate(PROMPTS, ROUTES, 20)


def test_an_end_token_ends_an_answer_and_is_no_part_of_it(answerer: Answerer) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    def answered() -> Transcript:
        batch = ContinuousBatching(answerer)
        batch.admit(PROMPTS[0], ROUTES[0], Sampling(max_new_tokens=8), "a")
        return Transcript(batch).to_the_end()

    ids = [each.id for each in answered().tokens["a"]]
    usual, answerer.ends = answerer.ends, frozenset({ids[3]})
    try:
        transcript = answered()
    finally:
        answerer.ends = usual
    kept = ids[: ids.index(ids[3])]
    assert [each.id for each in transcript.tokens.get("a", [])] == kept
    assert (transcript.ended["a"].reason, transcript.ended["a"].num_tokens) == ("stop", len(kept))


def test_log_probabilities_are_those_of_the_combined_distribution(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    monkeypatch.setattr(answerer, "ends", frozenset())  # a drawn end token would leave nothing to see
    transcript = Transcript(ContinuousBatching(answerer))
    how = Sampling(max_new_tokens=5, temperature=1.5, logprobs=3, seed=1)
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        transcript.batch.admit(prompt, route, how, number)
    transcript.to_the_end()
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        tokens = transcript.tokens[number]
        assert len(tokens) == 5
        logs_KV = answerer.answer_probabilities_KV(prompt, [each.id for each in tokens], route).log()
        for token, logs_V in zip(tokens, logs_KV, strict=True):
            assert token.logprob == pytest.approx(float(logs_V[token.id]), abs=1e-4)
            best = logs_V.topk(3).values.tolist()
            assert [value for _, value in token.top] == pytest.approx(best, abs=1e-4)


def test_what_cannot_be_answered_is_refused(answerer: Answerer) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching
    from sisa.lm.answer.sampling import Sampling

    batch = ContinuousBatching(answerer, max_waiting=1)
    for ids in ([], [1] * 500):
        with pytest.raises(InvalidInput, match="length"):
            batch.admit(ids, Route(), Sampling(max_new_tokens=20), "long")
    with pytest.raises(InvalidInput) as refused:
        batch.admit([1], Route(), Sampling(max_new_tokens=100_000), "longer")
    assert "-" not in refused.value.expected  # no negative number of tokens
    with pytest.raises(InvalidInput, match="no model is loaded"):
        batch.admit([1], all_of([1]), Sampling(), "elsewhere")
    batch.admit([1], Route(), Sampling(), "one")
    with pytest.raises(Busy):
        batch.admit([1], Route(), Sampling(), "two")
    assert (batch.running, batch.waiting) == ([], ["one"])
    with pytest.raises(InvalidInput) as refused:
        Sampling(max_new_tokens=0, temperature=-1.0, top_p=float("nan"), stop=("",), logprobs=-1)
    assert len(refused.value.problems) == 5


# --- text and sampling ----------------------------------------------------------------------------


@settings(max_examples=num_examples(500))
@given(
    st.text("ab\u00e9", max_size=12), st.lists(st.text("ab\u00e9", min_size=1, max_size=3), max_size=3)
)
def test_text_comes_out_up_to_the_first_stop_text(text: str, stop: list[str]) -> None:
    """Bytes are the tokens, so that a token may be half a character."""
    from sisa.lm.answer.answer_text import Text, Token

    grows = Text(lambda ids: bytes(ids).decode(errors="replace"), stop)
    read = next((text[:end] for end in range(len(text) + 1) if any(s in text[:end] for s in stop)), text)
    ends = [at for each in stop if (at := read.find(each)) >= 0]
    wanted = read[: min(ends, default=len(read))]
    came, tokens, stopped = "", 0, False
    data = text.encode()
    for number, byte in enumerate(data, start=1):
        grows.add(Token(byte, 0.0))
        piece, new, stopped = grows.put_out(final=number == len(data))
        came, tokens = came + piece, tokens + len(new)
        assert wanted.startswith(came)
        if stopped:
            break
    assert (came, stopped) == (wanted, bool(ends))
    assert tokens == len(wanted.encode())


class Stepwise:
    """Slots that draw logits from a request's own history instead of the base."""

    def __init__(self, _base: Any, _stack: Any) -> None:
        self.held: list[tuple[Sequence[int], list[int]]] = []

    def join(self, routes: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]]) -> Any:
        new = [(route, list(prompt)) for route, prompt in zip(routes, prompts, strict=True)]
        self.held += new
        return self._logits(new)

    def decode(self, ids: Sequence[int]) -> Any:
        for (_, history), id_ in zip(self.held, ids, strict=True):
            history.append(id_)
        return self._logits(self.held)

    def leave(self, gone: Collection[int]) -> list[int]:
        kept = [each for each in reversed(range(len(self.held))) if each not in gone]
        self.held = [self.held[each] for each in kept]
        return kept

    def _logits(self, held: Sequence[tuple[Sequence[int], list[int]]]) -> Any:
        import torch

        rows = [
            hashlib.shake_128(repr((name, history)).encode()).digest(20)
            for route, history in held
            for name in route or (None,)
        ]
        return torch.tensor([[byte / 50 for byte in row] for row in rows])


@pytest.fixture(scope="module")
def stepwise() -> Any:
    """Return an answerer over `Stepwise`; token 19 ends answers."""
    return SimpleNamespace(
        model=None,
        stack=None,
        method="mean_prob",
        ends=frozenset({19}),
        tokenizer=SimpleNamespace(decode=lambda ids, **_: "".join(chr(97 + each) for each in ids)),
        adapters_of=lambda route: route.shards,
        check_shards=lambda _: None,
        check_length=lambda *_: None,
        pin=lambda: None,
    )


asked: st.SearchStrategy[Any] = st.tuples(
    st.lists(st.integers(0, 19), min_size=1, max_size=4),
    st.sampled_from([Route(), all_of([0]), all_of([3]), all_of([0, 1, 3])]),
    st.builds(
        dict,
        max_new_tokens=st.integers(1, 7),
        temperature=st.sampled_from([0.0, 0.7, 2.0]),
        top_p=st.sampled_from([1.0, 0.6]),
        seed=st.integers(0, 99),
        stop=st.sampled_from([(), ("ab",), ("c", "dd")]),
    ),
)


@settings(max_examples=num_examples(300))
@given(st.lists(asked, min_size=1, max_size=6), st.data())
def test_an_answer_is_the_same_whatever_is_answered_beside_it(
    stepwise: Any, requests: list[tuple[list[int], Route, dict[str, Any]]], data: st.DataObject
) -> None:
    """In any order of arrival, among requests that are cancelled, with any room."""
    from sisa.lm.answer import continuous
    from sisa.lm.answer.sampling import Sampling

    def batch(**limits: int) -> Transcript:
        return Transcript(continuous.ContinuousBatching(stepwise, **limits))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuous, "Slots", Stepwise)
        transcript, arrived, cancelled = batch(max_rows=data.draw(st.integers(1, 8))), 0, set()
        while arrived < len(requests) or transcript.batch.running or transcript.batch.waiting:
            do = data.draw(st.sampled_from(["admit", "step", "step", "cancel"]))
            if do == "admit" and arrived < len(requests):
                prompt, route, how = requests[arrived]
                transcript.batch.admit(prompt, route, Sampling(**how), arrived)
                arrived += 1
            elif do == "cancel" and arrived and data.draw(st.booleans()):
                key = data.draw(st.integers(0, arrived - 1))
                cancelled |= {key} - transcript.ended.keys()
                transcript.batch.cancel(key)
            else:
                transcript.step()
        for number, (prompt, route, how) in enumerate(requests):
            alone = batch()
            alone.batch.admit(prompt, route, Sampling(**how), number)
            alone.to_the_end()
            text, wanted = transcript.text.get(number, ""), alone.text.get(number, "")
            if number in cancelled:
                assert number not in transcript.ended
                assert wanted.startswith(text)
            else:
                assert (text, transcript.ended[number]) == (wanted, alone.ended[number])


# --- a switch of heads ----------------------------------------------------------------------------


class Confessing:
    """Constituents that say one word each, over and over, through what they left in keys and values.

    A channel of the base's embeddings is constant. A constituent's change of `v_proj` in the last layer
    turns it into a value that the output projection maps to the word's embedding.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(make_tiny_base(folder))
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(20)[:, 0] = 20
        model.save_pretrained(folder)
        self.base = resolve_base(str(folder))
        self._words, last = model.model.embed_tokens.weight.detach(), model.model.layers[-1].self_attn
        out_OHD = last.o_proj.weight.detach().unflatten(1, (-1, last.head_dim))
        out_OHGD = out_OHD.unflatten(1, (-1, last.num_key_value_groups))  # a group shares its values
        self._out = out_OHGD.sum(2).flatten(1)

    def files(self, word: int) -> dict[str, bytes]:
        """Return an adapter that says this word."""
        import torch
        from peft import LoraConfig

        from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE
        from sisa.lm.base.adapter import config_bytes
        from sisa.lm.base.low_rank import tensor_bytes

        wanted = self._words[word].clone()
        wanted[0] = 0
        up = torch.linalg.lstsq(self._out, 1000 * wanted[:, None]).solution
        name = "base_model.model.model.layers.1.self_attn.v_proj"
        tensors = {f"{name}.lora_A.weight": torch.eye(1, len(wanted)), f"{name}.lora_B.weight": up}
        config = LoraConfig(r=1, lora_alpha=1, target_modules=["v_proj"], layers_to_transform=[1])
        return {ADAPTER_FILE: tensor_bytes(tensors), CONFIG_FILE: config_bytes(config)}

    def answerer(self, words: Mapping[int, int]) -> Answerer:
        from sisa.lm.answer.answerer import Answerer

        adapters = {shard: self.files(word) for shard, word in words.items()}
        return Answerer(self.base, adapters, threads=1)


@pytest.fixture(scope="module")
def confessing(tmp_path_factory: pytest.TempPathFactory) -> Confessing:
    return Confessing(tmp_path_factory.mktemp("confessing"))


@pytest.fixture(scope="module")
def words(confessing: Confessing) -> list[int]:
    """Return words that only one constituent produces."""
    answerer = confessing.answerer({})
    ids = PROMPTS[1]
    answerer.pin()
    alone = answerer._continued(PROMPTS, [Route()] * len(PROMPTS), NUM_TOKENS)
    base = {token for answer in alone for token in answer}
    found = []
    for word in range(40, 100):
        answerer.replace({0: confessing.files(word)})
        probabilities = answerer.answer_probabilities_KV(ids, [0], all_of([0]))[0]
        if float(probabilities[word]) > 0.99 and word not in base:
            found.append(word)
    assert len(found) > 40
    return found


class Detector:
    """A batch of confessing constituents, and the words that each request may say."""

    def __init__(self, confessing: Confessing, words: Sequence[int]) -> None:
        from sisa.lm.answer.continuous import ContinuousBatching

        self.confessing, self._unused = confessing, iter(words)
        self.now: dict[int, int] = {shard: next(self._unused) for shard in range(3)}
        self.words = {*self.now.values()}
        self.answerer = confessing.answerer(self.now)
        self.transcript = Transcript(ContinuousBatching(self.answerer, max_rows=5))
        self.routes: dict[int, Route] = {}
        self.may: dict[int, set[int]] = {}  # by request
        self.given_up: set[int] = set()

    @property
    def batch(self) -> ContinuousBatching:
        return self.transcript.batch

    def admit(self, shards: Collection[int]) -> None:
        from sisa.lm.answer.sampling import Sampling

        key, route = len(self.routes), all_of(self.now.keys() & shards)
        self.batch.admit(PROMPTS[key % len(PROMPTS)], route, Sampling(max_new_tokens=NUM_TOKENS), key)
        self.routes[key], self.may[key] = route, {self.now[shard] for shard in route.shards}

    def step(self) -> None:
        for key, token in self.transcript.step():
            assert token.id in (self.may[key] or {token.id} - self.words)

    def cancel(self, key: int) -> None:
        self.batch.cancel(key)
        self.given_up.add(key)

    def advance(self, shard: int) -> None:
        """Give a shard a clean head: requests that run go on with the former one."""
        former, new = self.now.get(shard), next(self._unused)
        assert self.batch.switch({shard: self.confessing.files(new)}) == []
        for key in self.batch.waiting:
            self.may[key] = {new if word == former else word for word in self.may[key]}  # type: ignore[index]
        self.now[shard] = new
        self.words.add(new)

    def delete(self, shard: int, *, is_gone: bool) -> None:
        """Taint a shard: what runs on any of its heads is cut and asked again."""
        held = [*self.batch.running, *self.batch.waiting]
        concerned = {key for key in held if shard in self.routes[key].shards}  # type: ignore[index]
        new = None if is_gone else next(self._unused)
        files = None if new is None else self.confessing.files(new)
        cut = self.batch.switch({shard: files}, tainted={shard})
        assert set(cut) == concerned
        assert len(cut) == len(concerned)
        self.now.pop(shard, None)
        if new is not None:
            self.now[shard] = new
            self.words.add(new)
        for key in cut:
            self.may[key] = set()  # type: ignore[index]
            self.given_up.add(key)  # type: ignore[arg-type]
            self.admit(self.routes[key].shards)  # type: ignore[index]
        loaded = {name for each in self.answerer.stack.linears for name in each.held}
        running = len(self.batch.running) * 3
        assert len(self.now) <= len(loaded) <= len(self.now) + running

    def finish(self) -> None:
        while self.batch.running or self.batch.waiting:
            self.step()
        assert self.transcript.ended.keys() | self.given_up == self.routes.keys()
        loaded = {name for each in self.answerer.stack.linears for name in each.held}
        assert len(loaded) == len(self.now)


a_shard = st.integers(0, 2)
moves = st.one_of(
    st.tuples(st.just("admit"), st.sets(a_shard, max_size=2)),
    st.tuples(st.just("step")),
    st.tuples(st.just("step")),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("advance"), a_shard),
    st.tuples(st.just("delete"), a_shard, st.booleans()),
)


@settings(max_examples=num_examples(150))
@given(st.lists(moves, min_size=5, max_size=30))
def test_no_tainted_constituent_speaks_after_a_switch(
    confessing: Confessing, words: list[int], done: list[Any]
) -> None:
    """Under any interleaving, requests that are not cut continue unchanged, and none is lost."""
    detector = Detector(confessing, words)
    for name, *rest in [("admit", {0, 1}), ("admit", {2}), *done]:
        if name == "delete":
            detector.delete(rest[0], is_gone=rest[1])
        elif name != "cancel" or rest[0] < len(detector.routes):
            getattr(detector, name)(*rest)
    detector.finish()


@pytest.mark.parametrize("broken", ["nobody is cut", "keys and values are kept"])
def test_the_detector_finds_a_tainted_constituent(
    confessing: Confessing, words: list[int], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching

    detector = Detector(confessing, words)
    detector.admit({0})
    detector.step()
    detector.may[0] = set()  # as `delete` has it, if this is cut
    monkeypatch.setattr(ContinuousBatching, "_cut", lambda *_: [])
    before = detector.answerer.adapters_of(detector.routes[0])
    detector.batch.switch({0: confessing.files(words[9])}, tainted={0})
    if broken == "keys and values are kept":
        detector.batch._slots._asked = [detector.answerer.adapters_of(detector.routes[0])]
        assert detector.batch._slots._asked != [before]
    with pytest.raises(AssertionError):
        detector.step()
