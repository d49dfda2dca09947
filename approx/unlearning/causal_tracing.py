"""Causal tracing: which layers and heads a model's answers pass through, and the states a layer leaves.

    clean       log p(answer) per token, with the prompt as it is
    corrupted   with noise of three standard deviations on the embeddings of the prompt's tokens
    restored_l  as corrupted, and what layer l adds to the hidden states is that of the clean run
    effect_l    (restored_l - corrupted) / (clean - corrupted), means over examples

The effect is 0 for a layer that carries nothing, and 1 for one that brings the answers back alone. The
lowest layers hold which words were asked, so their effect is large for every text: the effect on texts
to keep is subtracted. An answer's own tokens are not corrupted, and a plain text is corrupted as a
whole. The noise is the same in every run; the caller's random state is unchanged.

Source: Meng et al. 2022, "Locating and editing factual associations in GPT" (arXiv 2202.05262),
section 2, which restores the state at one token and averages probabilities over ten draws of noise.
`trace_states` does so, with one draw for each example. `trace_layers` restores a layer's contribution at
all tokens, so that one number describes a layer; `trace_heads` what one attention head contributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from approx.evaluation.answers import AnswerBatch, collate, model_logprobs_B
from approx.unlearning.examples import Sets
from approx.unlearning.hidden_states import Hook, Seen, decoder_layers, hooked, plain_model
from sisa.core.errors import InvalidInput
from sisa.lm.base.numerics import seed_from
from sisa.lm.base.tokens import Tokens

if TYPE_CHECKING:
    from approx.methods.method import Method

MAX_TRACED, NOISE = 8, 3.0


def trace_layers(model: Any, forget: Sequence[Tokens], retain: Sequence[Tokens] = ()) -> list[float]:
    """Return each layer's effect on the forget set above that on the retain set, from the lowest up.

    At most MAX_TRACED examples of each are run, once for each layer.
    """
    return _effects_above(model, forget, retain, decoder_layers(model), _restoring_change)


def trace_heads(
    model: Any, outputs: Sequence[Any], forget: Sequence[Tokens], retain: Sequence[Tokens] = ()
) -> list[float]:
    """Return each attention head's effect on the forget set above that on the retain set, in order.

    `outputs` are the linear modules, from the lowest up, that read what a layer's heads have found.
    """
    restoring = partial(_restoring_heads, num_heads=num_heads(model))
    return _effects_above(model, forget, retain, outputs, restoring)


def trace_states(model: Any, examples: Sequence[Tokens], positions: Sequence[int]) -> list[float]:
    """Return the effect of the whole state that each layer leaves at one position of each example."""
    restoring = partial(_restoring_states, positions=positions[:MAX_TRACED])
    return _effects(model, examples, decoder_layers(model), restoring)


def choose_layer(method: Method, model: Any, sets: Sets) -> Method:
    """Return the method; if it acts at a layer and names none, with the layer of the largest effect.

    Raise InvalidInput for a layer that the model does not have.
    """
    if method.lacks_layer:
        effects = method.layer_effects(model, sets)
        return replace(method, **{"layer": effects.index(max(effects))})
    check_layer(method, model)
    return method


def check_layer(method: Method, model: Any) -> None:
    """Raise InvalidInput if a method names a layer that the model does not have."""
    if method.layer is None:
        return
    count = len(decoder_layers(model))
    if method.layer >= count:
        raise InvalidInput(
            "the model has no such layer",
            where="layer",
            expected=f"a number from 0 to {count - 1}, or null to have it measured",
            got=str(method.layer),
            next_step="correct the layer",
        )


def num_heads(model: Any) -> int:
    """Return how many heads, of queries, a layer's attention has."""
    count: int = plain_model(model).config.get_text_config().num_attention_heads
    return count


Restoring = Callable[[Any, Seen], Iterator[Hook]]  # of a module, and what it saw in a clean run


def _effects_above(
    model: Any,
    forget: Sequence[Tokens],
    retain: Sequence[Tokens],
    modules: Sequence[Any],
    restoring: Restoring,
) -> list[float]:
    """Return the effects on the forget set, less those on the retain set if there is one."""
    found = _effects(model, forget, modules, restoring)
    kept = _effects(model, retain, modules, restoring) if retain else [0.0] * len(found)
    return [one - other for one, other in zip(found, kept, strict=True)]


def _effects(
    model: Any, examples: Sequence[Tokens], modules: Sequence[Any], restoring: Restoring
) -> list[float]:
    """Return the effect of each hook that `restoring` makes, module after module."""
    batch = collate(examples[:MAX_TRACED]).to(model.device)
    seen: list[Seen] = []
    with hooked([(each, seen.append) for each in modules]):
        clean = _score(model, batch)
    embeddings = plain_model(model).get_input_embeddings()
    noise_BTD = _noise_BTD(embeddings.weight, batch)
    noisy: tuple[Any, Hook] = embeddings, lambda now: now.left + noise_BTD
    with hooked([noisy]):
        corrupted = _score(model, batch)
    effects = []
    for module, in_clean_run in zip(modules, seen, strict=True):
        for restore in restoring(module, in_clean_run):
            with hooked([noisy, (module, restore)]):
                effects.append(_score(model, batch) - corrupted)
    lost = clean - corrupted
    return [each / lost if lost else 0.0 for each in effects]


def _restoring_change(_layer: Any, clean: Seen) -> Iterator[Hook]:
    change_BTD = clean.left - clean.given
    yield lambda now: now.given + change_BTD


def _restoring_states(_layer: Any, clean: Seen, *, positions: Sequence[int]) -> Iterator[Hook]:
    places = torch.arange(len(positions)), torch.tensor(positions)
    yield lambda now: now.left.index_put(places, clean.left[places])


def _restoring_heads(output: Any, clean: Seen, *, num_heads: int) -> Iterator[Hook]:
    width = clean.given.shape[-1] // num_heads
    for start in range(0, width * num_heads, width):
        head = slice(start, start + width)
        yield partial(_with_head, output=output, head=head, clean_BTD=clean.given)


def _with_head(now: Seen, *, output: Any, head: slice, clean_BTD: Tensor) -> Tensor:
    missing_BTH = clean_BTD[..., head] - now.given[..., head]
    return now.left + linear(missing_BTH, output.weight[:, head])


def _score(model: Any, batch: AnswerBatch) -> float:
    with torch.no_grad():
        return model_logprobs_B(model, batch).mean().item()


def _noise_BTD(embedding_VD: Tensor, batch: AnswerBatch) -> Tensor:
    generator = torch.Generator().manual_seed(seed_from(0, "trace"))
    shape = (*batch.targets_BT.shape, embedding_VD.shape[1])
    noise_BTD = torch.randn(shape, generator=generator).to(embedding_VD)
    begun_BT = batch.mask_BT.cumsum(dim=1) > batch.mask_BT.int()  # at an answer's own tokens
    plain_B1 = batch.mask_BT[:, :1]
    return NOISE * embedding_VD.std() * noise_BTD * (~begun_BT | plain_B1).unsqueeze(-1)
