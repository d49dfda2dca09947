"""Tokens a second of many clients at once, against one after another, and the time to a first token.

    python -m tests.bench.answering.throughput --out tests/bench/answering/throughput.json

    generate    `Answerer.generate`, one prompt after another
    alone       one client of a `ContinuousBatching`, which asks again once it has its answer
    together    NUM_CLIENTS of them at the same time

Clients ask about people, in the chat's form; each question is routed to one of 8 shards, whose adapters
(rank 8, all linear modules, all layers) have random weights. An answer has as many tokens as was drawn
for it, the same in all three, and no end token counts. The three take turns, so that what else the
machine does is shared: ratios are of one round, by the clock and by core-seconds, and their median is
reported. A first token's time counts from the admission of its prompt. Routing and HTTP are not
included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

from sisa.core.domain import BaseFiles
from sisa.data.samples import make_people
from sisa.lm.answer.answerer import Answerer
from sisa.lm.answer.continuous import ContinuousBatching, Ended
from sisa.lm.answer.sampling import Sampling
from sisa.lm.base.adapter import adapter_files, adapter_tensors, attach, put_tensors
from sisa.lm.base.tokens import encode_prompt
from sisa.lm.base.weights import load_base, resolve_base
from sisa.lm.routing.route import Route, all_of
from tests.bench.command import BASE, Clock, arguments, markdown, write
from tests.endurance.ground import environment

NUM_SHARDS, RANK, NUM_CLIENTS = 8, 8, 16
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ANSWER_TOKENS = (24, 72)
ALONE, TOGETHER = 4, 64  # answers in a round


class Ask(NamedTuple):
    """A question's token ids, its route, and the number of tokens of its answer."""

    ids: list[int]
    route: Route
    num_tokens: int


def adapter(base: BaseFiles, shard: int) -> Mapping[str, bytes]:
    """Return an adapter of random weights, as a checkpoint holds it."""
    from peft import LoraConfig

    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MODULES, task_type="CAUSAL_LM")
    model = attach(load_base(base)[0], config, None, init_seed=shard)
    drawn = torch.Generator().manual_seed(shard)
    tensors = adapter_tensors(model).items()
    put_tensors(model, {n: 0.02 * torch.randn(each.shape, generator=drawn) for n, each in tensors})
    return adapter_files(model)


def questions(answerer: Answerer, seed: int) -> Iterator[Ask]:
    """Yield questions, shard by shard in turn."""
    drawn = random.Random(seed)
    rows = make_people(40, 8, seed)
    drawn.shuffle(rows)
    for number, row in enumerate(rows):
        ids = encode_prompt(row["prompt"], answerer.tokenizer, "chat")
        yield Ask(ids, all_of([number % NUM_SHARDS]), drawn.randint(*ANSWER_TOKENS))


def rates(clock: Clock, num_tokens: int) -> dict[str, float]:
    """Return tokens a second and a core-second since a clock was made."""
    took = clock.took()
    return {
        "tokens_per_s": num_tokens / took["seconds"],
        "tokens_per_core_s": num_tokens / took["core_seconds"],
    }


def generated(answerer: Answerer, asked: Sequence[Ask]) -> dict[str, float]:
    """Answer by `generate`, one after another."""
    clock = Clock()
    for each in asked:
        answerer.generate([each.ids], [each.route], each.num_tokens)
    return rates(clock, sum(each.num_tokens for each in asked))


def batched(answerer: Answerer, asked: Sequence[Ask], num_clients: int) -> dict[str, float]:
    """Answer for clients that each ask again once they have their answer, until one has no question."""
    batch, waiting = ContinuousBatching(answerer), iter(enumerate(asked))
    admitted: dict[Any, float] = {}
    first_s: dict[Any, float] = {}

    def ask() -> bool:
        """Admit the next question, and return whether there was one."""
        following = next(waiting, None)
        if following is None:
            return False
        key, each = following
        admitted[key] = time.perf_counter()
        batch.admit(each.ids, each.route, Sampling(max_new_tokens=each.num_tokens), key)
        return True

    clock, num_tokens = Clock(), 0
    all_ask = all(ask() for _ in range(num_clients))
    while all_ask:
        for event in batch.step():
            first_s.setdefault(event.key, time.perf_counter() - admitted[event.key])
            if isinstance(event, Ended):
                all_ask &= ask()
            else:
                num_tokens += len(event.tokens)
    ordered = sorted(first_s.values())
    return {
        **rates(clock, num_tokens),
        "first_token_s_p50": median(ordered),
        "first_token_s_p95": quantiles(ordered, n=20, method="inclusive")[-1],
    }


def measured(base: BaseFiles, adapters: Mapping[int, Any], threads: int, rounds: int) -> dict[str, Any]:
    """Return all rounds with so many threads, and the medians of their ratios."""
    answerer = Answerer(base, adapters, threads)
    answerer.ends = frozenset()
    batched(answerer, [*islice(questions(answerer, seed=0), NUM_CLIENTS)], NUM_CLIENTS)  # warms up
    done = []
    for number in range(1, rounds + 1):
        asked = [*islice(questions(answerer, seed=number), TOGETHER)]
        row = {
            "generate": generated(answerer, asked[:ALONE]),
            "alone": batched(answerer, asked[:ALONE], 1),
            "together": batched(answerer, asked, NUM_CLIENTS),
        }
        print(threads, row, flush=True)
        done.append(row)
    found: dict[str, Any] = {"threads": threads, "rounds": done}
    for unit in ("s", "core_s"):
        rate = f"tokens_per_{unit}"
        one = [max(each["generate"][rate], each["alone"][rate]) for each in done]
        ratios = [each["together"][rate] / best for each, best in zip(done, one, strict=True)]
        found[f"together_over_one_by_one_{unit}"] = [min(ratios), median(ratios), max(ratios)]
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what many clients at once get, against one after another."""

    def line(threads: Mapping[str, Any]) -> tuple[str, ...]:
        def middle(way: str, name: str) -> float:
            return float(median(each[way][name] for each in threads["rounds"]))

        rates = (middle(way, "tokens_per_s") for way in ("generate", "alone", "together"))
        least, ratio, most = threads["together_over_one_by_one_s"]
        first_s = (middle("together", f"first_token_s_{each}") for each in ("p50", "p95"))
        return (
            str(threads["threads"]),
            ", ".join(f"{each:.1f}" for each in rates),
            f"{ratio:.1f} ({least:.1f} to {most:.1f})",
            f"{threads['together_over_one_by_one_core_s'][1]:.1f}",
            f"{middle('alone', 'first_token_s_p50'):.2f} s",
            ", ".join(f"{each:.2f} s" for each in first_s),
        )

    together = f"{found['clients']} clients"
    header = (
        "threads",
        f"tokens/s: `generate`, one client, {together}",
        f"{together} over the faster of both",
        "by core-seconds",
        "first token, one client",
        f"{together}, p50 and p95",
    )
    yield from markdown(header, map(line, found["settings"]))


def main() -> None:
    given = arguments(__doc__, base=BASE, rounds=3, threads="1,2")
    base = resolve_base(given.base)
    adapters = {shard: adapter(base, shard) for shard in range(NUM_SHARDS)}
    threads = [int(each) for each in given.threads.split(",")]
    settings = [measured(base, adapters, each, given.rounds) for each in threads]
    fixed = {"clients": NUM_CLIENTS, "shards": NUM_SHARDS, "rank": RANK, "answer_tokens": ANSWER_TOKENS}
    found = {**environment(), **fixed, "settings": settings}
    write(given.out, found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
