"""Names of kept hidden states: which file of them belongs to a slice that is held.

Rules: pure. A name says of which slice and of what records in it the states are, and hashes all that
reaches their bits: the base with the patches beneath, the fingerprint, the layers, how a record is cut
to tokens. A slice that lost a record has another root, so that its old file is unknown at once.

Not covered: what is in a file (`store/prefixes.py`); computing states (`lm/train/frozen_prefix.py`).

>>> training = {"lora_layers": "top:1", "sequence_len": 8, "overlength": "refuse"}
>>> name = prefix_name(2, 0, "5e6f", training, "base", "fingerprint")
>>> name.rpartition("-")[0], name == prefix_name(2, 0, "0000", training, "base", "fingerprint")
('shard-00002-slice-00000', False)
>>> keeps_prefixes({**training, "lora_layers": "top:1"}), keeps_prefixes({})
(True, False)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.domain import SliceFile
from sisa.planning.plan import Recipe

PREFIXES_AREA = "prefixes"
REACHING = ("lora_layers", "sequence_len", "overlength")


def keeps_prefixes(training: Mapping[str, Any]) -> bool:
    """Whether jobs with these hyper-parameters have frozen layers below the adapted ones."""
    return "lora_layers" in training


def prefix_name(
    shard: int, slice_: int, root: str, training: Mapping[str, Any], base: str, fingerprint: str
) -> str:
    """The file of a slice whose records have this root."""
    reaching = [root, base, fingerprint, *(training[each] for each in REACHING)]
    return f"{slice_start(shard, slice_)}{digest_of(reaching)}.prefix"


def shard_start(shard: int) -> str:
    """How the names of a shard's files begin."""
    return f"shard-{shard:05d}-"


def slice_start(shard: int, slice_: int) -> str:
    """How the names of a slice's files begin."""
    return f"{shard_start(shard)}slice-{slice_:05d}-"


def prefix_names(slices: Iterable[SliceFile], recipe: Recipe, fingerprint: str) -> frozenset[str]:
    """Names of all files that held slices may have under the present recipe."""
    if not keeps_prefixes(recipe.training):
        return frozenset()
    told = (recipe.training, recipe.base, fingerprint)
    return frozenset(prefix_name(each.shard, each.slice, each.root, *told) for each in slices)
