"""Causal tracing: which layers a model's answers pass through, and the states that a layer leaves.

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
all tokens, so that one number describes a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import AnswerBatch, collate, logits_at, mean_logprobs_B
from approx.methods.editing.editing import Edit
from approx.methods.method import Method
from approx.unlearning.examples import Sets
from sisa.core.errors import InvalidInput
from sisa.lm.base.adapter import layers_of
from sisa.lm.base.tokens import Tokens
from sisa.lm.train.lora import seed_from

MAX_TRACED, NOISE = 8, 3.0


def trace_layers(model: Any, forget: Sequence[Tokens], retain: Sequence[Tokens] = ()) -> list[float]:
    """Return each layer's effect on the forget set above that on the retain set, from the lowest up.

    At most MAX_TRACED examples of each are run, once for each layer.
    """
    found = _effects(model, forget)
    kept = _effects(model, retain) if retain else [0.0] * len(found)
    return [one - other for one, other in zip(found, kept, strict=True)]


def trace_states(model: Any, examples: Sequence[Tokens], positions: Sequence[int]) -> list[float]:
    """Return the effect of the whole state that each layer leaves at one position of each example."""
    return _effects(model, examples, positions)


def choose_layer(method: Method, model: Any, sets: Sets) -> Method:
    """Return a method that acts at a layer with the one of the largest effect, if it names none.

    An edit acts at the subjects alone, where the layers above what the answers read have no effect.
    Raise InvalidInput for a layer that the model does not have.
    """
    if "layer" not in asdict(method):
        return method
    if method.layer is None:
        if isinstance(method, Edit):
            effects = trace_states(model, sets.forget, sets.subject_positions)
        else:
            effects = trace_layers(model, sets.forget, sets.retain)
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
    return list(layers_of(plain_model(model))[1])


def plain_model(model: Any) -> Any:
    """Return the causal model within a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _effects(
    model: Any, examples: Sequence[Tokens], positions: Sequence[int] | None = None
) -> list[float]:
    batch, layers = collate(examples[:MAX_TRACED]).to(model.device), decoder_layers(model)
    seen: list[tuple[Tensor, Tensor]] = []
    with hooked([(each, partial(_keep, into=seen)) for each in layers]):
        clean = _score(model, batch)
    embeddings = plain_model(model).get_input_embeddings()
    noisy = (embeddings, partial(_added, noise_BTD=_noise_BTD(embeddings.weight, batch)))
    with hooked([noisy]):
        corrupted = _score(model, batch)
    effects = []
    for layer, (hidden_BTD, change_BTD) in zip(layers, seen, strict=True):
        if positions is None:
            restore = partial(_restored, change_BTD=change_BTD)
        else:
            restore = partial(_put, hidden_BTD=hidden_BTD, positions=positions[:MAX_TRACED])
        with hooked([noisy, (layer, restore)]):
            effects.append(_score(model, batch) - corrupted)
    lost = clean - corrupted
    return [each / lost if lost else 0.0 for each in effects]


def _score(model: Any, batch: AnswerBatch) -> float:
    cut, columns_K = batch.at_answers()
    with torch.no_grad():
        logits_BKV = logits_at(model, cut.ids_BT1[:, :-1], columns_K)
    return mean_logprobs_B(logits_BKV, cut).mean().item()


def _noise_BTD(embedding_VD: Tensor, batch: AnswerBatch) -> Tensor:
    generator = torch.Generator().manual_seed(seed_from(0, "trace"))
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
    """Call hooks after the modules' forward passes, with the module, its inputs and its output."""
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def states_of(output: Any) -> Tensor:
    """Return the hidden states that a layer left."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def entered(args: tuple[Any, ...], given: Mapping[str, Any], output: object = None) -> Tensor:  # noqa: ARG001
    """Return what a module was given."""
    found: Tensor = args[0] if args else given["hidden_states"]
    return found


def _keep(_: Any, args: Any, given: Any, output: Any, *, into: list[tuple[Tensor, Tensor]]) -> None:
    hidden_BTD = states_of(output)
    into.append((hidden_BTD, hidden_BTD - entered(args, given)))


def _added(_: Any, args: Any, given: Any, output: Tensor, *, noise_BTD: Tensor) -> Tensor:  # noqa: ARG001
    return output + noise_BTD


def _restored(_: Any, args: Any, given: Any, output: Any, *, change_BTD: Tensor) -> Any:
    return with_states(output, entered(args, given) + change_BTD)


def _put(
    _: Any,
    args: Any,  # noqa: ARG001
    given: Any,  # noqa: ARG001
    output: Any,
    *,
    hidden_BTD: Tensor,
    positions: Sequence[int],
) -> Any:
    places = torch.arange(len(positions)), torch.tensor(positions)
    return with_states(output, states_of(output).index_put(places, hidden_BTD[places]))


def with_states(output: Any, hidden_BTD: Tensor) -> Any:
    """Return a layer's output with other hidden states."""
    return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD
