"""Stacked adapters against peft's own forward, one adapter at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sisa.core.errors import IntegrityError
from sisa.lm.base.weights import load_base, resolve_base
from tests.integration.answering.constituents import Files, adapter
from tests.models.tiny_base import make_tiny_base

if TYPE_CHECKING:
    from sisa.lm.answer.stacked_adapters import StackedAdapters

pytestmark = pytest.mark.torch

IDS = [5, 17, 80, 44, 9, 120, 33]
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"), layers=LAYERS)))


def alone(base: Any, files: Files | None, ids: Sequence[int]) -> Any:
    """Return the logits [T, V] of one constituent, by peft."""
    import torch

    from sisa.core.checkpoint_files import ADAPTER_FILE
    from sisa.lm.base.adapter import attach, read_config
    from sisa.lm.base.low_rank import read_tensors

    model, _ = load_base(base)
    if files is not None:
        model = attach(model, read_config(files), read_tensors(files, ADAPTER_FILE), init_seed=0).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0]


@pytest.fixture(scope="module", params=["all layers", "top layers", "unlike"])
def adapters(request: pytest.FixtureRequest, base: Any) -> dict[int, Files]:
    attention, all_linear = ["q_proj", "v_proj"], ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    if request.param == "all layers":
        return {shard: adapter(base, shard, 4, range(LAYERS), all_linear) for shard in (0, 2, 5)}
    if request.param == "top layers":
        return {shard: adapter(base, shard, 4, [3], all_linear) for shard in (0, 2, 5)}
    return {
        0: adapter(base, 0, 2, [1, 2], attention),
        2: adapter(base, 2, 4, [2, 3], all_linear),
        5: adapter(base, 5, 3, [3], attention),
    }


def stacked(base: Any, adapters: Mapping[int, Files]) -> tuple[Any, StackedAdapters]:
    """Return the base, and the adapters on it."""
    from sisa.lm.answer.stacked_adapters import StackedAdapters
    from sisa.lm.base.low_rank import read_change

    model, _ = load_base(base)
    return model, StackedAdapters(model, {shard: read_change(each) for shard, each in adapters.items()})


def close(one: Any, other: Any) -> bool:
    return bool((one - other).abs().max() < 1e-4)


@pytest.mark.parametrize(
    "routes",
    [
        *([[0]], [[]], [[5, 0, 2]], [[0, 2], [5], []], [[2], [2], [0]], [[], [5, 2, 0]]),
        *([[5, 0], [5, 0], [5, 0]], [[2], [2]], [[], []]),
    ],
)
def test_each_row_is_its_constituent(base: Any, adapters: dict[int, Files], routes: Any) -> None:
    import torch

    model, stack = stacked(base, adapters)
    prompts = [IDS[q:] + IDS[:q] for q in range(len(routes))]
    with torch.inference_mode(), stack.asking(routes) as rows:
        found = model(input_ids=torch.tensor(prompts)).logits
    assert len(found) == sum(max(1, len(route)) for route in routes)
    for own, prompt, route in zip(rows.by_request, prompts, routes, strict=True):
        wanted = [
            alone(base, None if name is None else adapters[name], prompt) for name in route or [None]
        ]
        assert all(close(one, other) for one, other in zip(found[own], wanted, strict=True))


@pytest.mark.parametrize("routes", [[[5, 0]] * 4, [[0, 2], [5], [], [2, 0]], [[2], [0], [5], []]])
def test_prompts_read_in_pieces_are_gone_on_with_as_if_read_together(
    base: Any, adapters: dict[int, Files], routes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from sisa.lm.answer import generation

    model, stack = stacked(base, adapters)
    prompts = [IDS, IDS[:3], IDS[2:], IDS[::-1]]
    ids = torch.tensor([[0] * (len(IDS) - len(each)) + each for each in prompts])
    mask = torch.tensor([[0] * (len(IDS) - len(each)) + [1] * len(each) for each in prompts])
    monkeypatch.setattr(generation, "POSITIONS", 3 * len(IDS))
    with torch.inference_mode():
        first, cache = generation.prefill(model, stack, routes, ids, mask)
        mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], dim=1)
        places = mask.sum(-1, keepdim=True) - 1
        with stack.asking(routes) as rows:
            then = model(
                input_ids=torch.tensor([[7]] * 4),
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    for own, prompt, route in zip(rows.by_request, prompts, routes, strict=True):
        for name, one, other in zip(route or [None], first[own], then[own], strict=True):
            wanted = alone(base, None if name is None else adapters[name], [*prompt, 7])
            assert close(one, wanted[-2])
            assert close(other, wanted[-1])


@pytest.mark.parametrize("routes", [[[5, 0]] * 4, [[2], [], [5, 0], [5, 0]], [[2], [0], [5], []]])
def test_answers_that_have_ended_are_dropped(
    base: Any, adapters: dict[int, Files], routes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on as alone. Requests end one after another; at last all left have one route."""
    import torch

    from sisa.lm.answer.generation import continue_all

    model, stack = stacked(base, adapters)
    prompts, lengths, end = [IDS, IDS[:3], IDS[2:], IDS[::-1]], [1, 3, 6, 8], 0

    def answers(requests: list[int]) -> list[list[int]]:
        counts = dict.fromkeys(requests, 0)

        def pick(logits_PV: Any, held: Sequence[int], rows: Any) -> list[int]:
            logits_PV[:, end] = -torch.inf
            found = []
            for own, request in zip(rows.by_request, (requests[each] for each in held), strict=True):
                ends = counts[request] == lengths[request]
                found.append(end if ends else int(logits_PV[own].log_softmax(-1).sum(0).argmax()))
                counts[request] += not ends
            return found

        asked, rows = [routes[each] for each in requests], [prompts[each] for each in requests]
        with torch.inference_mode():
            return continue_all(model, stack, asked, rows, pick, {end}, 7)

    one_by_one = [answers([request])[0] for request in range(4)]
    assert [len(each) for each in one_by_one] == [1, 3, 6, 7]
    asked = rows_of_forwards(model, monkeypatch)
    assert answers([0, 1, 2, 3]) == one_by_one
    of = [max(1, len(each)) for each in routes]
    assert asked == [sum(of), sum(of), *[sum(of[1:])] * 2, *[sum(of[2:])] * 3]


def test_outside_of_asking_the_base_answers(base: Any, adapters: dict[int, Files]) -> None:
    import torch

    model, stack = stacked(base, adapters)
    with pytest.raises(RuntimeError, match="broken"), stack.asking([[0]]):
        raise RuntimeError("broken")
    with torch.inference_mode():
        assert torch.equal(model(input_ids=torch.tensor([IDS])).logits[0], alone(base, None, IDS))


def test_an_adapter_of_another_base_is_refused(base: Any, tmp_path: Path) -> None:
    wider = resolve_base(str(make_tiny_base(tmp_path / "wider", hidden=128, layers=LAYERS)))
    deeper = resolve_base(str(make_tiny_base(tmp_path / "deeper", layers=LAYERS + 1)))
    own = adapter(base, 1, 2, [3], ["q_proj"])
    for other in (wider, deeper):
        foreign = adapter(other, 1, 2, [LAYERS - 1 if other is wider else LAYERS], ["q_proj"])
        for both in ({0: own, 1: foreign}, {1: foreign}):
            with pytest.raises(IntegrityError, match="do not fit"):
                stacked(base, both)


def rows_of_forwards(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of rows of each of a model's forwards from now on."""
    found: list[int] = []
    forward = model.forward

    def counting(*args: Any, **inputs: Any) -> Any:
        output = forward(*args, **inputs)
        found.append(len(output.logits))
        return output

    monkeypatch.setattr(model, "forward", counting)
    return found


@pytest.mark.parametrize("shards", [(), (0,), (0, 2, 5)])
def test_no_forward_asks_more_rows_than_are_allowed(
    base: Any,
    adapters: dict[int, Files],
    monkeypatch: pytest.MonkeyPatch,
    shards: tuple[int, ...],
) -> None:
    from sisa.lm.answer import answerer as answering
    from sisa.lm.routing.route import all_of

    monkeypatch.setattr(answering, "MAX_ROWS", 6)
    answerer = answering.Answerer(base, adapters, threads=1)
    asked = rows_of_forwards(answerer.model, monkeypatch)
    prompts = [IDS[at % 3 :] for at in range(10)]
    together = answerer.generate(prompts, [all_of(shards)] * 10, 1)
    assert max(asked) == 6
    assert sum(asked) == 10 * max(1, len(shards))
    assert together == [answerer.generate([each], [all_of(shards)], 1)[0] for each in prompts]


def test_scores_of_many_rows_are_those_of_each_and_come_piece_by_piece(
    base: Any, adapters: dict[int, Files], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from sisa.lm.answer import answerer as answering
    from sisa.lm.answer import generation
    from sisa.lm.routing.route import Route, all_of

    answerer = answering.Answerer(base, adapters, threads=1)
    routes = [all_of((0, 2, 5)), Route(), all_of((2,)), all_of((0, 5))]
    ids = torch.tensor([IDS, IDS[::-1], [*IDS[3:], *IDS[:3]], [7] * len(IDS)])
    mask = torch.ones_like(ids)
    mask[3, :2] = 0
    whole = answerer.logprobs(routes, input_ids=ids, attention_mask=mask, use_cache=False)
    asked = rows_of_forwards(answerer.model, monkeypatch)
    monkeypatch.setattr(generation, "POSITIONS", 3 * len(IDS))
    parts = answerer.logprobs(routes, input_ids=ids, attention_mask=mask, use_cache=False)
    assert asked == [3, 2, 2]
    assert close(whole, parts)
    alone = [answerer.logprobs([r], input_ids=ids[q : q + 1]) for q, r in enumerate(routes[:3])]
    assert close(whole[:3], torch.cat(alone))
