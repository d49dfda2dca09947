"""The layers that are not trained: the hidden states that leave them, computed once per record.

Nothing is trained below the lowest adapted layer, so the states that enter it are a pure function of the
base (with the patches beneath) and the record. They are always computed for each record alone, at its
own length, with the base in evaluation mode: their bits depend on neither batch, order nor stage, nor on
whether they were cached or computed again. A base whose layers can't be run apart, bit for bit, is
refused.

Legend: B rows, T positions, H hidden.

    frozen = FrozenLayers(base, first=20)
    states_TH = HiddenStateCache().states(frozen, input_ids)
    with frozen.skipped([states_TH], packed=False):
        base(input_ids=...)            # runs the layers from 20 on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sisa.core.domain import SliceJob
from sisa.core.errors import InvalidInput
from sisa.core.ports import HiddenStateStore, StoredRecord
from sisa.lm.base.adapter import layers_of
from sisa.lm.base.tokens import Tokens
from sisa.planning.hidden_state_files import shard_start, states_name

MEMORY_BYTES = 512 << 20
HEADER_BYTES = 256  # more than a record takes in a file beside its states
PROBE_IDS = (0, 1, 2, 3, 1)
TokenizedRows = Sequence[tuple[StoredRecord, Tokens]]


class _Reached(Exception):
    """Carries the states that enter a layer, and ends the forward there."""


class _Passing(nn.Module):
    """A stand-in for a layer that returns its input unchanged, in the form of the layer's output."""

    def __init__(self, layer: Any, num_outputs: int | None) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that torch does not register it as a submodule
        self._num_outputs = num_outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return hidden if self._num_outputs is None else (hidden, *[None] * (self._num_outputs - 1))


class FrozenLayers:
    """The layers of a base below layer `first`.

    The base's modules must be the caller's own: `skipped` replaces them for the time of a forward.
    """

    def __init__(self, base: Any, first: int) -> None:
        self.first = first
        self._base, self._decoder = base, base.get_decoder()
        self._layers = layers_of(base)[1]
        self._real = list(self._layers[:first])

    def alone(self, input_ids: Sequence[int]) -> Tensor:
        """Return the states [T, H] that enter layer `first`, for one record by itself."""
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
            states_1TH: Tensor = found.args[0]
            return states_1TH[0].cpu().clone()
        finally:
            hook.remove()
            self._base.train(training)
        raise _not_apart()

    @contextmanager
    def skipped(self, states: Sequence[Tensor], *, packed: bool) -> Iterator[None]:
        """Start the base's forwards at layer `first`, from the states [T, H] of their records.

        The records lie end to end in one row (`packed`), or one per row, padded on the right.
        """
        together = torch.cat([*states])[None] if packed else pad_sequence([*states], batch_first=True)
        given_BTH = together.to(self._base.device)
        passing = self._passing

        def enter(_layer: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (given_BTH, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": given_BTH}

        hook = self._layers[self.first].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            for at, each in enumerate(passing):
                self._layers[at] = each
            yield
        finally:
            for at, layer in enumerate(self._real):
                self._layers[at] = layer
            hook.remove()

    @cached_property
    def _passing(self) -> list[_Passing]:
        """Return the stand-ins, which return as many values as the lowest layer does."""
        seen: list[Any] = []
        hook = self._real[0].register_forward_hook(lambda _layer, _args, found: seen.append(found))
        self.alone(PROBE_IDS)
        hook.remove()
        num_outputs = len(seen[0]) if isinstance(seen[0], tuple) else None
        return [_Passing(each, num_outputs) for each in self._real]

    @torch.no_grad()
    def check(self, longest: int) -> None:
        """Raise InvalidInput unless a base in evaluation mode can be run in two parts.

        From given states the upper layers must give the same bits as in a whole forward, and a record's
        states must not depend on earlier records of up to `longest` tokens.
        """
        ids_1T = torch.tensor([PROBE_IDS], device=self._base.device)
        try:
            whole = self._decoder(input_ids=ids_1T, use_cache=False).last_hidden_state
            with self.skipped([self.alone(PROBE_IDS)], packed=False):
                apart = self._decoder(input_ids=ids_1T, use_cache=False).last_hidden_state
            remembers = self._remembers(longest)
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise _not_apart() from error
        if remembers or not torch.equal(whole, apart):
            raise _not_apart()

    def _remembers(self, longest: int) -> bool:
        """Return whether the frequencies of rotary positions follow the longest text so far."""
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


class HiddenStateCache:
    """The hidden states of records, of one base and its patches: in memory, and in files for later.

    Memory is bounded; the states that come first stay. Files take up to `num_bytes` per shard and hold
    float32, which represents the states of every dtype without loss.
    """

    def __init__(
        self,
        memory_bytes: int = MEMORY_BYTES,
        store: HiddenStateStore | None = None,
        num_bytes: int = 0,
        base: str = "",
        fingerprint: str = "",
    ) -> None:
        """Keep states in memory and, with a store, in files that are named by base and fingerprint."""
        self._left, self._store, self._num_bytes = memory_bytes, store, num_bytes
        self._base, self._fingerprint = base, fingerprint
        self._kept: dict[tuple[int, tuple[int, ...]], Tensor] = {}
        self._num_stored: dict[str, int] = {}  # records in each file

    def _name(self, job: SliceJob, slice_: int, root: str) -> str:
        """Return the name of the file that holds the states of a slice."""
        return states_name(job.shard, slice_, root, job.training, self._base, self._fingerprint)

    def states(self, frozen: FrozenLayers, input_ids: Sequence[int]) -> Tensor:
        """Return the states [T, H] of a record, computing them unless they are kept."""
        found = self._kept.get((frozen.first, tuple(input_ids)))
        if found is None:
            found = frozen.alone(input_ids)
            self._keep(frozen.first, input_ids, found)
        return found

    def _keep(self, first: int, input_ids: Sequence[int], states_TH: Tensor) -> None:
        key = first, tuple(input_ids)
        if states_TH.nbytes <= self._left and key not in self._kept:
            self._left -= states_TH.nbytes
            self._kept[key] = states_TH

    def load(self, job: SliceJob, first: int, rows: TokenizedRows, dtype: torch.dtype) -> None:
        """Read the stored states of a stage's slices."""
        if self._store is None or not first:
            return
        for slice_, root in job.slices:
            name = self._name(job, slice_, root)
            states = self._store.read(name)
            self._num_stored[name] = len(states)
            for stored, tokens in rows:
                found = states.get(stored.id_digest) if stored.slice == slice_ else None
                if found is not None and len(found) == len(tokens.input_ids):
                    self._keep(first, tokens.input_ids, torch.from_numpy(found).to(dtype))

    def save(self, job: SliceJob, first: int, rows: TokenizedRows) -> None:
        """Store the states of a loaded stage, while there is room, in those files that grow by it."""
        if self._store is None or not first:
            return
        for slice_, root in job.slices:
            name, taken = self._name(job, slice_, root), {}
            others = self._store.num_bytes(shard_start(job.shard)) - self._store.num_bytes(name)
            room = self._num_bytes - others
            for stored, tokens in rows:
                states = self._kept.get((first, tuple(tokens.input_ids)))
                if stored.slice != slice_ or states is None:
                    continue
                found = states.float().numpy()
                room -= found.nbytes + HEADER_BYTES
                if room < 0:
                    break
                taken[stored.id_digest] = found
            if len(taken) > self._num_stored[name]:
                self._store.write(name, taken)
