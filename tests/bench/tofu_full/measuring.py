"""Ask and attack the contestants of TOFU in full, and name what computes each cell.

compute(models, "50x4-key0-forget10.attacked")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from statistics import fmean
from typing import Any

from approx.attacks.attack import AttackSets
from approx.attacks.quantisation import Quantisation
from approx.attacks.relearning import Relearning, RelearningOutOfDomain
from approx.attacks.sampling import LeakAtK
from approx.evaluation.asking import Asking, evaluate
from approx.evaluation.evaluated_models import records_of
from approx.evaluation.questions import PromptForm, Question
from sisa.lm.base.tokens import end_tokens
from tests.bench.tofu_full.base import Files
from tests.bench.tofu_full.cells import Json
from tests.bench.tofu_full.design import FORM, TUNED_EACH, Contestant, Data
from tests.bench.tofu_full.models import BATCH, Models

CHAT = PromptForm("chat")  # of the base alone
BITS = (8, 4)


def compute(models: Models, name: str) -> Json:
    """Return the result of a cell, computed now or read, with what it needs.

    Raise Busy while another process computes it, or something that it needs.
    """
    of, _, step = name.rpartition(".")
    if step == "tried":
        return models.tried(of)
    contestant = models.by_name[of]
    if step == "made":
        return models.made(contestant)
    measure = {"asked": ask, "attacked": attack}[step]
    return models.cells.once(name, partial(measure, models, contestant))


def ask(models: Models, contestant: Contestant) -> Json:
    """Ask a contestant TOFU's questions, and return the numbers of each. Its log holds the text."""
    models.have(contestant)
    chats = contestant.kind == "base" and models.base.tokenizer.chat_template
    settings = Asking(CHAT if chats else FORM, models.design.max_new_tokens)
    questions = models.data.asked(contestant.without or "forget10")
    log = models.cells.directory / "logs" / f"{contestant.name}.jsonl"
    with models.served(contestant) as model:
        rows = evaluate(model, questions, log, settings, batch_size=BATCH)
    numbers = [{**asdict(row), "ground_truth": "", "generation": None} for row in rows]
    return {"rows": numbers, "max_new_tokens": settings.max_new_tokens}


def attack(models: Models, contestant: Contestant) -> Json:
    """Attack a contestant author by author: all numbers are per question that no attack trains on.

    Attacks on weights take the shard that holds, or held, the author.
    """
    models.have(contestant)
    split = contestant.without or "forget10"
    authors = models.data.authors(split, models.design.attacked_authors)
    exported = models.shard_adapters(contestant) if contestant.layout else {}
    found: dict[str, list[float]] = {}
    for number, questions in enumerate(authors):
        files = exported.get(models.shard_of(contestant, questions[0])) if exported else None
        sets = _attack_sets(models.base.tokenizer, models.data, questions)
        values = _attack_author(models, contestant, files, sets, models.design.seed + number)
        for name, some in values.items():
            found.setdefault(name, []).extend(some)
    means = {name: fmean(values) for name, values in found.items()}
    return {"split": split, "authors": len(authors), "means": means, "per_question": found}


def _attack_author(
    models: Models, contestant: Contestant, files: Files | None, sets: AttackSets, seed: int
) -> dict[str, Sequence[float]]:
    """Return the values of each column of `table.ATTACKS`, by question."""
    steps = models.design.relearning_steps
    with models.worn(contestant, files, models.layers_of(contestant)) as model:
        inside = Relearning((steps,))(model, sets, seed=0).values
        outside = RelearningOutOfDomain((steps,))(model, sets, seed=0).values
    with models.worn(contestant, files) as model:
        rounded = Quantisation(BITS)(model, sets, seed=0).values
    sets = replace(sets, ends=end_tokens(models.base.whole, models.base.tokenizer))
    leak = LeakAtK(models.design.samples, models.design.max_new_tokens)
    with models.sampled(contestant) as model:
        leaked = leak(model, sets, seed).values
    return {
        "as_it_is": inside[0],
        "relearnt_in_domain": inside[steps],
        "relearnt_out_of_domain": outside[steps],
        **{f"rounded_to_{bits}_bits": values for bits, values in rounded.items()},
        "leak_at_1": leaked[1],
        "leak_at_k": leaked[leak.samples],
    }


def _attack_sets(tokenizer: Any, data: Data, questions: Sequence[Question]) -> AttackSets:
    """Return an author's questions: relearning is taught the first of them, or facts."""
    facts = [each for each in data.facts if each.set == "world_facts"]
    chosen = (questions[TUNED_EACH:], questions[:TUNED_EACH], facts[:TUNED_EACH])
    pairs = [[(each.question, each.answer) for each in some] for some in chosen]
    asked, taught, others = (records_of(each, FORM) for each in pairs)
    return AttackSets(tokenizer, asked, taught, others)
