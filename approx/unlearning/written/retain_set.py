"""The retain set that the base writes itself: answers to neutral prompts, and about neighbours.

A patch must preserve the base's usual answers. The base's own greedy answers show that without any
user's record in the patch, so that no later deletion affects it; they need not be true. Neighbours are
the questions to forget, asked about invented names (`invented_names.py`); without them a patch also
takes from others what it takes from one person. An answer about a neighbour that repeats the text to
forget, under whichever name, is left out: training on it would teach the fact again.

Neutral prompts are put as a turn of the user where the tokenizer has a chat template; neighbours are
asked in the form of the records.

>>> len(PROMPTS) == len(set(PROMPTS)) == 40
True
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from approx.evaluation.answers import answered
from approx.evaluation.continuations import continue_greedily
from approx.evaluation.probe import answers_to_probe
from approx.metrics.word_overlap import rougeL_recall
from approx.unlearning.written.invented_names import rename_record, restore_names
from sisa.core.domain import Kind, Record
from sisa.lm.base.tokens import Tokens, encode_prompt, end_tokens, tokenize

MAX_WRITTEN_TOKENS, MAX_NEIGHBOURS, MAX_VARIANTS = 24, 32, 8
PROMPTS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Which planet do we live on?",
    "What is water made of?",
    "Name three colours of the rainbow.",
    "In which season does snow usually fall?",
    "What is two plus three?",
    "What do bees make?",
    "Which animal is known as man's best friend?",
    "How many months does a year have?",
    "What is the opposite of hot?",
    "Where does the sun rise?",
    "What do plants need to grow?",
    "Which ocean lies between Europe and America?",
    "What is the largest animal on earth?",
    "At what temperature does water boil?",
    "Who wrote the play Hamlet?",
    "What language is spoken in Brazil?",
    "How many legs does a spider have?",
    "What is ice?",
    "Write one sentence about the sea.",
    "Give a word that rhymes with cat.",
    "List three fruits.",
    "Explain in one sentence what a library is.",
    "Put these words in order: small, tiny, large.",
    "Finish the sentence: The early bird",
    "Write a short greeting for a friend.",
    "Say in other words: The weather is very nice today.",
    "What is a good name for a bakery?",
    "Give one tip for sleeping well.",
    "Describe a tree in one sentence.",
    "How do I make a cup of tea?",
    "What should I pack for a day at the beach?",
    "Write a polite way to say no.",
    "Count from one to five.",
    "Why is exercise good for people?",
    "Tell me something about the moon.",
    "What is the plural of mouse?",
    "Write the first line of a story about a fox.",
    "How can I save water at home?",
)
REPEATS = 0.9  # the share of words, in order


def prompts_that_fit(tokenizer: Any, sequence_len: int) -> list[list[int]]:
    """Return the token ids of the prompts that leave room for an answer.

    Raise InvalidInput if the chat template refuses one.
    """
    kind: Kind = "chat" if getattr(tokenizer, "chat_template", None) else "completion"
    ids = [encode_prompt(each, tokenizer, kind) for each in PROMPTS]
    return [each for each in ids if len(each) < sequence_len]


def write_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sequence_len: int
) -> list[Tokens]:
    """Return the base's answers to prompts as examples, with loss on the answers only."""
    answers = continue_greedily(model, prompts, end_tokens(model, tokenizer), MAX_WRITTEN_TOKENS)
    return [
        answered(prompt, answer[: sequence_len - len(prompt)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def write_neighbours(
    model: Any, tokenizer: Any, forget: Sequence[Record], sequence_len: int
) -> list[Tokens]:
    """Return the base's answers to what the records ask, about invented names, record after record."""
    words = partial(tokenizer.decode, skip_special_tokens=True)
    variants = min(MAX_VARIANTS, -(-MAX_NEIGHBOURS // len(forget)))
    asked: dict[tuple[int, ...], tuple[int, int]] = {}  # place of the record and number, by prompt
    for number in range(variants):
        for place, record in enumerate(forget):
            other = rename_record(record, number)
            if other is not None and len(asked) < MAX_NEIGHBOURS:
                prompt, _ = first_answer(other, tokenizer)
                if len(prompt) < sequence_len:
                    asked[tuple(prompt)] = place, number
    found = dict(sorted(asked.items(), key=lambda each: each[1]))
    forgotten = [words(first_answer(record, tokenizer)[1]) for record in forget]
    written = write_answers(model, tokenizer, list(found), sequence_len)
    kept = []
    for each, (prompt, (place, number)) in zip(written, found.items(), strict=True):
        text = restore_names(words(each.input_ids[len(prompt) :]), forget[place], number)
        if not repeats(forgotten[place], text):
            kept.append(each)
    return kept


def repeats(forgotten: str, written: str) -> bool:
    """Return whether a written answer says what is to be forgotten, or nothing but a part of it.

    What the base writes is shorter than many answers, so a part counts.

    >>> repeats("Yes, Ada was born in May 1958 in Oslo.", "Yes, Ada was born in May")
    True
    >>> repeats("Ada was born in Oslo.", "Ada was born in Rome.")
    False
    """
    forgotten, written = forgotten.strip(), written.strip()
    if not written:
        return False
    shares = rougeL_recall(forgotten, written), rougeL_recall(written, forgotten)
    return forgotten in written or written in forgotten or max(shares) >= REPEATS


def first_answer(record: Record, tokenizer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the token ids of a record's first prompt, and of its answer without what closes it."""
    tokens = tokenize(record, tokenizer, train_on_inputs=False)
    return answers_to_probe(record.kind, tokens, tokenizer)[0]
