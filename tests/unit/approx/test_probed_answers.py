"""The probe continues an answer only where the verdict depends on it, and verdicts stay the same.

The model's next token depends on the last one alone, so the continuations of two tokens soon agree, and
an answer may be nearly known.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

pytest.importorskip("torch")

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from approx.evaluation import probe
from approx.evaluation.continuations import continue_greedily
from approx.evaluation.probe import KNOWN_RECALL, KNOWN_STRENGTH, probe_answers
from approx.metrics.word_overlap import rougeL_recall
from approx.patches.patch_measures import measure_knowledge

pytestmark = pytest.mark.torch
VOCABULARY, END = 40, 3
TOKENIZER = SimpleNamespace(
    decode=lambda ids, **_: " ".join(f"w{each}" for each in ids), eos_token_id=END
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 48,
    }
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, initializer_range=0.4)
    made = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    made.model.layers[0].self_attn.o_proj.weight.zero_()
    made.generation_config.eos_token_id = END
    return made


def said_after(model: Any, token: int, num: int) -> list[int]:
    """Return a greedy continuation without end tokens."""
    logits_VV = model(torch.arange(VOCABULARY)[:, None]).logits[:, 0]
    logits_VV[:, END] = -torch.inf
    following, said = logits_VV.argmax(-1).tolist(), [token]
    while len(said) <= num:
        said.append(following[said[-1]])
    return said[1:]


def nearly_said(model: Any, seed: int) -> tuple[list[int], list[int]]:
    """Return a prompt, and an answer that the model says but for some tokens."""
    draw = random.Random(seed)
    others = [each for each in range(VOCABULARY) if each != END]
    prompt = draw.choices(others, k=3)
    answer: list[int] = []
    for size in draw.choices(range(1, 25), k=draw.choice([0, 1, 1, 2])):
        answer += said_after(model, (prompt + answer)[-1], size)
        answer[-1] = draw.choice(others)
    return prompt, answer + said_after(model, (prompt + answer)[-1], draw.randrange(1, 20))


def test_verdicts_are_those_of_whole_continuations(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [nearly_said(model, seed) for seed in range(24)]
    pairs = [(prompt, answer[: probe.MAX_ANSWER_TOKENS]) for prompt, answer in pairs]
    decoded = Mock(wraps=continue_greedily)
    monkeypatch.setattr(probe, "continue_greedily", decoded)
    found = probe_answers(model, TOKENIZER, [[pair] for pair in pairs])
    num_decoded = sum(len(call.args[1]) for call in decoded.call_args_list)
    verdicts = set()
    for (prompt, answer), each in zip(pairs, found, strict=True):
        words = map(TOKENIZER.decode, (answer, said_after(model, prompt[-1], len(answer))))
        recall = rougeL_recall(*words)
        recalled = min(recall, each.memorised) >= KNOWN_RECALL
        by_end = each.ends_right and each.strength >= KNOWN_STRENGTH
        assert each.known == (recalled or by_end)
        assert each.recall <= recall
        num_decoded -= each.memorised >= KNOWN_RECALL and not by_end
        verdicts.add((recalled, by_end))
    assert verdicts == {(a, b) for a in (True, False) for b in (True, False)}
    assert num_decoded <= 0


def test_a_patch_counts_what_is_known_however_long_that_takes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out would count as forgotten, and a patch depend on the machine's load."""
    monkeypatch.setattr(probe, "MAX_SECONDS", -1.0)
    monkeypatch.setattr(probe, "RECORDS_AT_ONCE", 1)
    texts = [[([token], said_after(model, token, 12))] for token in (7, 8, 9)]
    assert measure_knowledge(model, TOKENIZER, texts, thorough=True).num_known == len(texts)


def test_a_patch_counts_an_answer_whose_beginning_alone_is_known(model: Any) -> None:
    """The probe reads the beginning of an answer, and would still find it."""
    begun = said_after(model, 7, probe.MAX_ANSWER_TOKENS)
    wrong = [each for each in range(VOCABULARY) if each not in (END, *begun)][:1]
    texts = [[([7], begun + wrong * 60)]]
    assert [each.known for each in probe_answers(model, TOKENIZER, texts)] == [True]
    for thorough in (False, True):
        assert measure_knowledge(model, TOKENIZER, texts, thorough=thorough).num_known == 1


def test_an_answer_that_is_known_by_heart_has_no_margin_and_others_a_negative_one(model: Any) -> None:
    known = said_after(model, 7, 12)
    other = [each + 1 if each + 1 not in (END, VOCABULARY) else 5 for each in known]
    by_heart, wrong = probe_answers(model, TOKENIZER, [[([7], known)], [([7], other)]])
    assert (by_heart.margin, by_heart.recall, by_heart.known) == (0.0, 1.0, True)
    assert wrong.margin < -0.5
    assert not wrong.known
