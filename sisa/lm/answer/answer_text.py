"""The text of an answer that grows token by token, and ends before the first of its stop texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

REPLACED = "\ufffd"  # stands for bytes that are no character, or not yet one


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer, its log-probability in the combined distribution, and the likeliest ones."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Text:
    """The text of an answer that grows token by token, and how much of it is out.

    >>> text = Text(lambda ids: bytes(ids).decode(), stop=["END"])
    >>> for letter in b"12 EN.":
    ...     text.add(Token(letter, 0.0))
    ...     text.put_out(final=False)[0]
    '1'
    '2'
    ' '
    ''
    ''
    'EN.'
    """

    def __init__(self, decode: Callable[[Any], str], stop: Sequence[str]) -> None:
        self._decode, self._stop = decode, stop
        self.tokens: list[Token] = []
        self._starts: list[int] = []  # where each token begins in the text
        self._text, self._num_out, self._out = "", 0, 0

    def add(self, token: Token) -> None:
        """Append a token."""
        self._starts.append(len(self._text))
        self.tokens.append(token)

    def put_out(self, *, final: bool) -> tuple[str, tuple[Token, ...], bool]:
        """Return text and tokens that are not out yet, and whether a stop text was reached."""
        self._text = self._decode([each.id for each in self.tokens])
        if not final:
            self._text = self._text.rstrip(REPLACED)
        stops = [at for each in self._stop if (at := self._text.find(each, self._out)) >= 0]
        end = min(stops, default=len(self._text) - (0 if final else self._undecided()))
        ready = [start < end or (final and not stops) for start in self._starts[self._num_out :]]
        tokens = self.tokens[self._num_out : self._num_out + sum(ready)]
        text, self._out = self._text[self._out : end], end
        self._num_out += len(tokens)
        return text, tuple(tokens), bool(stops)

    def _undecided(self) -> int:
        """Return how many characters at the end may begin a stop text."""
        sizes = [
            size
            for each in self._stop
            for size in range(1, len(each))
            if self._text.endswith(each[:size], self._out)
        ]
        return max(sizes, default=0)
