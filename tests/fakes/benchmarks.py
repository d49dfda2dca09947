"""Invent data in the layouts of the benchmarks, and logs in that of published ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from approx.benchmarks.tofu import ForgetSplit
from approx.evaluation.question_log import PUBLISHED, ROW_COLUMNS, LogRow
from sisa.data.samples import make_people

ADA, BOB = "Ada Test", "Bob Test"
SPLIT: ForgetSplit = "forget01"
RETAIN_OF: dict[ForgetSplit, str] = {
    "forget01": "retain99",
    "forget05": "retain95",
    "forget10": "retain90",
}
Rows = list[dict[str, Any]]


def made_up() -> dict[str, Rows]:
    """Return sets in TOFU's layout; the last person should be forgotten."""
    people = make_people(4, 2)
    answers = [row["completion"].strip() for row in people]
    others = answers[::-1]
    rows = [_row(people[n]["prompt"], answers[n], others[n]) for n in range(len(people))]
    retain, forget = rows[:-2], rows[-2:]
    facts = [_fact(1), _fact(5)]
    plain = {name: [_plain(row) for row in some] for name, some in
             {"full": rows, SPLIT: forget, RETAIN_OF[SPLIT]: retain}.items()}  # fmt: skip
    return plain | {
        "retain_perturbed": retain,
        f"{SPLIT}_perturbed": forget,
        "real_authors_perturbed": facts[:1],
        "world_facts_perturbed": facts,
    }


def write_made_up(directory: Path, sets: dict[str, Rows] | None = None) -> Path:
    """Write the sets as a directory of JSONL files."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (sets or made_up()).items():
        (directory / name).parent.mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def write_published(path: Path, rows: Iterable[LogRow]) -> Path:
    """Write rows in the form that locuslab publishes, with columns that this program ignores."""
    held: dict[str, dict[str, Any]] = {}
    names = {name: file for file, name in PUBLISHED.items()}
    for row in rows:
        columns = held.setdefault(names["forget" if "forget" in row.set else row.set], {})
        values = {name: getattr(row, name) for name in ROW_COLUMNS} | {
            "gt_loss": row.avg_gt_loss * row.num_token_gt,
            "generated_text": ["a prompt", row.generation, row.ground_truth],
        }
        for name, value in values.items():
            columns.setdefault(name, {})[str(row.idx)] = value
    path.write_text(json.dumps(held, indent=4), encoding="utf-8")
    return path


def _row(question: str, answer: str, other: str) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "paraphrased_answer": f"Surely: {answer}",
        "perturbed_answer": [f"Surely: {other}!", "Surely: nothing."],
    }


def _fact(n: int) -> dict[str, Any]:
    wrong = [str(n), str(n + 2)]
    return {"question": f"What comes after {n}?", "answer": str(n + 1), "perturbed_answer": wrong}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("question", "answer")}


def _rwku_rows() -> dict[str, Rows]:
    """Return sets in RWKU's layout, about two people."""
    probes = [
        {
            "subject": subject,
            "query": f"{subject} number {n} is ___",
            "answer": f"thing {n}",
            "type": kind,
        }
        for subject in (ADA, BOB)
        for n, kind in enumerate(["reverse query", "cross lingual (French)", "incontext learning"])
    ]
    texts = [
        {"subject": subject, "text": f"{subject} did {n} things"}
        for subject in (ADA, BOB)
        for n in (1, 2)
    ]
    mmlu = {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "task": "some_sums"}
    truthful = {"choices": ["It is round.", "It is flat."], "labels": [1, 0]}
    return {
        **{
            f"forget_level{level}": [{**each, "level": str(level)} for each in probes]
            for level in (1, 2, 3)
        },
        **{
            f"neighbor_level{level}": [{**each, "query": f"near {each['query']}"} for each in probes]
            for level in (1, 2)
        },
        "forget_mia": texts,
        "retain_mia": [{**each, "text": f"Elsewhere {each['text']}"} for each in texts],
        "utility_mmlu": [{**mmlu, "examples": [mmlu]}],
        "utility_retain_bbh": [{"cot": "Think.", "question": "not True is", "answer": "False"}],
        "utility_truthful": [{"question": "What is the Earth?", "mc1_targets": truthful}],
        "utility_triviaqa": [{"question": "Who sang?", "answers": ["The Beatles", "Fab Four"]}],
        "utility_fluency": [{"instruction": "Write a line."}],
    }


def _muse_rows() -> dict[str, Rows]:
    """Return sets in MUSE's layout."""
    questions = {
        name: [{"question": f"{name} {n}?", "answer": f"answer {n}"} for n in range(3)]
        for name in ("forget_qa", "retain_qa", "forget_qa_icl", "retain_qa_icl")
    }
    texts = {
        name: [{"text": f"the {name} text {n}"} for n in range(3)] for name in ("forget", "holdout")
    }
    passages = [{"prompt": f"passage {n} begins", "gt": f"and then ends {n}"} for n in range(3)]
    return {
        **{f"knowmem/{name}": rows for name, rows in questions.items()},
        **{f"privleak/{name}": rows for name, rows in texts.items()},
        "verbmem/forget": passages,
    }


def _whp_rows() -> dict[str, Rows]:
    """Return prompts in the layout of `sisa eval whp`."""
    odd: dict[str, Any] = {
        "prompt": "The school was",
        "idiosyncratic": ["Hog warts"],
        "generic": ["big", "far"],
    }
    return {
        "completions": [
            {"prompt": f"Prompt {n} of", "references": ["Hog warts", "Ron"]} for n in range(3)
        ],
        "probabilities": [{**odd, "prompt": f"{odd['prompt']} {n}"} for n in range(3)],
        "utility": [{"question": "1 + 1?", "answer": "2"}],
    }


def _wmdp_rows() -> dict[str, Rows]:
    """Return sets in WMDP's layout, of harmless questions."""
    rows = [
        {
            "question": f"What comes after {n}?",
            "choices": ["not it", f"number {n + 1}", "x", "y"],
            "answer": 1,
        }
        for n in range(3)
    ]
    return {"wmdp-bio": rows, "mmlu": rows[:1]}


def _stereotype_rows() -> dict[str, Rows]:
    """Return pairs in the layout of CrowS-Pairs, about nobody."""
    return {
        "crows_pairs": [
            {
                "sent_more": f"Greens are late {n}.",
                "sent_less": f"Blues are late {n}.",
                "bias_type": kind,
            }
            for n, kind in enumerate(["gender", 2, "age", "age"])
        ]
    }


MADE_UP: dict[str, Callable[[], dict[str, Rows]]] = {
    "rwku": _rwku_rows,
    "muse": _muse_rows,
    "whp": _whp_rows,
    "wmdp": _wmdp_rows,
    "stereotypes": _stereotype_rows,
}
