"""Name the files in which hidden states below the adapted layers are cached.

There is one file for each slice. Its name covers the slice, its records and everything else that affects
the states.

>>> training = {"lora_layers": "top:1", "sequence_len": 8, "overlength": "refuse"}
>>> name = states_name(2, 0, "5e6f", training, "base", "fingerprint")
>>> name.rpartition("-")[0], name == states_name(2, 0, "0000", training, "base", "fingerprint")
('shard-00002-slice-00000', False)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.domain import SliceFile
from sisa.planning.plan import Recipe

STATE_KEYS = ("lora_layers", "sequence_len", "overlength")  # of a job's training: they affect the states


def keeps_hidden_states(training: Mapping[str, Any]) -> bool:
    """Return whether jobs with these hyper-parameters have frozen layers below the adapted ones."""
    return "lora_layers" in training


def states_name(
    shard: int, slice_: int, root: str, training: Mapping[str, Any], base: str, fingerprint: str
) -> str:
    """Return the file name of a slice whose records have this root."""
    content = [root, base, fingerprint, *(training[each] for each in STATE_KEYS)]
    return f"{slice_start(shard, slice_)}{digest_of(content)}.prefix"


def shard_start(shard: int) -> str:
    """Return the beginning of the names of a shard's files."""
    return f"shard-{shard:05d}-"


def slice_start(shard: int, slice_: int) -> str:
    """Return the beginning of the names of a slice's files."""
    return f"{shard_start(shard)}slice-{slice_:05d}-"


def states_names(slices: Iterable[SliceFile], recipe: Recipe, fingerprint: str) -> frozenset[str]:
    """Return the names of all files that held slices may have under the present recipe."""
    if not keeps_hidden_states(recipe.training):
        return frozenset()
    shared = (recipe.training, recipe.base, fingerprint)
    return frozenset(states_name(each.shard, each.slice, each.root, *shared) for each in slices)
