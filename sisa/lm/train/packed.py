"""Packing: records end to end in one row without padding, each attending to itself alone.

Attention is computed record by record, by transformers' own function, causally, and on the CPU in
float32. Everything else runs over the row as a whole, with positions that restart at each record.
`packs` checks, by bits, whether a base can be run so: whatever one record contains, the next record's
states must not change. Bases that look back only within a window, that add something of their own to
attention, or whose layers mix records outside attention (state spaces, experts with shared capacity)
can't be packed; their rows are padded. Key-value caches and attention masks are not supported.

    with attending(base, [5, 3]):                       # lengths of the records in the row
        base.get_decoder()(input_ids=ids_1N, position_ids=positions_1N, use_cache=False)

Legend: N tokens of a row, H heads, D features of a head, T tokens of a record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "record_by_record"
HARMLESS = ("position_ids", "use_cache", "output_attentions", "output_hidden_states", "sliding_window")
WINDOWS = ("sliding_window", "attention_chunk_size")
ONE, OTHER, NEXT = (0, 1, 2), (3, 2, 1), (1, 3, 0, 2)
# Relative to the norm; wrong positions give about 1.
PACKING_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths")


class _Unlike(Exception):
    """The base uses another attention than the plain one."""


def _attend(
    module: Any,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None or any(
        value is not None and name not in HARMLESS for name, value in others.items()
    ):
        raise _Unlike
    lengths = list(_lengths.get())
    asked = [query_1HND, key_1HND, value_1HND]
    if query_1HND.device.type == "cpu":  # in bfloat16 its backward takes four times as long
        asked = [each.float() for each in asked]
    parts = [torch.split(each, lengths, dim=2) for each in asked]
    found = [
        sdpa_attention_forward(module, *each, None, dropout=dropout, scaling=scaling, is_causal=True)[0]
        for each in zip(*parts, strict=True)
    ]
    return torch.cat(found, dim=1).to(query_1HND.dtype), None


AttentionInterface.register(ATTENTION_NAME, _attend)


@contextmanager
def attending(base: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Make a base's forwards attend record by record; its configuration must be the caller's own."""
    before = [(config, config._attn_implementation) for config in _configs(base)]
    token = _lengths.set(tuple(lengths))
    try:
        for config, _ in before:
            config._attn_implementation = ATTENTION_NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name
        _lengths.reset(token)


def _configs(base: Any) -> list[Any]:
    """Return the distinct configurations of a base's modules."""
    found = {id(each.config): each.config for each in base.modules() if hasattr(each, "config")}
    return list(found.values())


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return positions [1, N] that restart at each record."""
    return torch.cat([torch.arange(each, device=device) for each in lengths])[None]


@torch.no_grad()
def packs(base: Any, longest: int) -> bool:
    """Return whether packed records of up to `longest` tokens have the states of each alone."""
    windows = [getattr(config, name, None) for config in _configs(base) for name in WINDOWS]
    decoder = base.get_decoder()
    if decoder is None or any(isinstance(each, int) and each < longest for each in windows):
        return False
    try:
        apart, moved = (_states(base, decoder, first, NEXT) for first in (ONE, OTHER))
    except (_Unlike, AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    ids_1T = torch.tensor([NEXT], device=base.device)
    alone = decoder(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    off = (apart - alone).float().norm() / alone.float().norm()
    return torch.equal(apart, moved) and off.item() <= PACKING_TOLERANCE.get(alone.dtype, 0.0)


def _states(base: Any, decoder: Any, first: Sequence[int], then: Sequence[int]) -> Tensor:
    """Return the hidden states [T, H] of the second of two packed records; here H is hidden."""
    lengths = (len(first), len(then))
    ids_1N = torch.tensor([[*first, *then]], device=base.device)
    with attending(base, lengths):
        found: Tensor = decoder(
            input_ids=ids_1N, position_ids=positions(lengths, base.device), use_cache=False
        ).last_hidden_state
    return found[0, len(first) :]
