"""A fake of what answers a service's questions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from cluster.serve.domain import AnswerEvent, AnswerToken, Ended, Piece, Question, Started
from sisa.core.errors import InvalidInput


@dataclass
class FakeAnswers:
    """Answers that repeat the words of a question, as many as it allows, from shard 1.

    `cut_after` pieces an answer begins again from shard 2, once, or fails with `error`.
    """

    asked: list[Question] = field(default_factory=list)
    cut_after: int | None = None
    error: Exception | None = None
    closed: int = 0

    async def answer(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, AnswerEvent]]:
        """Answer one question after the other."""
        self.asked += questions
        if any(not words_of(each) for each in questions):
            raise InvalidInput("nothing is asked")
        try:
            for number, question in enumerate(questions):
                for event in self._events(question):
                    yield number, event
        finally:
            self.closed += 1

    def _events(self, question: Question) -> list[AnswerEvent]:
        words = words_of(question)
        most = len(words) if question.max_new_tokens is None else question.max_new_tokens
        pieces: list[AnswerEvent] = [_piece(each, question) for each in words[:most]]
        start: list[AnswerEvent] = [Started(() if question.base_only else (1,), len(words))]
        if self.cut_after is not None:
            if self.error is not None:
                raise self.error
            start = [*start, *pieces[: self.cut_after], Started((2,), len(words))]
        ended = Ended("length" if most < len(words) else "stop", len(pieces))
        return [*start, *pieces, ended]


def words_of(question: Question) -> list[str]:
    """Return the words of what is asked last."""
    asked = question.prompt
    content = asked if isinstance(asked, str) else asked[-1]["content"]
    return [f"{each} " for each in str(content).split()]


def _piece(word: str, question: Question) -> Piece:
    if question.logprobs is None:
        return Piece(word)
    top = tuple((f"other{n}", -2.0 - n) for n in range(question.logprobs))
    return Piece(word, (AnswerToken(word, -0.5, top),))
