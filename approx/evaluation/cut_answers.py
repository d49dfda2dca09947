"""Answers that are cut after some of their tokens and continued by a model, with the scores of both.

All answers and all continuations of them are one tree of tokens that grows (`answer_tree`); a model
reads each token once:

    prompt a b c d e        the answer, read in one forward
           a b x y z        cut after a: the model's choice is b, then x: it departs from the answer
                 ^ ^        what is left to decode, to the answer's own length

So nothing is decoded of an answer that the model knows by heart, and equal continuations are decoded
once. What is left is decoded side by side with drafts: what followed the last tokens when they last
occurred, in the continuation or the answer. A forward that confirms a draft saves the next ones; a wrong
draft changes nothing. No end token is chosen. `continue_apart` gives the same, up to float rounding, for
a model that can't read trees.

Shapes: E edges (a node and a token after it), K nodes with edges, P new nodes, V words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answer_tree import folded, lay_trees, tree_of
from approx.evaluation.answers import (
    TokenScore,
    answered,
    continue_greedily,
    score_examples,
    score_of,
    token_scores,
)
from approx.evaluation.evaluated import AnswerScore

FEW, MANY = 3, 16  # rows of a product: 4 take as long as MANY; up to FEW take half as long
LONGEST_MATCH = 3  # tokens that a draft is looked up by

Pairs = Sequence[tuple[Sequence[int], Sequence[int]]]  # (prompt ids, answer ids)
Cuts = Sequence[Sequence[int]]  # of each answer, in tokens; each is shorter than the answer


@dataclass(frozen=True)
class CutAnswer:
    """The score of an answer, and after each cut the answer's continued ids and their score."""

    score: AnswerScore
    continued: list[list[int]]
    scores: list[AnswerScore]


def continue_apart(model: Any, pairs: Pairs, cuts: Cuts, ends: Collection[int]) -> list[CutAnswer]:
    """Return answers, cut and continued, with a row of a batch for each continuation."""
    whole = [(*pair, cut) for pair, its in zip(pairs, cuts, strict=True) for cut in its]
    most = max(len(answer) - cut for _, answer, cut in whole)
    prompts = [[*prompt, *answer[:cut]] for prompt, answer, cut in whole]
    said = continue_greedily(model, prompts, ends, most, min_new_tokens=most)
    ids = [
        [*answer[:cut], *row][: len(answer)] for (_, answer, cut), row in zip(whole, said, strict=True)
    ]
    asked = [answered(prompt, row) for (prompt, _, _), row in zip(whole, ids, strict=True)]
    own = score_examples(model, [answered(*pair) for pair in pairs])
    scores, rows = iter(score_examples(model, asked)), iter(ids)
    return [
        CutAnswer(each, [*islice(rows, len(its))], [*islice(scores, len(its))])
        for each, its in zip(own, cuts, strict=True)
    ]


@torch.no_grad()  # tensors of inference mode would block gradients later
def continue_together(model: Any, pairs: Pairs, cuts: Cuts, ends: Collection[int]) -> list[CutAnswer]:
    """Return the same of a model that can read trees (`answer_tree.can_branch`)."""
    tree = _GrowingTree(model, ends)
    found = tree.begin(pairs, cuts)
    tree.grow(list({id(row): row for _, rows in found for row in rows}.values()))
    return [
        CutAnswer(own, [row.ids for row in rows], [score_of(row.scores) for row in rows])
        for own, rows in found
    ]


@dataclass
class _Row:
    """An answer that was cut and grows again; `node` is the one before its last token."""

    prompt: Sequence[int]
    answer: Sequence[int]
    ids: list[int]
    scores: list[TokenScore] = field(default_factory=list)
    node: int = -1

    def draft(self, size: int) -> list[int]:
        """Return a guess of the next tokens.

        >>> _Row([1, 2, 3, 4], [7, 8], [5, 2, 3]).draft(3)
        [4, 7, 8]
        """
        seen = [*self.prompt, *self.answer, *self.ids]
        for length in range(LONGEST_MATCH, 0, -1):
            for end in range(len(seen) - 1, length - 1, -1):
                if seen[end - length : end] == seen[-length:]:
                    return (seen[end : end + size] + seen[-1:] * size)[:size]
        return seen[-1:] * size


class _GrowingTree:
    """A tree of tokens, of which a model reads each once."""

    def __init__(self, model: Any, ends: Collection[int]) -> None:
        from transformers import DynamicCache

        self._model, self._ends = model, sorted(ends)
        self._tree, self._cache = tree_of([]), DynamicCache()

    def begin(self, pairs: Pairs, cuts: Cuts) -> list[tuple[AnswerScore, list[_Row]]]:
        """Read the answers; return their scores, and of each the rows where the model departs from it.

        Cuts after which it departs at the same token share a row.
        """
        self._tree = tree = tree_of([answered(*pair) for pair in pairs])
        nodes_E, targets_E = torch.tensor(tree.edges, device=self._model.device).T
        nodes_K, at_E = torch.unique(nodes_E, return_inverse=True)
        logits_KV, likeliest_K = self._read(len(tree.ids), nodes_K)
        scores, chosen = token_scores(logits_KV, targets_E, at_E), likeliest_K[at_E].tolist()
        found = []
        for (prompt, answer), edges, its in zip(pairs, tree.answers, cuts, strict=True):
            wrong = [at for at, edge in enumerate(edges) if chosen[edge] != answer[at]]
            departures = [next((at for at in wrong if at >= cut), len(answer)) for cut in its]
            own = [scores[edge] for edge in edges]
            rows = {at: _Row(prompt, answer, list(answer[:at]), own[:at]) for at in departures}
            for at, row in rows.items():
                if at < len(answer):
                    node, edge = tree.edges[edges[at]][0], edges[at]
                    self._take(row, node, [chosen[edge]], logits_KV, int(at_E[edge]))
            found.append((score_of(own), [rows[at] for at in departures]))
        return found

    def grow(self, rows: Sequence[_Row]) -> None:
        """Continue rows to the length of their answers."""
        while going := [row for row in rows if len(row.ids) < len(row.answer)]:
            width, more = divmod(max(len(going), FEW if len(going) <= FEW else MANY), len(going))
            first, drafts = len(self._tree.ids), []
            for number, row in enumerate(going):
                drafts.append(row.draft(width - 1 + (number < more)))
                self._tree.parents.extend(
                    (row.node, *range(len(self._tree.ids), len(self._tree.ids) + len(drafts[-1])))
                )
                self._tree.ids.extend((row.ids[-1], *drafts[-1]))
            logits_PV, likeliest_P = self._read(len(self._tree.ids) - first, 0)
            chosen, at = likeliest_P.tolist(), 0
            for row, draft in zip(going, drafts, strict=True):
                right = next((n for n, each in enumerate(draft) if each != chosen[at + n]), len(draft))
                taken = chosen[at : at + right + 1][: len(row.answer) - len(row.ids)]
                self._take(row, first + at + len(taken) - 1, taken, logits_PV, at)
                at += 1 + len(draft)

    def _take(self, row: _Row, node: int, ids: list[int], logits_PV: Tensor, at: int) -> None:
        """Append tokens to a row; the logits that they were chosen from begin at `at`."""
        targets, places = torch.tensor(ids), torch.arange(at, at + len(ids))
        row.scores += token_scores(logits_PV, targets.to(logits_PV.device), places.to(logits_PV.device))
        row.ids += ids
        row.node = node

    def _read(self, num_new: int, kept: Tensor | int) -> tuple[Tensor, Tensor]:
        """Read the last nodes; return the logits of those that are kept (0: all), and their choices."""
        laid = lay_trees([self._tree], self._model.dtype)
        inputs = {name: each[..., -num_new:] for name, each in laid.items()}
        if "attention_mask" in laid:
            inputs["attention_mask"] = laid["attention_mask"][:, :, -num_new:]
        inputs = {name: each.to(self._model.device) for name, each in inputs.items()}
        with folded(self._model, inputs):
            logits_PV = self._model(
                **inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=kept
            ).logits[0]
        allowed_PV = logits_PV.clone()
        allowed_PV[:, self._ends] = -torch.inf
        return logits_PV, allowed_PV.argmax(-1)
