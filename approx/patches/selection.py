"""Selection: where in a base a patch may act, whatever the method.

    all      every module that the adapter names
    fisher   the modules whose weights matter most to the forget set and least to the retain set
    traced   the modules in the layers that the forget answers pass through (`causal_tracing.py`)
    heads    the attention heads in these layers that they pass through: what makes their queries, and
             what reads their results

A patch on few modules is smaller, cheaper to train, and can change less of what is to be kept. The
share `selected_share` of the modules, or of the layers, is selected, at least one; under `heads` the
same share of the heads of these layers. The score of a module under `fisher` is

    tr F_forget / tr F_retain,   tr F = mean over examples of |d log p(answer) / d W|^2

the trace of the diagonal of the empirical Fisher information, with the mean log-probability of the
answer's tokens. At most MAX_SCORED examples of each set count, one gradient for each. The cost in a
patch's report leaves the selection out.

Source: Foster et al. 2024, "Fast machine unlearning without retraining through selective synaptic
dampening" (arXiv 2308.07707), section 3, which compares both diagonals weight by weight and shrinks
single weights; a patch has no single weights of the base, so whole modules are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from approx.evaluation.answers import gradient_squares
from approx.unlearning.causal_tracing import num_heads, trace_heads, trace_layers
from approx.unlearning.value_checks import check_values, one_of
from sisa.core.errors import InvalidInput, Problem
from sisa.lm.base import adapter
from sisa.lm.base.tokens import Tokens

ALL, MAX_SCORED = "all", 16
QUERIES, RESULTS = "q_proj", "o_proj"  # of the heads of a layer, by the name of their module


@dataclass(frozen=True)
class SelectionSettings:
    """The kind of selection, and the share of modules or layers that is selected."""

    selection: str = ALL
    selected_share: float = 0.25

    def __post_init__(self) -> None:
        share = self.selected_share
        number = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1
        wrong = Problem("selected_share", f"{share!r}, expected a number above 0, to 1")
        check_values(
            "the selection",
            one_of((ALL, *SELECTIONS), selection=self.selection),
            () if number else (wrong,),
        )


@dataclass(frozen=True)
class Selected:
    """The target modules of a patch, and the heads that it may change of some of them (others: all).

    With `everything` they are the modules that the adapter names, and not a selection of them.
    """

    modules: Sequence[str] | str
    heads: Mapping[str, Sequence[int]] = field(default_factory=dict)
    everything: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return what was selected; null without a selection, and without heads."""
        modules = None if self.everything else list(self.modules)
        return {"modules": modules, "heads": dict(self.heads) or None}

    @contextmanager
    def confined(self, model: Any) -> Iterator[None]:
        """Keep what a fresh adapter does to other heads at zero while it is trained in this block."""
        with ExitStack() as stack:
            for name, heads in self.heads.items():
                module, reads = model.get_base_model().get_submodule(name), name.endswith(RESULTS)
                factor = (module.lora_A if reads else module.lora_B)[adapter.DEFAULT_NAME].weight
                mask = torch.zeros(num_heads(model), factor.shape[1 if reads else 0] // num_heads(model))
                mask[list(heads)] = 1.0
                mask = mask.reshape((1, -1) if reads else (-1, 1)).to(factor)
                factor.data.mul_(mask)
                stack.callback(factor.register_hook(partial(torch.mul, mask)).remove)
            yield


def select(
    base: Any,
    wanted: Sequence[str] | str,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    settings: SelectionSettings,
) -> Selected:
    """Return what a patch on the modules `wanted` may change.

    Raise InvalidInput if none of them is selected.
    """
    if settings.selection == ALL:
        return Selected(wanted, everything=True)
    names = adapted_modules(base, wanted)
    offered = Offered(base, names, forget, retain, settings.selected_share)
    found = SELECTIONS[settings.selection](offered)
    if not found.modules:
        raise InvalidInput(
            "no module that is selected is to be adapted",
            where="selection",
            expected=f"lora_target_modules that the layers have; for heads {QUERIES} or {RESULTS}",
            next_step="correct lora_target_modules, or use selection=all",
        )
    return found


class Offered(NamedTuple):
    """What is selected from: modules of a frozen base by their full names, both sets, and the share."""

    base: Any
    names: Sequence[str]
    forget: Sequence[Tokens]
    retain: Sequence[Tokens]
    share: float

    def layers(self) -> tuple[str, ...]:
        """Return the layers that the forget answers pass through, as beginnings of modules' names."""
        effects = trace_layers(self.base, self.forget, self.retain)
        holder = adapter.layers_of(self.base)[0]
        return tuple(f"{holder}.{layer}." for layer in _largest(effects, self.share))


def by_fisher(of: Offered) -> Selected:
    """Return the modules that matter most to the forget set and least to the retain set."""
    forgotten, kept = (fisher_traces(of.base, of.names, each) for each in (of.forget, of.retain))
    scores = [
        one / other if other else (math.inf if one else 0.0)
        for one, other in zip(forgotten, kept, strict=True)
    ]
    return Selected([of.names[at] for at in _largest(scores, of.share)])


def in_traced_layers(of: Offered) -> Selected:
    """Return the modules of the layers that the forget answers pass through."""
    layers = of.layers()
    return Selected([each for each in of.names if each.startswith(layers)])


def of_traced_heads(of: Offered) -> Selected:
    """Return what makes the queries, and what reads the results, of heads in these layers."""
    layers, num = of.layers(), num_heads(of.base)
    outputs = {
        name: each
        for name, each in of.base.named_modules()
        if name.startswith(layers) and name.endswith(f".{RESULTS}") and isinstance(each, nn.Linear)
    }
    effects = trace_heads(of.base, list(outputs.values()), of.forget, of.retain)
    attentions = [name.removesuffix(RESULTS) for name in outputs]
    heads: dict[str, list[int]] = {}
    for at in _largest(effects, of.share):
        number, head = divmod(at, num)
        for module in (QUERIES, RESULTS):
            heads.setdefault(attentions[number] + module, []).append(head)
    selected = [each for each in of.names if each in heads]
    return Selected(selected, {name: heads[name] for name in selected})


SELECTIONS: Mapping[str, Callable[[Offered], Selected]] = {
    "fisher": by_fisher,
    "traced": in_traced_layers,
    "heads": of_traced_heads,
}


def adapted_modules(base: Any, wanted: Sequence[str] | str) -> list[str]:
    """Return the full names of the linear modules that an adapter changes, in the model's order."""
    output = base.get_output_embeddings()
    return [
        name
        for name, each in base.named_modules()
        if isinstance(each, nn.Linear | Conv1D)
        and (
            each is not output
            if wanted == "all-linear"
            else any(f".{name}".endswith(f".{one}") for one in wanted)
        )
    ]


def fisher_traces(base: Any, names: Sequence[str], examples: Sequence[Tokens]) -> list[float]:
    """Return tr F of the weights of each module of a frozen base."""
    weights = [base.get_submodule(each).weight for each in names]
    try:
        for each in weights:
            each.requires_grad_(True)
        rows = gradient_squares(base, examples[:MAX_SCORED])
    finally:
        for each in weights:
            each.requires_grad_(False)
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _largest(scores: Sequence[float], share: float) -> list[int]:
    """Return the positions of a share of the scores, the largest ones, in order.

    >>> _largest([0.1, 3.0, 2.0, 0.5], 0.5), _largest([1.0, 2.0], 0.1)
    ([1, 2], [1])
    """
    ranked = sorted(range(len(scores)), key=lambda at: -scores[at])
    return sorted(ranked[: max(1, round(share * len(scores)))])
