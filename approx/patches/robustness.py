"""The robustness of forgetting: the probability of the answers after the easiest attacks.

    relearning   after 3 and 20 steps of fine-tuning on the first texts, by a fresh LoRA adapter over the
                 patch. A control that never knew them is measured beside it: the reference on the same
                 texts, or without one the patched model on the same texts with invented names and
                 figures. A patch is robust if what it forgot returns no faster than the control learns
    rounding     with the weights, patch included, rounded to 8 and to 4 bits, in groups of 64
    rewording    for the same questions in other words, before and after the patch

The model is left unchanged, and no result holds a text. Plain texts have no other wording. A text
without a name has no control without a reference.

Source: relearning by Hu et al. 2024, "Jogging the memory of unlearned models"; rounding by Zhang et al.
2024, "Catastrophic failure of LLM unlearning via quantization".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import collate, logits_at, score_examples
from approx.methods.method import mean_nll
from approx.metrics.probability import probability
from approx.unlearning.generated_retain import rename_record
from sisa.core.domain import Part, Record
from sisa.lm.base.adapter import attach
from sisa.lm.base.tokens import Tokens, spans, tokenize

MAX_RELEARNT, MAX_ASKED = 4, 16
RELEARNING_STEPS = (3, 20)
LEARNING_RATE = 1e-3
BITS, GROUP = (8, 4), 64
WORDINGS = ("Please tell me: {}", "I have a question. {}", "{} Answer briefly.")
EXTRA = "relearning"  # the name of the attack's adapter


def measure_robustness(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    forget: Sequence[Tokens],
    sequence_len: int,
    reference: Any = None,
) -> dict[str, Any]:
    """Return measures of the patch that is active in `model`, a PEFT model.

    `forget` are the tokens of the records.
    """

    def tokens_of(found: Sequence[Record | None]) -> list[Tokens]:
        made = [tokenize(each, tokenizer, train_on_inputs=False) for each in found if each is not None]
        cut = [Tokens(e.input_ids[:sequence_len], e.labels[:sequence_len]) for e in made]
        return [each for each in cut if spans(each)]

    first, few = forget[:MAX_RELEARNT], forget[:MAX_ASKED]
    if reference is None:
        of, other = "invented names and figures", model
        taught = tokens_of([rename_record(each, 0) for each in records[:MAX_RELEARNT]])
    else:
        config = replace(model.peft_config["default"], base_model_name_or_path=None)
        of, other = "the reference", attach(reference, config, None, init_seed=0)
        taught = list(first)
    found = {
        "num_texts": len(few),
        "num_relearnt": len(first),
        "relearning": _means(relearnt(model, first, first)),
        "control": {"of": of, **_means(relearnt(other, taught, taught))} if taught else None,
        "rounding": {str(bits): fmean(probabilities_rounded(model, few, bits)) for bits in BITS},
        "rewording": None,
    }
    if reworded := tokens_of([each for record in records[:MAX_ASKED] for each in _reworded(record)]):
        with model.disable_adapter():
            before = fmean(probabilities(model, reworded))
        found["rewording"] = {"before": before, "after": fmean(probabilities(model, reworded))}
    return found


def _reworded(record: Record) -> list[Record]:
    """Return the record with its first question in other words."""
    for at, part in enumerate(record.parts):
        if part.role in ("prompt", "user"):
            asked = [Part(part.role, _worded(each, part.text)) for each in WORDINGS]
            before, after = record.parts[:at], record.parts[at + 1 :]
            return [replace(record, parts=(*before, each, *after)) for each in asked]
    return []


def _worded(wording: str, text: str) -> str:
    """Return a wording of a text that keeps the white space at its end.

    >>> _worded("{} Answer briefly.", "Who? ")
    'Who? Answer briefly. '
    """
    stem = text.rstrip()
    return wording.format(stem) + text[len(stem) :]


def probabilities(model: Any, examples: Sequence[Tokens]) -> list[float]:
    """Return the probability of each example's answer, per token."""
    return [probability(each.loss) for each in score_examples(model, examples)]


def _means(by_steps: Mapping[int, Sequence[float]]) -> dict[str, float]:
    return {str(steps): fmean(each) for steps, each in by_steps.items()}


def relearnt(
    model: Any,
    taught: Sequence[Tokens],
    asked: Sequence[Tokens],
    after: Sequence[int] = RELEARNING_STEPS,
) -> dict[int, list[float]]:
    """Return the probabilities of `asked` after 0 steps on `taught` and after the given numbers.

    `model` is a PEFT model. It is fine-tuned by a fresh adapter over its own, and restored.
    """
    found = {0: probabilities(model, asked)}
    wanted = {name: each.requires_grad for name, each in model.named_parameters()}
    torch.manual_seed(0)  # for the fresh adapter's first factors
    model.add_adapter(EXTRA, model.peft_config["default"])
    model.base_model.set_adapter(["default", EXTRA])
    try:
        for name, each in model.named_parameters():
            each.requires_grad_(f".{EXTRA}." in name)
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0, foreach=False)
        batch = collate(taught).to(model.device)
        for step in range(1, max(after) + 1):
            optimizer.zero_grad(set_to_none=True)
            cut, columns_K = batch.at_answers()
            logits_BKV = logits_at(model, cut.ids_BT1, columns_K)
            mean_nll(logits_BKV, cut).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if step in after:
                found[step] = probabilities(model, asked)
    finally:
        model.delete_adapter(EXTRA)
        model.base_model.set_adapter("default")
        for name, each in model.named_parameters():
            each.requires_grad_(wanted[name])
    return found


def probabilities_rounded(model: Any, examples: Sequence[Tokens], bits: int) -> list[float]:
    """Return the probabilities of examples with the weights, patch included, rounded to `bits`.

    The patched modules and every other linear module but the head are rounded, then restored. The
    original weights are never written to.
    """
    head, held = model.get_output_embeddings(), []
    with torch.no_grad():
        changes: dict[str, Tensor] = {
            f"{name}.base_layer": module.get_delta_weight("default").detach()
            for name, module in model.named_modules()
            if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", ())
        }
    try:
        for name, module in model.named_modules():
            linear = isinstance(module, torch.nn.Linear) and "lora_" not in name
            if name in changes or (linear and module is not head):
                weight = module.weight
                held.append((module, weight))
                laid_on = weight.detach().float() + changes.get(name, torch.zeros(()))
                rounded = round_weights(laid_on, bits).to(weight.dtype)
                module.weight = torch.nn.Parameter(rounded, requires_grad=False)
        with model.disable_adapter():
            return probabilities(model, examples)
    finally:
        for module, weight in held:
            module.weight = weight


def round_weights(weights: Tensor, bits: int) -> Tensor:
    """Return weights rounded to the nearest of 2^bits - 1 levels around 0.

    Each group of GROUP weights in a row has its own scale; a row that cannot be divided so is one
    group.

    >>> round_weights(torch.tensor([[-7.0, 0.4, 3.6, 7.0]]), 4).tolist()
    [[-7.0, 0.0, 4.0, 7.0]]
    """
    most = 2 ** (bits - 1) - 1
    size = GROUP if weights.shape[-1] % GROUP == 0 else weights.shape[-1]
    groups = weights.reshape(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / most
    return torch.mul((groups / scale).round(), scale).reshape(weights.shape)
