"""The heavy parts of a model (base, tokenizer, embedder), resolved by their first use.

What is resolved must have the digest that the ledger names, or an IntegrityError stops the command.
torch is imported by the properties that need it, not by this module.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sisa.config.config import RunConfig
from sisa.core.digest import digest_of
from sisa.core.domain import Record
from sisa.core.errors import ConfigConflict, IntegrityError
from sisa.core.ports import Embedder, Vectors
from sisa.store.index import Warm

INDEXED = "text-and-asked-v1"  # of a record: its text, and each thing that is asked in it


@dataclass(frozen=True)
class Named:
    """A base or an embedder as the ledger names it."""

    name: str
    digest: str
    dimension: int = 0


class Resources:
    """The heavy parts of one model, resolved on first use and checked against the ledger's names."""

    def __init__(self, config: RunConfig, base: Named | None, embedder: Named | None) -> None:
        self.config = config
        self._base = base
        self._embedder = embedder
        self.warm = Warm()
        self._counted: tuple[tuple[Record, ...], list[int]] | None = None

    @cached_property
    def base(self) -> Any:
        """The base's files (`sisa.lm.base.weights.BaseFiles`)."""
        from sisa.lm.base.weights import resolve_base

        found = resolve_base(self.config.base)
        if self._base is not None:
            check_digest("base model", self._base, found.digest)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        from sisa.lm.base.weights import load_tokenizer

        return load_tokenizer(self.base.directory)

    @cached_property
    def embedder(self) -> Embedder:
        from sisa.lm.answer.embedder import resolve_embedder
        from sisa.lm.answer.names import NameEmbedder

        found = resolve_embedder(self.config.sisa.embedder)
        if self.config.sisa.names:
            found = NameEmbedder(found)
        if self._embedder is not None:
            if self._embedder.digest == found.digest:
                raise ConfigConflict(
                    "the index is of an earlier version, without the vectors of what records ask",
                    where=self._embedder.name,
                    next_step="build it anew: `sisa train RUN.yaml --reconfigure`; nothing is trained",
                )
            check_digest("embedder", self._embedder, indexed_digest(found))
        return found

    @property
    def base_digest(self) -> str:
        """The digest of the base, which need not be resolved where the ledger names it."""
        return self._base.digest if self._base else self.base.digest

    @property
    def dimension(self) -> int:
        return self._embedder.dimension if self._embedder else self.embedder.dimension

    def embed(self, texts: Sequence[str]) -> Vectors:
        return self.embedder.embed(texts)

    def count_tokens(self, records: Sequence[Record]) -> list[int]:
        """Return the number of tokens of each record.

        Raises InvalidInput that lists every record that does not fit.
        """
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
        """Raise InvalidInput if the base can't be trained as the run file says, or queried then."""
        from sisa.lm.answer.base_trial import try_base

        try_base(self.base.directory, self.base.digest, self.config.training())

    def meta(self) -> dict[str, str]:
        """Return what the ledger keeps of these resources."""
        named = {"name": self.config.base_name, "digest": self.base.digest}
        embedder = {
            "name": self.config.sisa.embedder,
            "digest": indexed_digest(self.embedder),
            "dimension": self.embedder.dimension,
        }
        return {
            "config": self.config.to_canonical(),
            "base": json.dumps(named, sort_keys=True),
            "embedder": json.dumps(embedder, sort_keys=True),
        }


def indexed_digest(embedder: Embedder) -> str:
    """Return the name of an index's content: an embedder, and what of a record it embeds."""
    return digest_of([INDEXED, embedder.digest])


def check_digest(what: str, named: Named, found: str) -> None:
    """Raises IntegrityError where what was found is not what the ledger names."""
    if found != named.digest:
        raise IntegrityError(
            f"the {what} is not the one that this model was trained with",
            where=named.name,
            expected=named.digest,
            got=found,
            next_step=f"restore the {what}, or move the model to the new one with "
            "`sisa train RUN.yaml --reconfigure`",
        )
