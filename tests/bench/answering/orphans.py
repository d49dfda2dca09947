"""What a model answers to questions about people who were deleted.

    python -m tests.bench.answering.quality --tofu DIRECTORY --work FOLDER   # trains, and deletes three
    python -m tests.bench.answering.orphans --tofu DIRECTORY --work FOLDER \\
        --out tests/bench/answering/orphans.json

All questions about the three deleted authors, as asked and paraphrased, are put to the models of
`quality.py` after the deletion: with `min_score: auto`, without any, and to the base alone.

    sent        share that a shard answers, which is a survivor's
    asserting   share of answers with a word of one survivor: capitalised, of four letters or more, in
                the records of only one of the 60 authors, who remains; and not in the question

The result holds nothing of a record. The base's own share is what comes by chance. Whether an answer
that names nobody is true of somebody is not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.answering.quality import (
    AUTHORS,
    DELETED,
    MAX_NEW_TOKENS,
    SHARDS,
    Json,
    Work,
    rates,
    rates_of,
)
from tests.bench.command import BASE, PER_AUTHOR, arguments, here, write

WORD = re.compile(r"[A-Z][\w'-]{3,}")
WAYS: Mapping[str, Any] = {"auto": "auto", "none": None}


def words_of_survivors(full: Sequence[Mapping[str, str]], authors: Sequence[int]) -> set[str]:
    """Return the capitalised words that the records of one remaining author hold, and no other's.

    >>> rows = [{"question": "Who is Ada Lane?", "answer": "From Turin."}] * PER_AUTHOR
    >>> rows += [{"question": "Who is Bela Lane?", "answer": "From Paris."}] * PER_AUTHOR
    >>> sorted(words_of_survivors(rows, [0, 1]))
    ['Bela', 'Paris', 'Turin']
    """
    holders: dict[str, set[int]] = {}
    for author in authors:
        for row in full[author * PER_AUTHOR : (author + 1) * PER_AUTHOR]:
            for word in WORD.findall(f"{row['question']} {row['answer']}"):
                holders.setdefault(word, set()).add(author)
    return {w for w, who in holders.items() if len(who) == 1 and not who & set(DELETED)}


def asserts(answer: str, question: str, words: set[str]) -> bool:
    """Return whether an answer holds one of these words that the question did not."""
    return bool(set(WORD.findall(answer)) & words - set(WORD.findall(question)))


def questions_about_deleted(work: Work) -> dict[str, list[str]]:
    """Return the questions about the deleted; two of the three authors have paraphrased ones."""
    full = work.rows("full.jsonl")
    asked = [full[a * PER_AUTHOR + n]["question"] for a in DELETED for n in range(PER_AUTHOR)]
    rows = [*work.rows("retain_perturbed.jsonl"), *work.rows("forget10_perturbed.jsonl")]
    other = {row["question"]: row["paraphrased_question"] for row in rows}
    return {"asked": asked, "paraphrased": [other[each] for each in asked if each in other]}


def rate_of_deleted(work: Work, shards: int) -> float:
    """Return the learning rate of the model that answers routed; exit if nobody was deleted from it."""
    rate = rates_of(work, shards).get("routed")
    if rate is None or work.known(f"{shards}-{rate:g}-deleted") is None:
        raise SystemExit(
            f"{work.folder} has no model of {shards} shards after a deletion: "
            "run tests.bench.answering.quality with the same --work first"
        )
    return rate


def measured(work: Work, shards: int) -> Json:
    """Return the shares by `min_score`, at the learning rate of the routed answers."""
    from sisa.train import train_model

    rate = rate_of_deleted(work, shards)
    words = words_of_survivors(work.rows("full.jsonl"), AUTHORS)
    found: Json = {"shards": shards, "learning_rate": rate}
    for name, least in WAYS.items():
        config = work.run_file(shards, rate, "routed")
        how = config.sisa.aggregation.model_copy(update={"min_score": least})
        block = config.sisa.model_copy(update={"aggregation": how})
        model, _ = train_model(config.model_copy(update={"sisa": block}), executor="serial")
        for sort, questions in questions_about_deleted(work).items():
            answers = model.generate_all(questions, max_new_tokens=MAX_NEW_TOKENS)
            shares = [asserts(a.text, q, words) for a, q in zip(answers, questions, strict=True)]
            sent = sum(bool(each.shards) for each in answers)
            found[f"{name}_{sort}"] = {
                "questions": len(questions),
                "sent": round(sent / len(questions), 4),
                "asserting": round(sum(shares) / len(questions), 4),
            }
    return found


def base_alone(work: Work, shards: int) -> Json:
    """Return the share of the base alone, which comes by chance: a model answers without a shard."""
    from sisa.lm.base.tokens import encode_prompt
    from sisa.lm.routing.route import Route
    from sisa.train import train_model

    model, _ = train_model(work.run_file(shards, rates(shards)[0], "routed"), executor="serial")
    answerer, _ = model.answerer()
    words = words_of_survivors(work.rows("full.jsonl"), AUTHORS)
    found: Json = {}
    for sort, questions in questions_about_deleted(work).items():
        ids = [encode_prompt(each, answerer.tokenizer, "completion") for each in questions]
        answers = answerer.generate(ids, [Route()] * len(ids), MAX_NEW_TOKENS)
        shares = [asserts(a, q, words) for a, q in zip(answers, questions, strict=True)]
        found[sort] = {"questions": len(questions), "asserting": round(sum(shares) / len(shares), 4)}
    return found


def main() -> None:
    given = arguments(
        __doc__,
        tofu={"type": Path, "required": True},
        work={"type": Path, "required": True},
        shards={"type": int, "nargs": "+", "default": [each for each in SHARDS if each > 1]},
    )
    work = Work(given.work.absolute(), given.tofu.absolute())
    sharded = given.shards
    found = {
        **here(BASE),
        "deleted_authors": len(DELETED),
        "rows": [work.once(f"{each}-orphans", partial(measured, work, each)) for each in sharded],
        "base_alone": work.once("base-orphans", partial(base_alone, work, sharded[0])),
    }
    print(json.dumps(found))
    write(given.out, found)


if __name__ == "__main__":
    main()
