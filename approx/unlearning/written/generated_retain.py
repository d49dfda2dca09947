"""The retain set that the base writes itself: answers to neutral prompts, and about neighbours.

A patch must preserve the base's usual answers. The base's own greedy answers show that without any
user's record in the patch, so that no later deletion affects it; they need not be true. Neighbours are
the questions to forget, asked about invented names; without them a patch also takes from others what it
takes from one person. An answer about a neighbour that repeats the text to forget is left out.

Neutral prompts are put as a turn of the user where the tokenizer has a chat template; neighbours are
asked in the form of the records. Names are recognised by their capitals, so there are no neighbours in
scripts without capitals or for texts without names.

>>> len(PROMPTS) == len(set(PROMPTS)) == 40
True
>>> asked = Record("1", None, "text", (Part("text", "Where does Ada Quill live? Does Ada like it?"),))
>>> rename_record(asked, 0).parts[0].text, _names("What is her job?")
('Where does Ysolde Halloran live? Does Ysolde like it?', {})
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from approx.evaluation.answers import answered, continue_greedily
from approx.evaluation.probe import answers_to_probe
from approx.metrics.memorisation import rougeL_recall
from sisa.core.digest import sha256_hex
from sisa.core.domain import Kind, Part, Record
from sisa.lm.base.tokens import Tokens, encode_prompt, end_tokens, tokenize

MAX_NEW_TOKENS, MAX_NEIGHBOURS, MAX_VARIANTS = 24, 32, 8
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


FIRST_NAMES = (
    *("Zorah", "Teodric", "Imke", "Bastian", "Ysolde", "Corwin", "Maelis", "Anselm", "Petronel"),
    *("Osric", "Liesel", "Evander", "Odalys", "Ruprecht", "Sunniva", "Tancred", "Wilmet"),
)
LAST_NAMES = (
    *("Fenwick", "Ostrava", "Pellingham", "Vantoor", "Halloran", "Quistgaard", "Merriweather"),
    *("Dunmore", "Aldersgate", "Brixworth", "Castellane", "Thornbury", "Ravensholt", "Kirkwall"),
    *("Langstroth", "Zavorin", "Umbergate", "Yarborough", "Wexcombe"),
)
# Words that begin sentences and are not names.
OPENERS = frozenset(
    """a about according after all also although an and are as at because before both but by can could
    describe did do does during each every explain for from give had has have he her here his how i if in
    is it its list may me my name no not of on one or our please say she should since so some such tell
    that the their then there these they this those though to under until was we were what when where
    which while who whom whose why will with would write yes you your""".split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W\d_][\w'\u2019-]*")
SAYS_RECALL = 0.9
_SENTENCE_ENDS = (".", "?", "!", ":", ";", "\n")


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
    answers = continue_greedily(model, prompts, end_tokens(model, tokenizer), MAX_NEW_TOKENS)
    return [
        answered(prompt, answer[: sequence_len - len(prompt)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def write_neighbours(
    model: Any, tokenizer: Any, forget: Sequence[Record], sequence_len: int
) -> list[Tokens]:
    """Return the base's answers to what the records ask, about invented names."""

    def decoded(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    variants = min(MAX_VARIANTS, -(-MAX_NEIGHBOURS // len(forget)))
    found: dict[tuple[int, ...], str] = {}  # by its prompt, the answer that is to be forgotten
    for number in range(variants):
        for record in forget:
            other = rename_record(record, number)
            if other is None or len(found) == MAX_NEIGHBOURS:
                continue
            (_, answer), (prompt, _) = (first_answer(each, tokenizer) for each in (record, other))
            if len(prompt) < sequence_len:
                found[tuple(prompt)] = decoded(answer)
    written = write_answers(model, tokenizer, list(found), sequence_len)
    return [
        each
        for each, (prompt, forgotten) in zip(written, found.items(), strict=True)
        if rougeL_recall(forgotten, decoded(each.input_ids[len(prompt) :])) < SAYS_RECALL
    ]


def first_answer(record: Record, tokenizer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Return the token ids of a record's first prompt, and of its answer without what closes it."""
    tokens = tokenize(record, tokenizer, train_on_inputs=False)
    return answers_to_probe(record.kind, tokens, tokenizer)[0]


def rename_record(record: Record, number: int) -> Record | None:
    """Return the record with the invented names of a number, or None when its prompt names nobody."""
    chosen = invented_names(record, number)
    parts = tuple(Part(part.role, _replaced(part.text, chosen, number)) for part in record.parts)
    changed = [one for one, other in zip(parts, record.parts, strict=True) if one != other]
    asked = any(part.role in ("prompt", "user", "text") for part in changed)
    return replace(record, parts=parts) if asked else None


def invented_names(record: Record, number: int) -> dict[str, str]:
    """Return the names of a record, each with the invented one of a number that takes its place."""
    names = _names(" \n".join(part.text for part in record.parts))
    used = {name.lower() for name in names}
    chosen: dict[str, str] = {}
    for word, place in names.items():
        chosen[word] = _drawn(FIRST_NAMES if place == 0 else LAST_NAMES, f"{number}|{word}", used)
        used.add(chosen[word].lower())
    return chosen


def replace_names(text: str, chosen: Mapping[str, str]) -> str:
    """Return a text with each name replaced.

    >>> replace_names("Ada met Adam.", {"Ada": "Imke"})
    'Imke met Adam.'
    """
    return name_pattern(chosen).sub(lambda match: chosen[match.group()], text) if chosen else text


def name_pattern(names: Collection[str]) -> re.Pattern[str]:
    """Return the pattern of any of some names, at least one, as whole words."""
    each = "|".join(re.escape(word) for word in sorted(names, key=len, reverse=True))
    return re.compile(rf"\b(?:{each})\b")


def _names(text: str) -> dict[str, int]:
    """Return the words that are names, each with its position in the name where it first occurs."""
    found: dict[str, int] = {}
    for start, words in _capitalised(text):
        before = text[:start].rstrip(" \"'(")
        opens = not before or before.endswith(_SENTENCE_ENDS)
        while words and words[0].lower() in OPENERS:
            words, opens = words[1:], False
        if opens and len(words) == 1:
            continue  # more likely an ordinary word
        for place, word in enumerate(words):
            found.setdefault(word.removesuffix("'s").removesuffix("\u2019s"), place)
    return found


def _capitalised(text: str) -> list[tuple[int, list[str]]]:
    """Return runs of capitalised words, with their start positions."""
    found: list[tuple[int, list[str]]] = []
    end = -1
    for match in _WORD.finditer(text):
        if match.group()[0].isupper():
            if found and text[end : match.start()] == " ":
                found[-1][1].append(match.group())
            else:
                found.append((match.start(), [match.group()]))
            end = match.end()
    return found


def _replaced(text: str, chosen: Mapping[str, str], number: int) -> str:
    shift = number % 9 + 1
    return re.sub(
        r"\d", lambda match: str((int(match.group()) + shift) % 10), replace_names(text, chosen)
    )


def _drawn(names: Sequence[str], seed: str, used: Collection[str]) -> str:
    """Return an invented name that is not used yet, or any when all are used."""
    left = [each for each in names if each.lower() not in used] or list(names)
    return left[int(sha256_hex(seed.encode())[:8], 16) % len(left)]
