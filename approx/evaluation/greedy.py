"""Greedy continuations of token ids, some rows at once.

Rules: rows are padded on the left, with a mask, in batches of one size in the order given, so that the
same rows give the same tokens. The model's own generation config does not count. A continuation
ends with its end token, where it comes to one.

Not covered: sampling; several devices.

    continued(model, [[5, 6], [7]], ends={2}, max_new_tokens=8)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

BATCH_ROWS = 16


def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Collection[int],
    max_new_tokens: int,
    batch_rows: int = BATCH_ROWS,
    min_new_tokens: int = 1,
) -> list[list[int]]:
    """What the model says after each prompt: at least `min_new_tokens`, at most `max_new_tokens`."""
    from transformers import GenerationConfig

    pad = min(ends, default=0)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
    )
    found = []
    for start in range(0, len(prompts), batch_rows):
        rows = prompts[start : start + batch_rows]
        longest = max(map(len, rows))
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        with torch.no_grad():  # inference mode would leave tensors behind that no gradient flows through
            made = model.generate(
                input_ids=torch.tensor(ids, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
        found += [_to_end(row, ends) for row in made[:, longest:].tolist()]
    return found


def _to_end(ids: Sequence[int], ends: Collection[int]) -> list[int]:
    """
    >>> _to_end([5, 2, 2], {2})
    [5, 2]
    """
    for at, each in enumerate(ids):
        if each in ends:
            return list(ids[: at + 1])
    return list(ids)
