"""The generic labels of WHP: what to say instead at each position of a text to forget.

    reinforced model   a copy that has learnt the forget set by heart (`methods/distillation/whp.py`)
    translated text    the text with each name replaced by an invented one
    label              `generic_label` of the base on the translated text and the reinforced model on the
                       text itself

Positions of both texts are aligned by characters. A token has no label where the two tokenizations
differ, inside a name, and where a name stands that stood before: there the base would teach the
invented name. For the same reason the first token of an invented name is barred as a label once the
name has occurred. Names are recognised by their capitals (`invented_names.py`); of a text without
names nothing is replaced, and reinforcement alone makes the difference.

Nothing is stored: the same base, records and settings give the same labels on one machine. Source:
Eldan and Russinovich 2023, section 2.2 on consistency, which lowers the logits of names that occurred.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from approx.evaluation.answers import collate, logits_at
from approx.unlearning.examples import token_starts
from approx.unlearning.written.invented_names import invented_names, name_pattern, replace_names
from sisa.core.domain import Part, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base.tokens import NO_LOSS, Tokens, tokenize


def generic_label(
    baseline_V: Tensor, reinforced_V: Tensor, alpha: float, barred: Collection[int] = ()
) -> int:
    """Return the likeliest word of the generic logits that is not barred.

    >>> baseline, reinforced = torch.tensor([3.0, 2.5, 0.0]), torch.tensor([4.0, 2.0, 0.0])
    >>> [generic_label(baseline, reinforced, alpha) for alpha in (0.25, 1.0)]
    [0, 1]
    """
    generic_V = baseline_V - alpha * (reinforced_V - baseline_V).relu()
    generic_V[list(barred)] = -torch.inf
    return int(generic_V.argmax())


class Labelled(NamedTuple):
    """The labels of each forget example, and how many tokens were run to find them."""

    examples: list[Tokens]
    num_tokens: int


def write_generic_labels(
    base: Any,
    reinforced: Any,
    tokenizer: Any,
    forget: Sequence[Record],
    tokens: Sequence[Tokens],
    alpha: float,
) -> Labelled:
    """Return each forget example with generic labels.

    Raise InvalidInput with every example whose labels are its own answer, or where names can't be
    replaced.
    """
    made, problems, num_tokens = [], [], 0
    for number, (record, each) in enumerate(zip(forget, tokens, strict=True), 1):
        names = invented_names(record, 0)
        other = tokenize(_translated(record, names), tokenizer, train_on_inputs=False)
        places = align(each.input_ids, other.input_ids, names, tokenizer)
        if places is None:
            problems.append(Problem(f"forget example {number}", "its names can't be replaced"))
            continue
        pair = _logits_TV(base, other.input_ids), _logits_TV(reinforced, each.input_ids)
        num_tokens += len(other.input_ids) + len(each.input_ids)
        made.append(_labelled(each, places, pair, alpha))
        if made[-1] == each:
            problems.append(Problem(f"forget example {number}", "its labels are the answer to forget"))
    if problems:
        raise InvalidInput(
            "no generic labels can be made",
            where="forget",
            next_step="raise alpha or the number of steps, or use another method",
            problems=problems,
        )
    return Labelled(made, num_tokens)


def _translated(record: Record, names: Mapping[str, str]) -> Record:
    parts = tuple(Part(each.role, replace_names(each.text, names)) for each in record.parts)
    return replace(record, parts=parts)


def _logits_TV(model: Any, ids: Sequence[int]) -> Tensor:
    batch = collate([Tokens(list(ids), list(ids))])
    with torch.no_grad():
        found = logits_at(model, batch.ids_BT1, torch.arange(len(ids)))
    return found[0].float()


class Place(NamedTuple):
    """The position in a translated text of a token's counterpart, and the labels barred there."""

    position: int
    barred: frozenset[int]


def align(
    ids: Sequence[int], other_ids: Sequence[int], names: Mapping[str, str], tokenizer: Any
) -> dict[int, Place] | None:
    """Return, by position in a text, where its translation has the same token, for all that may count.

    Return None if the translation is not the text with each name replaced.
    """
    (text, starts), (other, other_starts) = (token_starts(each, tokenizer) for each in (ids, other_ids))
    wanted = replace_names(text, names)
    if not (wanted.startswith(other) or other.startswith(wanted)):  # either may be cut
        return None
    positions = {start: at for at, start in enumerate(other_starts)}
    spans = [match.span() for match in name_pattern(names).finditer(text)] if names else []
    found: dict[int, Place] = {}
    used: set[str] = set()
    barred: set[int] = set()
    for at, (start, end) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
        longer = sum(len(names[text[i:j]]) - (j - i) for i, j in spans if j <= start)
        place = positions.get(start + longer)
        touched = next((span for span in spans if span[0] < end and start < span[1]), None)
        if touched is not None and start > touched[0]:
            continue  # inside a name
        name = None if touched is None else text[slice(*touched)]
        if place is not None and name not in used:
            found[at] = Place(place, frozenset(barred))
        if name is not None:
            used.add(name)
            if place is not None:
                barred.add(other_ids[place])
    return found


def _labelled(
    tokens: Tokens, places: Mapping[int, Place], logits: tuple[Tensor, Tensor], alpha: float
) -> Tokens:
    baseline_TV, reinforced_TV = logits
    labels = [NO_LOSS] * len(tokens.labels)
    for at, label in enumerate(tokens.labels):
        if at == 0 or label == NO_LOSS or at not in places or places[at].position == 0:
            continue
        position, barred = places[at]
        labels[at] = generic_label(baseline_TV[position - 1], reinforced_TV[at - 1], alpha, barred)
    return Tokens(tokens.input_ids, labels)
