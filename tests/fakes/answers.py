"""A fake of what answers a service's questions."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cluster.serve.app import Question


class FakeAnswers:
    """Answers that repeat the question."""

    async def generate(self, question: Question) -> AsyncIterator[Any]:
        """Yield the words of a text."""
        for word in str(question.prompt).split():
            yield word
