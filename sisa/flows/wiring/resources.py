"""Resolve the base and the embedder of a model on first use, and check them against the ledger's names.

What needs torch imports it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sisa.config.config import RunConfig
from sisa.core import ports
from sisa.core.digest import digest_of
from sisa.core.domain import BaseFiles, Record
from sisa.core.errors import ConfigConflict, IntegrityError
from sisa.store.index import IndexCache

INDEXED = "text-and-asked-v1"  # the embedded parts of a record: its text, and each prompt in it


@dataclass(frozen=True)
class Named:
    """A base or an embedder, as the ledger names it."""

    name: str
    digest: str
    dimension: int = 0


class Resources:
    """The heavy parts of one model, resolved on first use and checked against the ledger's names."""

    def __init__(self, config: RunConfig, base: Named | None, embedder: Named | None) -> None:
        self.config = config
        self._base = base
        self._embedder = embedder
        self.index_cache = IndexCache()
        self._counted: tuple[tuple[Record, ...], list[int]] | None = None  # the last `count_tokens`

    @cached_property
    def base(self) -> BaseFiles:
        from sisa.lm.base.weights import resolve_base

        found = resolve_base(self.config.base)
        if self._base is not None:
            check_digest("base model", self._base, found.digest)
        return found

    def refuse_changed_base(self) -> None:
        """Raise IntegrityError, before anything is erased, if the base is not the recorded one."""
        _ = self.base

    @cached_property
    def tokenizer(self) -> Any:
        from sisa.lm.base.weights import load_tokenizer

        return load_tokenizer(self.base.directory)

    @cached_property
    def embedder(self) -> ports.Embedder:
        from sisa.lm.routing.embedder import resolve_embedder
        from sisa.lm.routing.names import NameEmbedder

        found = resolve_embedder(self.config.sisa.embedder)
        if self.config.sisa.names:
            found = NameEmbedder(found)
        if self._embedder is not None:
            if self._embedder.digest == found.digest:
                raise ConfigConflict(
                    "the index is of an earlier version, without the vectors of what records ask",
                    where=self._embedder.name,
                    next_step="build it again: `sisa train RUN.yaml --reconfigure`; nothing is trained",
                )
            check_digest("embedder", self._embedder, indexed_digest(found))
        return found

    @property
    def base_digest(self) -> str:
        """Return the digest of the base, without resolving the base if the ledger names the digest."""
        return self._base.digest if self._base else self.base.digest

    @property
    def dimension(self) -> int:
        return self._embedder.dimension if self._embedder else self.embedder.dimension

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        """Return the tokens of each record. Raise InvalidInput with every record that does not fit."""
        from sisa.lm.base.tokens import tokenize_all
        from sisa.lm.base.weights import untrusted

        asked = tuple(records)
        if self._counted is None or self._counted[0] != asked:
            tokenizer, directory = self.tokenizer, self.base.directory
            with untrusted("the base model's tokenizer can't be used", directory, quotes_texts=True):
                tokens = tokenize_all(
                    asked,
                    tokenizer,
                    sequence_len=self.config.sequence_len,
                    overlength=self.config.overlength,
                    train_on_inputs=self.config.train_on_inputs,
                )
            self._counted = (asked, [len(each.input_ids) for each in tokens])
        return self._counted[1]

    def check_base(self) -> None:
        """Raise InvalidInput if the base can't be trained as the run file says, or answer afterwards."""
        from sisa.lm.answer.base_trial import try_base

        try_base(self.base, self.config.training())

    def meta(self) -> dict[str, str]:
        """Return what the ledger stores about these resources."""
        base = {"name": self.config.base_name, "digest": self.base.digest}
        embedder = Named(
            self.config.sisa.embedder, indexed_digest(self.embedder), self.embedder.dimension
        )
        return {
            "config": self.config.to_canonical(),
            "base": json.dumps(base, sort_keys=True),
            "embedder": json.dumps(asdict(embedder), sort_keys=True),
        }


def indexed_digest(embedder: ports.Embedder) -> str:
    """Return the digest of what an index embeds: the embedder and the embedded parts of a record."""
    return digest_of([INDEXED, embedder.digest])


def check_digest(what: str, named: Named, found: str) -> None:
    """Raise IntegrityError if the found part is not the one that the ledger names."""
    if found != named.digest:
        raise IntegrityError(
            f"the {what} is not the one that this model was trained with",
            where=named.name,
            expected=named.digest,
            got=found,
            next_step=f"restore the {what}, or move the model to the new one with "
            "`sisa train RUN.yaml --reconfigure`",
        )
