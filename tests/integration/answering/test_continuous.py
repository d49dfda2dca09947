"""Continuous batching on a real base: the text of each request as if it were answered alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sisa.lm.answer.route import Route, all_of
from sisa.lm.base.weights import resolve_base
from tests.integration.answering.test_stacked import adapter
from tests.models.tiny_base import make_tiny_base

if TYPE_CHECKING:
    from sisa.lm.answer.answerer import Answerer
    from sisa.lm.answer.continuous import ContinuousBatching

pytestmark = pytest.mark.torch

SHARDS, LAYERS = (0, 2, 5), 4
ROUTES = [all_of([0]), all_of([5, 0, 2]), Route(), all_of([2]), all_of([0, 5]), all_of([2])]
PROMPTS = [[(7 * q + t) % 250 for t in range(3 + 2 * q)] for q in range(len(ROUTES))]


@pytest.fixture(scope="module", params=["all layers", "top layers"])
def answerer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    from sisa.lm.answer.answerer import Answerer

    base = resolve_base(str(make_tiny_base(tmp_path_factory.mktemp("base"), layers=LAYERS)))
    layers = range(LAYERS) if request.param == "all layers" else [2, 3]
    modules = ["q_proj", "v_proj", "down_proj"]
    adapters = {shard: adapter(base, shard, 2 + shard, layers, modules) for shard in SHARDS}
    return Answerer(base.directory, base.digest, adapters, threads=1)


def texts(batch: ContinuousBatching, said: dict[Any, str] | None = None) -> dict[Any, str]:
    """Return the text of each request, answered to its end."""
    from sisa.lm.answer.continuous import Piece

    said = {} if said is None else said
    while batch.running or batch.waiting:
        for event in batch.step():
            if isinstance(event, Piece):
                said[event.key] = said.get(event.key, "") + event.text
    return said


@pytest.mark.parametrize("max_rows", [3, 64])
def test_greedy_texts_are_those_of_generate(answerer: Answerer, max_rows: int) -> None:
    from sisa.lm.answer.continuous import ContinuousBatching, Sampling

    lengths = [9, 4, 12, 1, 7, 12]
    batch = ContinuousBatching(answerer, max_rows=max_rows)
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        batch.admit(prompt, route, Sampling(max_new_tokens=lengths[number]), number)
    said = texts(batch)
    for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
        assert said.get(number, "") == answerer.generate([prompt], [route], lengths[number])[0]


def test_requests_join_others_that_run(answerer: Answerer) -> None:
    """Prompts longer and shorter than what is held come while others run; tensors are made anew."""
    from sisa.lm.answer import slots
    from sisa.lm.answer.continuous import ContinuousBatching, Piece, Sampling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "SPARE_COLUMNS", 5)
        batch = ContinuousBatching(answerer)
        said: dict[Any, str] = {}
        for number, (prompt, route) in enumerate(zip(PROMPTS, ROUTES, strict=True)):
            batch.admit(prompt, route, Sampling(max_new_tokens=20), number)
            for event in [*batch.step(), *batch.step()]:
                if isinstance(event, Piece):
                    said[event.key] = said.get(event.key, "") + event.text
        texts(batch, said)
    assert [said[number] for number in range(len(ROUTES))] == answerer.generate(PROMPTS, ROUTES, 20)
