"""The frozen prefix: hidden states that enter the lowest adapted layer, computed once a record.

Rules: below the lowest adapted layer nothing is trained, so what enters it is a pure function of the
base (with the patches beneath) and the record. It is always computed for each record alone, at its own
length, with the base in evaluation: no batch mate, order or stage reaches its bits, and whether states
were kept or are computed again doesn't either. What is kept in memory is bounded; the first to come
stay. A base whose layers can't be run apart, bit for bit, is refused.

Not covered: keeping states beyond the process (`shard_prefixes.py`).

Legend: B rows, T positions, H hidden.

    lower = Lower(base, first=20)
    states_TH = lower.alone(input_ids)
    with lower.given([states_TH], packed=False):
        base(input_ids=...)            # runs the layers from 20 on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sisa.core.errors import InvalidInput
from sisa.lm.base.layers import layers_of

MEMORY_BYTES = 512 << 20
PROBE_IDS = (0, 1, 2, 3, 1)


class _Reached(Exception):
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class _Passing(nn.Module):
    """Stands in a layer's place and gives on what it gets, in the layer's form."""

    def __init__(self, layer: Any, num_outputs: int | None) -> None:
        super().__init__()
        self._of = (layer,)  # not a module of this one
        self._num_outputs = num_outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._num_outputs is None else (hidden, *[None] * (self._num_outputs - 1))


class FrozenLayers:
    """The layers of a base below `first`. Its modules are the caller's own; they are swapped while
    states are given."""

    def __init__(self, base: Any, first: int) -> None:
        self.first = first
        self._base, self._decoder = base, base.get_decoder()
        self._layers = layers_of(base)[1]
        self._real = [self._layers[at] for at in range(first)]
        self._passing: list[_Passing] | None = None

    def alone(self, input_ids: Sequence[int]) -> Tensor:
        """Return the states [T, H] that enter layer `first`, of one record by itself."""
        return self._entering(torch.tensor([list(input_ids)], device=self._base.device))

    @torch.no_grad()
    def _entering(self, ids_1T: Tensor, **positions: Tensor) -> Tensor:
        training = self._base.training
        self._base.eval()

        def reached(_layer: Any, args: Any, kwargs: Any) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        hook = self._layers[self.first].register_forward_pre_hook(reached, with_kwargs=True)
        try:
            self._decoder(input_ids=ids_1T, use_cache=False, **positions)
        except _Reached as found:
            return found.states[0].cpu().clone()
        finally:
            hook.remove()
            self._base.train(training)
        raise _not_apart()

    @contextmanager
    def given(self, states: Sequence[Tensor], *, packed: bool) -> Iterator[None]:
        """Let a forward start from the states [T, H] of its records, which lie end to end in one row, or
        one a row, padded on the right."""
        together = (
            torch.cat(list(states))[None] if packed else nn.utils.rnn.pad_sequence([*states], True)
        )
        given_BTH = together.to(self._base.device)

        def enter(_layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (given_BTH, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": given_BTH}

        hook = self._layers[self.first].register_forward_pre_hook(enter, with_kwargs=True)
        if self._passing is None:
            self._passing = [_Passing(each, self._num_outputs()) for each in self._real]
        try:
            for at, each in enumerate(self._passing):
                self._layers[at] = each
            yield
        finally:
            for at, layer in enumerate(self._real):
                self._layers[at] = layer
            hook.remove()

    def _num_outputs(self) -> int | None:
        """How many values the lowest layer gives; None for a tensor by itself."""
        seen: list[Any] = []
        hook = self._real[0].register_forward_hook(lambda _layer, _args, found: seen.append(found))
        self.alone(PROBE_IDS)
        hook.remove()
        return len(seen[0]) if isinstance(seen[0], tuple) else None

    @torch.no_grad()
    def check(self, longest: int) -> None:
        """Raise InvalidInput unless the layers above give the same bits from given states, and those of
        a record do not depend on the records, of up to `longest` tokens, that came before it."""
        ids_1T = torch.tensor([PROBE_IDS], device=self._base.device)
        training = self._base.training
        self._base.eval()
        try:
            whole = self._decoder(input_ids=ids_1T, use_cache=False).last_hidden_state
            with self.given([self.alone(PROBE_IDS)], packed=False):
                apart = self._decoder(input_ids=ids_1T, use_cache=False).last_hidden_state
            remembers = self._remembers(longest)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise _not_apart() from error
        finally:
            self._base.train(training)
        if remembers or not torch.equal(whole, apart):
            raise _not_apart()

    def _remembers(self, longest: int) -> bool:
        """Whether states of a text change when the base has seen a longer one: the frequencies of some
        rotary positions follow the longest text so far."""
        if getattr(self._base.config, "rope_parameters", None) is None:
            return False
        ids_1T = torch.tensor([PROBE_IDS], device=self._base.device)
        ends = (longest - 1, longest, longest - 1)
        starts = [max(0, end - len(PROBE_IDS)) for end in ends]
        at_T = torch.arange(len(PROBE_IDS), device=self._base.device)
        before, _, after = (self._entering(ids_1T, position_ids=start + at_T[None]) for start in starts)
        return not torch.equal(before, after)


def _not_apart() -> InvalidInput:
    return InvalidInput(
        "the base model's upper layers can't be run apart from its lower ones",
        where="lora_layers",
        expected="layers that depend on the one below alone",
        next_step="use lora_layers: all",
    )


class Prefixes:
    """States by record, kept in memory up to a bound. One base and its patches."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._left = memory_bytes
        self._kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}

    def states(self, lower: FrozenLayers, input_ids: Sequence[int]) -> Tensor:
        """States [T, H] of a record, kept or computed."""
        key = (lower.first, tuple(input_ids))
        found = self._kept.get(key)
        if found is None:
            found = lower.alone(input_ids)
            self.keep(*key, found)
        return found

    def keep(self, first: int, input_ids: tuple[int, ...], states_TH: Tensor) -> None:
        """Keep states, if there is room."""
        if states_TH.nbytes <= self._left and (first, input_ids) not in self._kept:
            self._left -= states_TH.nbytes
            self._kept[first, input_ids] = states_TH

    def kept(self, first: int, input_ids: tuple[int, ...]) -> Tensor | None:
        """States, if they are kept."""
        return self._kept.get((first, input_ids))
