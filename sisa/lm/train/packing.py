"""Packing: records end to end in one row, each with the hidden states that it has alone.

In a packed row, attention is computed record by record, by transformers' own function, causally, and on
the CPU in float32. Everything else runs over the row as a whole, with positions that restart at each
record. `packs` checks whether a base can be run so: whatever one record contains, no bit of the next
record's states may change. Bases that look back only within a window, that add something of their own to
attention, or whose layers mix records outside attention (state spaces, experts with shared capacity)
can't be packed.

    with attending(base, lengths=[5, 9]):
        base(input_ids=ids_1N, position_ids=positions([5, 9], base.device))

Legend: N tokens of a packed row, T of one record, H hidden (in attention: heads), D features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION_NAME = "record_by_record"
HARMLESS = ("position_ids", "use_cache", "output_attentions", "output_hidden_states", "sliding_window")
WINDOWS = ("sliding_window", "attention_chunk_size")
FIRST, OTHER_FIRST, SECOND = (0, 1, 2), (3, 2, 1), (1, 3, 0, 2)  # records to try packing on
# Relative to the norm; wrong positions give about 1.
PACKING_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.3}
_lengths: ContextVar[list[int]] = ContextVar("lengths")
_configs_of: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


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
    asked = [query_1HND, key_1HND, value_1HND]
    if query_1HND.device.type == "cpu":  # in bfloat16 its backward takes four times as long
        asked = [each.float() for each in asked]
    parts = [torch.split(each, _lengths.get(), dim=2) for each in asked]
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
    token = _lengths.set(list(lengths))
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
    if base not in _configs_of:  # a walk over the modules takes 10 ms
        found = {id(each.config): each.config for each in base.modules() if hasattr(each, "config")}
        _configs_of[base] = list(found.values())
    return _configs_of[base]


def has_window(base: Any, longest: int) -> bool:
    """Return whether a base looks back over fewer than `longest` tokens, as far as it says so."""
    windows = [getattr(config, name, None) for config in _configs(base) for name in WINDOWS]
    return any(isinstance(each, int) and each < longest for each in windows)


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return positions [1, N] that restart at each record."""
    return torch.cat([torch.arange(each, device=device) for each in lengths])[None]


@torch.no_grad()
def packs(base: Any, longest: int) -> bool:
    """Return whether packed records of up to `longest` tokens have the states of each alone."""
    decoder = base.get_decoder()
    if decoder is None or has_window(base, longest):
        return False
    try:
        apart, moved = (_states_behind(base, first) for first in (FIRST, OTHER_FIRST))
    except (_Unlike, AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    ids_1T = torch.tensor([SECOND], device=base.device)
    alone = decoder(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
    off = (apart - alone).float().norm() / alone.float().norm()
    return torch.equal(apart, moved) and off.item() <= PACKING_TOLERANCE.get(alone.dtype, 0.0)


def _states_behind(base: Any, first: Sequence[int]) -> Tensor:
    """Return the hidden states [T, H] of SECOND, packed behind another record; here H is hidden."""
    lengths = (len(first), len(SECOND))
    ids_1N = torch.tensor([[*first, *SECOND]], device=base.device)
    at_1N = positions(lengths, base.device)
    with attending(base, lengths):
        output = base.get_decoder()(input_ids=ids_1N, position_ids=at_1N, use_cache=False)
    found: Tensor = output.last_hidden_state
    return found[0, len(first) :]
