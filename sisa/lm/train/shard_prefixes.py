"""Hidden states that a model keeps for later stages, orders and retraining: read before, written after.

Rules: float32 holds the states of every dtype without loss, so states that were kept are those that
would be computed. A shard's files are bounded together: states are taken slice by slice while there is
room. Nothing is written that a file holds already.

Not covered: files (`store/prefixes.py`); which of them the ledger knows
(`sisa/planning/plan.py`).

    kept = Kept(store, num_bytes=1 << 20, base=name, fingerprint=fingerprint(1))
    held = kept.read(job, first, rows, prefixes)     # rows: (record, its tokens)
    kept.write(job, first, rows, prefixes, held)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sisa.core.domain import SliceJob
from sisa.core.ports import PrefixStore, StoredRecord
from sisa.lm.base.tokens import Tokens
from sisa.lm.train.frozen_prefix import Prefixes
from sisa.planning.plan import prefix_name, shard_start

TokenizedRows = Sequence[tuple[StoredRecord, Tokens]]
HEADER_BYTES = 256  # more than a record takes in a file beside its states


@dataclass(frozen=True, slots=True)
class ShardPrefixes:
    """A store with what bounds and names the files of one shard in it."""

    store: PrefixStore
    num_bytes: int
    base: str
    fingerprint: str

    def _name(self, job: SliceJob, slice_: int, root: str) -> str:
        return prefix_name(job.shard, slice_, root, job.training, self.base, self.fingerprint)

    def read(
        self, job: SliceJob, first: int, rows: TokenizedRows, dtype: torch.dtype, into: Prefixes
    ) -> dict[str, int]:
        """Give a stage what is kept of its slices; of how many records each of their files tells."""
        held: dict[str, int] = {}
        for slice_, root in job.slices:
            name = self._name(job, slice_, root)
            states = self.store.read(name)
            held[name] = len(states)
            for stored, tokens in rows:
                found = states.get(stored.id_digest) if stored.slice == slice_ else None
                if found is not None and len(found) == len(tokens.input_ids):
                    into.keep(first, tuple(tokens.input_ids), torch.from_numpy(found).to(dtype))
        return held

    def write(
        self, job: SliceJob, first: int, rows: TokenizedRows, prefixes: Prefixes, held: dict[str, int]
    ) -> None:
        """Keep what a stage computed, as far as there is room."""
        for slice_, root in job.slices:
            name = self._name(job, slice_, root)
            start = shard_start(job.shard)
            room = self.num_bytes - self.store.num_bytes(start) + self.store.num_bytes(name)
            taken = {}
            for stored, tokens in rows:
                states = prefixes.kept(first, tuple(tokens.input_ids))
                if stored.slice != slice_ or states is None:
                    continue
                found = states.float().numpy()
                room -= found.nbytes + HEADER_BYTES
                if room < 0:
                    break
                taken[stored.id_digest] = found
            if len(taken) > held[name]:
                self.store.write(name, taken)
