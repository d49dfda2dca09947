"""Seconds of answering with several constituents: stacked adapters against peft's own ways.

    python -m tests.bench.answering.answers --out tests/bench/answering/answers.json

    loop    `set_adapter` and a forward for each constituent, each with its own cache
    mixed   one forward of a batch with peft's `adapter_names`
    ours    one forward of stacked adapters

Each of 1, 4 and 16 requests asks 8 shards, with adapters (rank 8, all linear modules) in all layers and
in the top third. Routes of one and of two shards are then compared with one ordinary adapter in peft:
all requests to the same shard, and each to other ones. A prefill reads prompts of 48 tokens, a decode
gives all of them the next token, and an answer is a prefill and ANSWER_TOKENS decodes. Each measure is
the median of several, taken in turns on one thread, and reported as a ratio. The logits of all ways are
compared.

Embedding and looking up the prompt (`lookup.py`) and tokenizing are not included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import torch

from sisa.core.domain import BaseFiles
from sisa.lm.answer.generation import prefill
from sisa.lm.answer.stacked_adapters import StackedAdapters
from sisa.lm.base.low_rank import Factors
from sisa.lm.base.weights import load_base, resolve_base
from tests.bench.command import BASE, arguments, markdown, write

NUM_SHARDS, RANK, PROMPT_TOKENS, STEPS, TURNS = 8, 8, 48, 8, 3
ANSWER_TOKENS = 32
PARTS = ("prefill", "decode", "answer")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Way = Callable[[torch.Tensor, Any], tuple[torch.Tensor, Any]]


def adapted(base: BaseFiles, layers: Sequence[int]) -> tuple[Any, dict[int, dict[str, Factors]]]:
    """Return a peft model with an adapter for each shard, and the same adapters' factors by shard."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=MODULES,
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base)[0], config, adapter_name="s0")
    changes = {}
    for shard in range(NUM_SHARDS):
        drawn = torch.Generator().manual_seed(shard)
        tensors = {
            name: 0.02 * torch.randn(each.shape, generator=drawn)
            for name, each in get_peft_model_state_dict(model, adapter_name="s0").items()
        }
        if shard:
            model.add_adapter(f"s{shard}", config)
        set_peft_model_state_dict(model, dict(tensors), adapter_name=f"s{shard}")
        names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
        changes[shard] = {
            name: Factors(
                tensors[f"base_model.model.{name}.lora_A.weight"],
                tensors[f"base_model.model.{name}.lora_B.weight"],
            )
            for name in names
        }
    return model.eval().requires_grad_(False), changes


def forward(model: Any, ids: torch.Tensor, cache: Any, **more: Any) -> tuple[torch.Tensor, Any]:
    output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    return output.logits[:, -1], output.past_key_values


def loop(model: Any, shards: Sequence[int]) -> Way:
    def way(ids: torch.Tensor, caches: Any) -> tuple[torch.Tensor, Any]:
        rows, kept = [], {}
        for shard in shards:
            model.set_adapter(f"s{shard}", inference_mode=True)
            logits, kept[shard] = forward(model, ids, (caches or {}).get(shard))
            rows.append(logits)
        return torch.cat(rows), kept  # shard by shard, as ours

    return way


def mixed(model: Any, shards: Sequence[int]) -> Way:
    def way(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        names = [f"s{shard}" for shard in shards for _ in range(len(ids))]
        return forward(model, ids.repeat(len(shards), 1), cache, adapter_names=names)

    return way


def ours(base: Any, stack: StackedAdapters, route: Callable[[int], Sequence[int]]) -> Way:
    """Return the stacked adapters; `route` returns the shards that answer a request, by its number."""

    def way(ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        routes = [route(number) for number in range(len(ids))]
        if cache is None:
            return prefill(base, stack, routes, ids, torch.ones_like(ids))
        with stack.asking(routes):
            return forward(base, ids, cache)

    return way


def spread(top_k: int) -> Callable[[int], Sequence[int]]:
    """Return routes that send each request to other shards than the one before."""
    return lambda number: [(number * top_k + k) % NUM_SHARDS for k in range(top_k)]


def timed(ways: dict[str, Way], num_requests: int, vocab: int) -> dict[str, Any]:
    """Return the median seconds of each way, and the largest difference of its logits from the first's.

    Ways that return another number of logits are not compared.
    """
    drawn = torch.Generator().manual_seed(num_requests)
    ids = torch.randint(vocab, (num_requests, PROMPT_TOKENS + STEPS), generator=drawn)
    seconds: dict[str, dict[str, list[float]]] = {
        name: {part: [] for part in PARTS[:2]} for name in ways
    }
    last: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for _ in range(TURNS):
            for name, way in ways.items():
                began = time.perf_counter()
                last[name], cache = way(ids[:, :PROMPT_TOKENS], None)
                seconds[name]["prefill"].append(time.perf_counter() - began)
                began = time.perf_counter()
                for at in range(PROMPT_TOKENS, PROMPT_TOKENS + STEPS):
                    last[name], cache = way(ids[:, at : at + 1], cache)
                seconds[name]["decode"].append((time.perf_counter() - began) / STEPS)
    first = last[next(iter(ways))]
    medians = {
        name: {part: median(each) for part, each in parts.items()} for name, parts in seconds.items()
    }
    for each in medians.values():
        each["answer"] = each["prefill"] + ANSWER_TOKENS * each["decode"]
    return {
        "requests": num_requests,
        **{f"{name}_{part}_s": each for name, parts in medians.items() for part, each in parts.items()},
        "largest_difference": {
            name: float((each - first).abs().max())
            for name, each in last.items()
            if each.shape == first.shape and each is not first
        },
    }


def measured(base: BaseFiles, layers: Sequence[int], sizes: Sequence[int]) -> dict[str, Any]:
    """Return all measures with adapters in some layers."""
    model, changes = adapted(base, layers)
    plain, _ = load_base(base)
    stack = StackedAdapters(plain, changes)
    everybody, vocab = range(NUM_SHARDS), int(plain.config.vocab_size)
    rows = []
    for size in sizes:
        ways = {
            "loop": loop(model, everybody),
            "mixed": mixed(model, everybody),
            "ours": ours(plain, stack, lambda _: everybody),
        }
        row = timed(ways, size, vocab)
        for part in PARTS:
            row[f"loop_over_ours_{part}"] = row[f"loop_{part}_s"] / row[f"ours_{part}_s"]
            best = min(row[f"loop_{part}_s"], row[f"mixed_{part}_s"])
            row[f"faster_of_both_over_ours_{part}"] = best / row[f"ours_{part}_s"]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"layers": len(layers), "all_shards": rows, "routed": routed(model, plain, stack, sizes)}


def routed(model: Any, plain: Any, stack: StackedAdapters, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return the ratios of routes of one and of two shards to one ordinary adapter."""
    found = []
    for size in sizes:
        ways = {
            "one_adapter": loop(model, [0]),
            "top_1_same": ours(plain, stack, lambda _: [0]),
            "top_1_spread": ours(plain, stack, spread(1)),
            "top_2_spread": ours(plain, stack, spread(2)),
        }
        row = timed(ways, size, int(plain.config.vocab_size))
        summary = {"requests": size, "largest_difference": row["largest_difference"]["top_1_same"]}
        for part in PARTS:
            for name in list(ways)[1:]:
                summary[f"{name}_over_one_adapter_{part}"] = (
                    row[f"{name}_{part}_s"] / row[f"one_adapter_{part}_s"]
                )
        found.append(summary)
        print(json.dumps(summary), flush=True)
    return found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield how fast shards answer together, at 1, 4 and 16 requests."""
    all_shards = {
        "decode: times as fast as peft's `set_adapter` loop": "loop_over_ours_decode",
        "prefill: times as fast as the loop": "loop_over_ours_prefill",
        "decode: as the faster of the loop and `adapter_names`": "faster_of_both_over_ours_decode",
        "prefill: as the faster of both": "faster_of_both_over_ours_prefill",
        "an answer of 32 tokens: times as fast as the loop": "loop_over_ours_answer",
    }
    one_shard = (
        "an answer by one shard (`top_k: 1`), each request another: cost over one ordinary adapter's in "
        "peft"
    )
    routed = {
        one_shard: "top_1_spread_over_one_adapter_answer",
        "by two shards (`top_k: 2`)": "top_2_spread_over_one_adapter_answer",
    }
    lines = []
    for asked, measures, form in (("all_shards", all_shards, ".1f"), ("routed", routed, ".2f")):
        for title, name in measures.items():
            of_layers = (found[each][asked] for each in ("all_layers", "top_third"))
            cells = (", ".join(format(row[name], form) for row in rows) for rows in of_layers)
            lines.append((title, *cells))
    header = ("what, at 1, 4 and 16 requests of 48 tokens", "all layers", "top third")
    yield from markdown(header, lines)


def main() -> None:
    given = arguments(__doc__, base=BASE, sizes="1,4,16")
    torch.set_num_threads(1)
    base = resolve_base(given.base)
    layers = int(load_base(base)[0].config.num_hidden_layers)
    sizes = [int(each) for each in given.sizes.split(",")]
    found = {
        "shards": NUM_SHARDS,
        "rank": RANK,
        "prompt_tokens": PROMPT_TOKENS,
        "torch": torch.__version__,
        "all_layers": measured(base, range(layers), sizes),
        "top_third": measured(base, range(layers - max(1, layers // 3), layers), sizes),
    }
    write(given.out, found)


if __name__ == "__main__":
    main()
