"""A trial of a base before training: whether it can be trained, and queried the way shards are.

An architecture's name does not show this, so the base is run on a few tokens. No token may depend on a
later one, an adapter on it must be plain LoRA, and the serving path (padded side by side, then from a
cache) must give what the trained modules give. A base that fails is refused with the reason, before
records are added and hours are spent.

    try_base(base, config.training())

Shapes: P rows, T positions, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from sisa.core.domain import BaseFiles
from sisa.core.errors import IntegrityError, InvalidInput
from sisa.lm.answer.generation import decode_next, padded, prefill
from sisa.lm.answer.stacked_adapters import StackedAdapters
from sisa.lm.base.adapter import DEFAULT_NAME, adapter_files, attach, lora_config, train_block
from sisa.lm.base.low_rank import LowRankChange, read_change
from sisa.lm.base.weights import load_base, load_skeleton, own_modules, untrusted
from sisa.planning.plan import LAYERWISE

# relative to the norm: another answer differs by about 1, a later token that leaks in by less
ANSWER_TOLERANCE, AHEAD_TOLERANCE = 1e-2, 1e-5
PROMPTS = ((1, 2, 3, 4, 5), (3, 1))  # of different lengths, so that one of them is padded
NEXT = 4  # the token that follows


def try_base(base: BaseFiles, training: Mapping[str, Any]) -> None:
    """Raise InvalidInput if a base can't be trained as `training` says, or can't be queried then."""
    skeleton = load_skeleton(base.directory)
    _check_positions(skeleton.config, int(training["sequence_len"]))
    config = lora_config(training, skeleton)
    with (
        untrusted("the base model can't be run the way shards are trained and queried", base.directory),
        torch.no_grad(),
    ):
        model, tokenizer = load_base(base)
        _check_vocabulary(model, tokenizer)
        _check_causal(model)
        trained = attach(own_modules(model), config, None, init_seed=0).train(False)  # no dropout
        if LAYERWISE in training:
            train_block(trained, training[LAYERWISE], place=0)
        _check_answers(model, trained, _randomise(trained))


def _check_positions(config: Any, sequence_len: int) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < sequence_len:
        raise InvalidInput(
            "the base model does not support so many tokens",
            where="sequence_len",
            expected=f"at most {most}, the base's max_position_embeddings",
            got=str(sequence_len),
            next_step="lower sequence_len in the run file",
        )


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values(), default=0)
    if last >= rows:
        raise _refusal(
            "the tokenizer has tokens that the base model does not know",
            expected=f"tokens below {rows}, the rows of its embeddings",
            got=f"token {last}",
        )


def _check_causal(model: Any) -> None:
    ids_1T = torch.tensor([[*PROMPTS[0]]])
    other_1T = ids_1T.clone()
    other_1T[0, -1] = NEXT
    one, other = (model(input_ids=each, use_cache=False).logits for each in (ids_1T, other_1T))
    if not torch.isfinite(one).all():
        raise _refusal("the base model's outputs are not finite numbers", expected="undamaged weights")
    if _unlike(one[:, :-1], other[:, :-1], AHEAD_TOLERANCE):
        raise _refusal(
            "the base model looks ahead",
            expected="a causal language model: no token depends on a later one",
            got="an encoder, or a model of masked words",
        )


def _randomise(trained: Any) -> LowRankChange:
    """Give the adapter random weights, since its initial ones change nothing, and return its change."""
    generator = torch.Generator().manual_seed(0)
    for module in trained.modules():
        if isinstance(module, LoraLayer) and DEFAULT_NAME in module.lora_B:
            module.lora_B[DEFAULT_NAME].weight.normal_(std=0.02, generator=generator)
    try:
        return read_change(adapter_files(trained))
    except IntegrityError as error:
        raise InvalidInput(
            "an adapter on these modules of the base model is not plain LoRA and could not be served",
            where="lora_target_modules",
            expected="linear modules; experts fused into one tensor are not linear modules",
            got="; ".join(each.what for each in error.problems) or error.got,
            next_step="name the attention's modules in lora_target_modules, such as q_proj and v_proj",
        ) from error


def _check_answers(model: Any, trained: Any, change: LowRankChange) -> None:
    """Compare what is served for two prompts, and for one more token, with each prompt run alone."""
    ids_PT, mask_PT = padded(PROMPTS, model.device)
    stack = StackedAdapters(own := own_modules(model), {0: change})
    asked = [[0]] * len(PROMPTS)
    first_PV, cache = prefill(own, stack, asked, ids_PT, mask_PT)
    with stack.asking(asked):
        mask_PS = torch.cat([mask_PT, torch.ones_like(mask_PT[:, :1])], dim=1)
        then_PV = decode_next(own, torch.tensor([NEXT] * len(PROMPTS)), mask_PS, cache)
    continued = (torch.tensor([[*each, NEXT]]) for each in PROMPTS)
    alone = [trained(input_ids=each, use_cache=False).logits for each in continued]
    expected_PV = torch.cat([each[:, -2] for each in alone] + [each[:, -1] for each in alone])
    if _unlike(torch.cat([first_PV, then_PV]), expected_PV, ANSWER_TOLERANCE):
        raise _refusal(
            "the base model answers several prompts at once differently than one by one",
            expected="attention that ignores padding, and a cache of keys and values",
        )


def _unlike(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return not bool((one - other).norm() <= tolerance * other.norm())


def _refusal(what: str, *, expected: str, got: str = "") -> InvalidInput:
    return InvalidInput(
        what, where="base_model", expected=expected, got=got, next_step="use another base model"
    )
