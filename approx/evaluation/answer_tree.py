"""Answers to one question as a tree of tokens: a beginning that they share is computed once.

A tree is one row of a forward. Each node is a token that predicts the next one; it sees itself and the
nodes above it, at the position of its depth, so its logits are those of its answer alone, up to float
rounding. TOFU's questions with seven answers each have 0.57 of the positions of separate rows.

Trees of one answer need no mask, which is the only form for a base that looks back within a window, adds
something of its own to attention, or mixes positions outside attention. `can_branch` compares the logits
of a small tree with those of its answers alone.

Shapes: B trees, N nodes of the largest one, K nodes that are read or logits of a tree, E pairs of a node
and a token after it, V words.

>>> tree = tree_of([Tokens([5, 6, 7], [-100, 6, 7]), Tokens([5, 6, 8], [-100, 6, 8])])
>>> tree.ids, tree.parents, tree.edges, tree.answers
([5, 6], [-1, 0], [(0, 6), (1, 7), (1, 8)], [[0, 1], [0, 2]])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from approx.evaluation.answer_score import AnswerScore
from approx.evaluation.answers import score_of, token_scores
from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.packing import has_window

# Relative to the norm; a base that adds something of its own to attention is off by more.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 0.1}
PROBES = ([1, 3, 0], [1, 2, 0])  # few: products of up to 3 rows take half as long as of more


@dataclass(frozen=True)
class AnswerTree:
    """The tokens of nodes and the nodes before them (-1: none), in order of the answers.

    `edges` are pairs of a node and an answer's token after it, and `answers` the edges of each answer.
    """

    ids: list[int]
    parents: list[int]
    edges: list[tuple[int, int]]
    answers: list[list[int]]

    @property
    def branches(self) -> bool:
        """Return whether a node does not follow the one before it."""
        return self.parents != list(range(-1, len(self.parents) - 1))

    @property
    def num_logits(self) -> int:
        """Return the number of last nodes whose logits are needed."""
        return len(self.ids) - min(node for node, _ in self.edges)


def tree_of(examples: Sequence[Tokens]) -> AnswerTree:
    """Return the tree of examples."""
    nodes: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    answers = []
    for each in examples:
        node, answer = -1, []
        following = zip(each.input_ids[1:], each.labels[1:], strict=True)
        for token, (after, label) in zip(each.input_ids, following, strict=False):
            node = nodes.setdefault((node, token), len(nodes))
            if label != NO_LOSS:
                answer.append(edges.setdefault((node, after), len(edges)))
        answers.append(answer)
    return AnswerTree([each for _, each in nodes], [each for each, _ in nodes], list(edges), answers)


def lay_trees(trees: Sequence[AnswerTree], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs of a forward with one row per tree, padded on the right."""
    longest = max(len(each.ids) for each in trees)
    ids_BN = np.zeros((len(trees), longest), np.int64)
    for row, tree in enumerate(trees):
        ids_BN[row, : len(tree.ids)] = tree.ids
    found = {"input_ids": torch.from_numpy(ids_BN)}
    if not any(each.branches for each in trees):  # under causal attention no node sees the padding
        return found
    positions_BN = np.zeros((len(trees), longest), np.int64)
    seen_BNN = np.tile(np.eye(longest, dtype=bool), (len(trees), 1, 1))
    for tree, position_N, seen_NN in zip(trees, positions_BN, seen_BNN, strict=True):
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                position_N[node] = position_N[parent] + 1
                seen_NN[node] |= seen_NN[parent]
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    mask_BNN = torch.where(torch.from_numpy(seen_BNN), torch.zeros((), dtype=dtype), hidden)
    return found | {"position_ids": torch.from_numpy(positions_BN), "attention_mask": mask_BNN[:, None]}


def tree_scores(logits_KV: Tensor, num_nodes: int, tree: AnswerTree) -> list[AnswerScore]:
    """Return the scores of a tree's answers; the logits are those of the last of `num_nodes` nodes."""
    nodes_E, targets_E = torch.tensor(tree.edges, device=logits_KV.device).T
    values = token_scores(logits_KV, targets_E, nodes_E - (num_nodes - len(logits_KV)))
    return [score_of(values[edge] for edge in each) for each in tree.answers]


@torch.no_grad()
def can_branch(model: Any, longest: int) -> bool:
    """Return whether a causal model's logits on trees are those of answers of up to `longest` tokens."""
    if has_window(model, longest):
        return False
    tree = tree_of([Tokens(each, each) for each in PROBES])
    inputs = {name: each.to(model.device) for name, each in lay_trees([tree], model.dtype).items()}
    try:
        (found_NV,) = model(**inputs, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
        return False
    for ids, answer in zip(PROBES, tree.answers, strict=True):
        alone_TV = model(input_ids=torch.tensor([ids[:-1]], device=model.device)).logits[0]
        off = found_NV[[tree.edges[edge][0] for edge in answer]] - alone_TV[: len(answer)]
        if off.float().norm() > TOLERANCE.get(alone_TV.dtype, 0.0) * alone_TV.float().norm():
            return False
    return True
