"""Causal tracing: which layers a model's answers pass through, and the states that a layer leaves.

    clean       log p(answer) per token, with the prompt as it is
    corrupted   with noise of three standard deviations on the embeddings of the prompt's tokens
    restored_l  as corrupted, and what layer l adds to the hidden states is that of the clean run
    effect_l    (restored_l - corrupted) / (clean - corrupted), means over examples

The effect is 0 for a layer that carries nothing, and 1 for one that brings the answers back alone. The
lowest layers hold which words were asked, so their effect is large for every text: the effect on texts
to keep is subtracted. An answer's own tokens are not corrupted, and a plain text is corrupted as a
whole. The noise depends on the seed alone; the caller's random state is unchanged.

Source: Meng et al. 2022, "Locating and editing factual associations in GPT" (arXiv 2202.05262),
section 2, which restores the state at one token in a window of layers and averages probabilities over
ten draws of noise. Here a layer's contribution at all tokens is restored, so that one number describes
a layer, and each example has one draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import AnswerBatch, collate, logits_at, mean_logprobs_B
from approx.methods.method import Method
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import layers_of
from sisa.lm.base.tokens import Tokens
from sisa.lm.train.lora import seed_from

MAX_TRACED, NOISE = 8, 3.0


def trace_layers(
    model: Any, forget: Sequence[Tokens], retain: Sequence[Tokens] = (), seed: int = 0
) -> list[float]:
    """Return each layer's effect on the forget set above that on the retain set, from the lowest up.

    At most MAX_TRACED examples of each are run, once for each layer.
    """
    found = _effects(model, forget, seed)
    kept = _effects(model, retain, seed) if retain else [0.0] * len(found)
    return [one - other for one, other in zip(found, kept, strict=True)]


def choose_layer(
    method: Method, model: Any, forget: Sequence[Tokens], retain: Sequence[Tokens]
) -> Method:
    """Return a method that acts at a layer with the one of the largest effect, if it names none.

    Raise InvalidInput for a layer that the model does not have.
    """
    if "layer" not in asdict(method):
        return method
    if method.layer is None:
        effects = trace_layers(model, forget, retain)
        return replace(method, **{"layer": effects.index(max(effects))})
    count = len(decoder_layers(model))
    if method.layer >= count:
        raise InvalidInput(
            "the model has no such layer",
            where="layer",
            expected=f"a number from 0 to {count - 1}, or null to have it measured",
            got=str(method.layer),
            next_step="correct the layer",
        )
    return method


def decoder_layers(model: Any) -> list[Any]:
    """Return a causal model's layers, from the lowest up; a PEFT model's are those of its base."""
    return list(layers_of(_plain(model))[1])


def _plain(model: Any) -> Any:
    """Return the causal model within a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _effects(model: Any, examples: Sequence[Tokens], seed: int) -> list[float]:
    batch, layers = collate(examples[:MAX_TRACED]).to(model.device), decoder_layers(model)
    changes: list[Tensor] = []
    with hooked([(each, partial(_keep_change, into=changes)) for each in layers]):
        clean = _score(model, batch)
    embeddings = _plain(model).get_input_embeddings()
    noisy = (embeddings, partial(_added, noise_BTD=_noise_BTD(embeddings.weight, batch, seed)))
    with hooked([noisy]):
        corrupted = _score(model, batch)
    effects = []
    for layer, change in zip(layers, changes, strict=True):
        with hooked([noisy, (layer, partial(_restored, change=change))]):
            effects.append(_score(model, batch) - corrupted)
    lost = clean - corrupted
    return [each / lost if lost else 0.0 for each in effects]


def _score(model: Any, batch: AnswerBatch) -> float:
    cut, columns_K = batch.at_answers()
    with torch.no_grad():
        logits_BKV = logits_at(model, cut.ids_BT1[:, :-1], columns_K)
    return mean_logprobs_B(logits_BKV, cut).mean().item()


def _noise_BTD(embedding_VD: Tensor, batch: AnswerBatch, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_from(seed, "trace"))
    shape = (*batch.targets_BT.shape, embedding_VD.shape[1])
    noise_BTD = torch.randn(shape, generator=generator).to(embedding_VD)
    begun_BT = batch.mask_BT.cumsum(dim=1) > batch.mask_BT.int()  # at an answer's own tokens
    plain_B1 = batch.mask_BT[:, :1]
    return NOISE * embedding_VD.std() * noise_BTD * (~begun_BT | plain_B1).unsqueeze(-1)


class _Reached(Exception):
    """Raised to leave a forward pass."""


def hidden_at(model: Any, layer: int, ids_BT1: Tensor, columns_K: Tensor) -> Tensor:
    """Return the hidden states that a layer leaves at some columns. The layers above are not run."""
    found: list[Tensor] = []

    def leave(_: Any, args: Any, given: Any, output: Any) -> None:  # noqa: ARG001
        found.append(states_of(output))
        raise _Reached

    with hooked([(decoder_layers(model)[layer], leave)]), suppress(_Reached):
        model(input_ids=ids_BT1, use_cache=False)
    return found[0][:, columns_K]


Hook = Callable[..., Any]


@contextmanager
def hooked(hooks: Sequence[tuple[Any, Hook]]) -> Iterator[None]:
    """Have modules call forward hooks (with keyword arguments) in the block."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def states_of(output: Any) -> Tensor:
    """Return the hidden states that a layer left."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _entered(args: tuple[Any, ...], given: dict[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else given["hidden_states"]
    return found


def _keep_change(_: Any, args: Any, given: Any, output: Any, *, into: list[Tensor]) -> None:
    into.append(states_of(output) - _entered(args, given))


def _added(_: Any, args: Any, given: Any, output: Tensor, *, noise_BTD: Tensor) -> Tensor:  # noqa: ARG001
    return output + noise_BTD


def _restored(_: Any, args: Any, given: Any, output: Any, *, change: Tensor) -> Any:
    hidden = _entered(args, given) + change
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
