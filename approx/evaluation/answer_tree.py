"""Answers to one question as a tree of tokens: what several of them begin with is computed once.

A tree is one row of a forward. Each node is a token that predicts the next one; it sees itself and the
nodes above it, at the position of its depth, so its logits are those of its answer alone, up to float
rounding. TOFU's questions with seven answers each have 0.57 of the positions of separate rows.

Trees of one answer need no mask, which is the only form for a base that looks back within a window, adds
something of its own to attention, or mixes positions outside attention. `can_branch` compares the logits
of a small tree with those of its answers alone.

Shapes: B trees, N nodes of the largest one, K nodes that are read or logits of a tree, E pairs of a node
and a token after it, V words; in attention H heads on G keys, D features.

>>> tree = tree_of([Tokens([5, 6, 7], [-100, 6, 7]), Tokens([5, 6, 8], [-100, 6, 8])])
>>> tree.ids, tree.parents, tree.edges, tree.answers
([5, 6], [-1, 0], [(0, 6), (1, 7), (1, 8)], [[0, 1], [0, 2]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from approx.evaluation.answers import score_of, token_scores
from approx.evaluation.evaluated import AnswerScore
from sisa.lm.base.base_checks import kept_check
from sisa.lm.base.tokens import NO_LOSS, Tokens
from sisa.lm.train.losses import HARMLESS, attention, has_window

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


ATTENTION_NAME = "folded"


def _attend(
    module: Any,
    query_BHKD: Tensor,
    key_BGND: Tensor,
    value_BGND: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend to keys that heads share, without a copy of them for each head."""
    of_all = query_BHKD, key_BGND, value_BGND
    more = any(value is not None and name not in HARMLESS for name, value in others.items())
    if more or dropout or attention_mask is None or attention_mask.shape[1] > 1:
        options = {"dropout": dropout, "scaling": scaling, **others}
        return sdpa_attention_forward(module, *of_all, attention_mask, **options)[0], None
    (rows, heads, num, size), shared = query_BHKD.shape, key_BGND.shape[1]
    found = torch.nn.functional.scaled_dot_product_attention(
        query_BHKD.reshape(rows, shared, -1, size),
        *(key_BGND, value_BGND),
        attention_mask.repeat(1, 1, heads // shared, 1),
        scale=scaling,
    )
    return found.view(rows, heads, num, -1).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, _attend)


def folded(model: Any, inputs: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Let forwards of trees that branch read shared keys once, if the model has torch's attention."""
    plain = getattr(model.config, "_attn_implementation", None) == "sdpa"
    return attention(model, ATTENTION_NAME) if plain and "attention_mask" in inputs else nullcontext()


def tree_scores(logits_KV: Tensor, num_nodes: int, tree: AnswerTree) -> list[AnswerScore]:
    """Return the scores of a tree's answers; the logits are those of the last of `num_nodes` nodes."""
    nodes_E, targets_E = torch.tensor(tree.edges, device=logits_KV.device).T
    values = token_scores(logits_KV, targets_E, nodes_E - (num_nodes - len(logits_KV)))
    return [score_of(values[edge] for edge in each) for each in tree.answers]


def can_branch(model: Any, longest: int, known: Sequence[str] = ()) -> bool:
    """Return whether a causal model's logits on trees are those of answers of up to `longest` tokens.

    Under `known`, the base's name and the fingerprint, the outcome is kept between processes.
    """
    if has_window(model, longest):
        return False
    return kept_check("trees", known, lambda: [_reads_trees(model)])[0]


@torch.no_grad()
def _reads_trees(model: Any) -> bool:
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
