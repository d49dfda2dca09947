"""Continuations of prompts under a causal model: greedy, or drawn from its distribution.

Rows are padded on the left, with a mask, in batches of one size and in the given order, so the same rows
give the same tokens. The model's own generation config is not used.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

BATCH_ROWS = 16


def continue_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    max_new_tokens: int,
    batch_rows: int = BATCH_ROWS,
    min_new_tokens: int = 1,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and including its end token."""
    chosen = {"do_sample": False, "min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens}
    return _continued(model, prompts, ends, batch_rows, chosen)


def continue_sampled(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_rows: int = BATCH_ROWS,
    min_new_tokens: int = 1,
) -> list[list[int]]:
    """Return a continuation of each prompt, drawn from the model's whole distribution.

    The same rows and seed give the same tokens on one machine. The caller's random state is unchanged.
    """
    chosen = {
        **{"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0},
        **{"min_new_tokens": min_new_tokens, "max_new_tokens": max_new_tokens},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _continued(model, prompts, ends, batch_rows, chosen)


def _continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    batch_rows: int,
    chosen: Mapping[str, Any],
) -> list[list[int]]:
    from transformers import GenerationConfig

    pad = min(ends, default=0)
    config = GenerationConfig(**chosen, eos_token_id=sorted(ends) or None, pad_token_id=pad)
    found = []
    for start in range(0, len(prompts), batch_rows):
        rows = prompts[start : start + batch_rows]
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        with torch.no_grad():  # tensors of inference mode would block gradients later
            made = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
        found += [_to_end(row, ends) for row in made[:, longest:].tolist()]
    return found


def _to_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Return ids up to and including the first end token.

    >>> _to_end([5, 2, 2], {2})
    [5, 2]
    """
    return ids[: next((at for at, each in enumerate(ids, 1) if each in ends), None)]
