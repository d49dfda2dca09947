"""Tokens of a record, and which of them belong to the answer.

    text         the text and an end token; all of them bear loss
    completion   prompt and completion, tokenized separately and joined, and an end token; the completion
                 and the end token bear loss
    chat         the tokenizer's own template; each assistant turn's text bears loss, with the control
                 token that ends it but without a line break that the template puts after that token

If the tokenizer uses a beginning token, the record starts with one. Control strings inside a record
("<|im_end|>") are tokenized as plain text, so a record can't forge a turn or an end. A record longer
than `sequence_len` is a problem (`refuse`) or keeps its first tokens (`truncate`). Problems name
positions, never text. Tools and images in chats are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from sisa.core.domain import Kind, Part, Record
from sisa.core.errors import InvalidInput, Problem

NO_LOSS = -100
Overlength = Literal["refuse", "truncate"]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of one record; `labels` are the same ids, or NO_LOSS where a token bears no loss."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_labels(self) -> int:
        """Return the number of tokens that bear loss; the first token is never predicted."""
        return sum(label != NO_LOSS for label in self.labels[1:])


class Untokenizable(ValueError):
    """A record that the tokenizer or its chat template can't encode; the message holds no text."""


def tokenize(record: Record, tokenizer: Any, *, train_on_inputs: bool) -> Tokens:
    """Return a record's tokens at full length. Raise Untokenizable."""
    ids, labels = (_chat if record.kind == "chat" else _parts)(record, tokenizer)
    return Tokens(ids, list(ids) if train_on_inputs else labels)


def tokenize_all(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    sequence_len: int,
    overlength: Overlength,
    train_on_inputs: bool,
    positions: Sequence[str] | None = None,
) -> list[Tokens]:
    """Return the tokens of all records, truncated if `overlength` allows it.

    `positions` name the records in problems. Raise InvalidInput with every record that is too long,
    can't be tokenized or bears no loss.
    """
    tokens: list[Tokens] = []
    problems: list[Problem] = []
    for number, record in enumerate(records):
        try:
            each = tokenize(record, tokenizer, train_on_inputs=train_on_inputs)
            tokens.append(_fit(each, sequence_len, overlength))
        except Untokenizable as error:
            where = positions[number] if positions else f"record {number + 1}"
            problems.append(Problem(where, str(error)))
    if problems:
        raise InvalidInput(
            f"{len(problems)} records can't be trained on",
            expected=f"at most {sequence_len} tokens each, some of them with loss",
            next_step="shorten or remove them, raise sequence_len, or set overlength: truncate",
            problems=problems,
        )
    return tokens


def _fit(tokens: Tokens, sequence_len: int, overlength: Overlength) -> Tokens:
    length = len(tokens.input_ids)
    if length > sequence_len:
        if overlength == "refuse":
            raise Untokenizable(f"{length} tokens, more than sequence_len {sequence_len}")
        tokens = Tokens(tokens.input_ids[:sequence_len], tokens.labels[:sequence_len])
    if not tokens.num_labels:
        raise Untokenizable(
            "nothing bears loss within sequence_len" if length > sequence_len else "nothing bears loss"
        )
    return tokens


def encode_plain(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text alone: nothing added, control strings as plain text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids


def encode_prompt(prompt: str | Sequence[Part], tokenizer: Any, kind: Kind) -> list[int]:
    """Return the ids to generate from.

    They are the raw prompt or, for a conversation and for kind `chat`, the templated turns (a single
    prompt is the user's) and the opening of the assistant's turn. Raise InvalidInput if the prompt is
    empty or the template rejects it.
    """
    turns = [Part("user", prompt)] if isinstance(prompt, str) else prompt
    try:
        if kind == "chat" or not isinstance(prompt, str):
            return _render(turns, tokenizer, opened=True)
        ids = _beginning(tokenizer) + encode_plain(prompt, tokenizer)
    except Untokenizable as error:
        raise InvalidInput(
            str(error), where="prompt", next_step="use a base model with a chat template"
        ) from error
    if not ids:
        raise InvalidInput("the prompt is empty", where="prompt", next_step="give a prompt")
    return ids


def _beginning(tokenizer: Any) -> list[int]:
    probe: list[int] = tokenizer("a")["input_ids"]
    return probe[:1] if probe and probe[0] == tokenizer.bos_token_id else []


def _parts(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    if tokenizer.eos_token_id is None:
        raise Untokenizable("the tokenizer has no end token to close a record with")
    ids = _beginning(tokenizer)
    labels = list(ids) if record.kind == "text" else [NO_LOSS] * len(ids)
    for part in record.parts:
        part_ids = encode_plain(part.text, tokenizer)
        ids += part_ids
        labels += [NO_LOSS] * len(part_ids) if part.role == "prompt" else part_ids
    return [*ids, tokenizer.eos_token_id], [*labels, tokenizer.eos_token_id]


def _chat(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    turns = record.parts
    ids = _render(turns, tokenizer, opened=False)
    labels = [NO_LOSS] * len(ids)
    for number, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = _render(turns[:number], tokenizer, opened=True)
        after = _render(turns[: number + 1], tokenizer, opened=False)
        if after[: len(before)] != before or ids[: len(after)] != after:
            raise Untokenizable(
                f"message {number + 1}: the chat template rewrites earlier turns, "
                "so the assistant's tokens can't be told apart"
            )
        answer = _to_end(after[len(before) :], tokenizer)
        labels[len(before) : len(before) + len(answer)] = answer
    return ids, labels


def _to_end(turn: list[int], tokenizer: Any) -> list[int]:
    """Return a turn up to the control token that ends it, or all of it if none does."""
    for end in range(len(turn), 0, -1):
        token = turn[end - 1]
        if tokenizer.decode([token]) and not tokenizer.decode([token], skip_special_tokens=True):
            return turn[:end]
        if not _is_blank(token, tokenizer):
            return turn
    return turn


def _is_blank(token: int, tokenizer: Any) -> bool:
    return not tokenizer.decode([token], skip_special_tokens=True).strip()


def spans(tokens: Tokens) -> list[range]:
    """Return the positions of each answer; a record's first token is never predicted, so in none.

    >>> spans(Tokens([5, 6, 7, 8], [5, 6, NO_LOSS, 8]))
    [range(1, 2), range(3, 4)]
    """
    labels = tokens.labels
    runs = groupby(range(1, len(labels)), lambda at: labels[at] == NO_LOSS)
    held = [list(run) for no_loss, run in runs if not no_loss]
    return [range(run[0], run[-1] + 1) for run in held]


def without_closing(tokens: Tokens, tokenizer: Any) -> Tokens:
    """Return tokens without loss on each answer's trailing end token and white space.

    At least one token of each answer keeps its loss.
    """
    labels = list(tokens.labels)
    for span in spans(tokens):
        at = span.stop - 1
        while at > span.start and _is_blank(labels[at], tokenizer):
            labels[at] = NO_LOSS
            at -= 1
    return Tokens(tokens.input_ids, labels)


def answers(tokens: Tokens, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return, for each answer, the ids before it and its own ids without what closes it."""
    return [
        (tokens.input_ids[: span.start], tokens.input_ids[span.start : span.stop])
        for span in spans(without_closing(tokens, tokenizer))
    ]


def _render(turns: Sequence[Part], tokenizer: Any, *, opened: bool) -> list[int]:
    from jinja2.exceptions import TemplateError

    if not turns:
        raise Untokenizable("the chat opens with the assistant's turn")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns],
            add_generation_prompt=opened,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )
    except TemplateError as error:  # the template's author wrote its message, but it may quote the chat
        raise Untokenizable("the chat template rejects these turns") from error
    except (ValueError, NotImplementedError) as error:
        raise Untokenizable(
            "the tokenizer has no chat template, or can't keep control strings in the text apart"
        ) from error
    return ids


def form_alone(tokenizer: Any) -> Literal["chat"] | None:
    """Return "chat" if the base has a chat template: asked alone, it may end other prompts at once."""
    return "chat" if tokenizer.chat_template else None


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end an answer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(end for end in [*ends, tokenizer.eos_token_id] if end is not None)
