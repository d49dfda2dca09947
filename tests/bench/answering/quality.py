"""How well shards answer together, against one ordinary LoRA fine-tuning of the same records.

    python -m tests.bench.answering.quality --tofu DIRECTORY --work FOLDER \\
        --out tests/bench/answering/quality.json

1, 8, 16 and 50 shards learn 60 authors of TOFU (invented people; 40 of them have paraphrased questions)
at equal total work: the same epochs for all, and a batch of REFERENCE_BATCH / shards, so that a shard
takes as many steps as the one fine-tuning (at 50 shards the minimum of 1 applies: a quarter more). One
shard is the ordinary fine-tuning. Each is trained at two learning rates; each way of answering uses the
rate at which it scores best on questions that are not measured afterwards.

    probability    TOFU's: exp(-mean loss of the answer's tokens), of the answer as it was trained
    rougeL_recall  of the greedy answer, of at most MAX_NEW_TOKENS tokens

These are means over questions about remaining authors, as asked in training and paraphrased, before and
after three authors are deleted, with the same questions for all. Every model is a deletion-ready model,
trained, deleted from and asked as a user does it.

Each result is a file of its own under FOLDER, which is not computed again; an interrupted training
continues at its last checkpoint. Records are under FOLDER only. General utility, more than one
partition and seed, and more than one slice a shard are not covered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from sisa.config.config import MINILM
from sisa.data.samples import to_jsonl
from sisa.store.blobs.files import write_atomic
from tests.bench.command import BASE, PER_AUTHOR, arguments, here, markdown, people, read_rows, write
from tests.models.tiny_model import KEY

EPOCHS, REFERENCE_BATCH, MAX_NEW_TOKENS = 3, 64, 48
SHARDS = (1, 8, 16, 50)
LONGEST_FIRST = (50, 1, 8, 16)
AUTHORS = (*range(20), *range(180, 200), *range(20, 40))  # the first 40 have paraphrased questions
DELETED = (5, 25, 185)
TUNED_ON, SCORED, GENERATED = (0,), (4, 14), (14,)  # places among an author's questions
WAYS = ("routed", "mean_prob", "merged")
MODULES = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    author: int
    place: int
    asked: str
    paraphrased: str
    answer: str


@dataclass(frozen=True)
class Work:
    """The folder of an experiment and the data that it reads."""

    folder: Path
    tofu: Path

    def once(self, name: str, make: Callable[[], Json]) -> Json:
        """Return the result of `make`, computed now or stored before."""
        found = self.known(name)
        if found is None:
            found = make()
            write_atomic(self.folder / "found" / f"{name}.json", json.dumps(found).encode())
            print(name, json.dumps(found), flush=True)
        return found

    def known(self, name: str) -> Json | None:
        """Return the result stored under a name, or None."""
        file = self.folder / "found" / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def rows(self, name: str) -> list[Json]:
        return read_rows(self.tofu / name)

    def questions(self, places: Sequence[int]) -> list[Question]:
        """Return the questions about remaining authors that have paraphrased questions."""
        first, last = self.rows("retain_perturbed.jsonl"), self.rows("forget10_perturbed.jsonl")
        full = self.rows("full.jsonl")
        other = {row["question"]: row["paraphrased_question"] for row in (*first, *last)}
        found = []
        for author in AUTHORS[:40]:
            for place in places if author not in DELETED else ():
                row = full[author * PER_AUTHOR + place]
                asked = row["question"]
                found.append(Question(author, place, asked, other[asked], row["answer"]))
        return found

    def records(self) -> Path:
        """Write all authors' records to a file, author by author."""
        file, full = self.folder / "records.jsonl", people(self.tofu)
        rows = [full[author * PER_AUTHOR + place] for author in AUTHORS for place in range(PER_AUTHOR)]
        file.write_text(to_jsonl(rows), encoding="utf-8")
        (self.folder / "partition.key").write_text(KEY)
        return file

    def run_file(self, shards: int, rate: float, way: str) -> Any:
        from sisa.config.config import RunConfig

        batch = batch_of(shards)
        micro = min(8, batch)
        at = self.folder / f"{shards}-shards-{rate:g}"
        block = {
            "shards": shards,
            "slices": 1,
            "embedder": MINILM,
            "aggregation": way,
            "partition_key_file": self.folder / "partition.key",
        }
        return RunConfig.model_validate(
            {
                "base_model": BASE,
                "datasets": ({"path": str(self.folder / "records.jsonl")},),
                "output_dir": at,
                "witness": self.folder / f"{at.name}-witness",
                "keyring": self.folder / f"{at.name}-keys",
                "probe": False,
                "lora_target_modules": tuple(f"{n}.{name}" for n in range(20, 30) for name in MODULES),
                "micro_batch_size": micro,
                "gradient_accumulation_steps": batch // micro,
                "num_epochs": EPOCHS,
                "learning_rate": rate,
                "sisa": block,
            }
        )


def rates(shards: int) -> tuple[float, float]:
    """Return the learning rates to try; a large batch has larger ones."""
    return (1e-2, 3e-3) if shards <= 16 else (3e-3, 1e-3)


def batch_of(shards: int) -> int:
    """Return the number of records of one optimizer step."""
    return max(1, REFERENCE_BATCH // shards)


def trained(work: Work, shards: int, rate: float) -> Json:
    """Train a model, and score the questions for tuning by each way of answering."""

    def make() -> Json:
        from sisa.train import train_model

        began = time.perf_counter()
        _, taken = train_model(work.run_file(shards, rate, "routed"), executor="serial")
        seconds = time.perf_counter() - began
        return {
            "seconds": round(seconds, 1),
            "record_epochs": taken.record_epochs_trained,
            "tuning": {way: tuned(way) for way in ways(shards)},
        }

    def tuned(way: str) -> float:
        measured = asked(work, shards, rate, way, TUNED_ON, ())
        return round(fmean(each["probability"] for each in measured.values()), 4)

    return work.once(f"{shards}-{rate:g}-trained", make)


def ways(shards: int) -> tuple[str, ...]:
    return WAYS if shards > 1 else ("routed",)


def asked(
    work: Work, shards: int, rate: float, way: str, scored: Sequence[int], generated: Sequence[int]
) -> Json:
    """Return means over questions of a model's answers, combined in one way."""
    from approx.evaluation.evaluated_models import DeletionReadyModel
    from approx.evaluation.questions import PromptForm
    from approx.metrics.probability import probability
    from approx.metrics.word_overlap import rougeL_recall
    from sisa.train import train_model

    model, _ = train_model(work.run_file(shards, rate, way), executor="serial")
    served, form = DeletionReadyModel(model), PromptForm("completion")
    rows = 1 if way == "mean_prob" else 8
    found: Json = {}
    for name in ("asked", "paraphrased"):
        questions = work.questions(scored)
        pairs = [(getattr(each, name), " " + each.answer) for each in questions]
        losses = [each.loss for each in served.score(pairs, form, batch_size=rows)]
        found[name] = {"probability": round(fmean(map(probability, losses)), 4)}
        if generated:
            chosen = work.questions(generated)
            prompts = [getattr(each, name) for each in chosen]
            answers = served.generate(prompts, form, MAX_NEW_TOKENS, batch_size=8)
            recalls = map(rougeL_recall, (each.answer for each in chosen), answers)
            found[name]["rougeL_recall"] = round(fmean(recalls), 4)
    return found


def measure_shards(work: Work, shards: int) -> None:
    """Train and measure one number of shards, delete, and measure again."""
    for rate in rates(shards):
        trained(work, shards, rate)
    best = rates_of(work, shards)

    def measured(way: str, when: str) -> Json:
        name = f"{shards}-{best[way]:g}-{way}-{when}"
        return work.once(name, lambda: asked(work, shards, best[way], way, SCORED, GENERATED))

    for way in best:
        measured(way, "before")
    for rate in sorted(set(best.values())):
        deleted(work, shards, rate)
    for way in best:
        measured(way, "after")


def rates_of(work: Work, shards: int) -> dict[str, float]:
    """Return the learning rate at which each way of answering scores best."""
    tuning = {rate: work.known(f"{shards}-{rate:g}-trained") for rate in rates(shards)}
    scores = [(each["tuning"], rate) for rate, each in tuning.items() if each is not None]
    if not scores:
        return {}
    return {way: max((score[way], rate) for score, rate in scores)[1] for way in ways(shards)}


def rows_of(work: Work, shards: int) -> list[Json]:
    """Return the rows measured so far; null where a run was stopped."""
    tuned = {f"{rate:g}": work.known(f"{shards}-{rate:g}-trained") for rate in rates(shards)}
    return [
        {
            "shards": shards,
            "answers": way if shards > 1 else "ordinary LoRA",
            "batch": batch_of(shards),
            "learning_rate": rate,
            "tuning": {name: each and each["tuning"][way] for name, each in tuned.items()},
            "before": work.known(f"{shards}-{rate:g}-{way}-before"),
            "after": work.known(f"{shards}-{rate:g}-{way}-after"),
            "deletion": work.known(f"{shards}-{rate:g}-deleted"),
        }
        for way, rate in rates_of(work, shards).items()
    ]


def deleted(work: Work, shards: int, rate: float) -> Json:
    """Delete three authors, or finish their deletion; return the seconds that it took."""

    def make() -> Json:
        from sisa.train import train_model

        model, _ = train_model(work.run_file(shards, rate, "routed"), executor="serial")
        began = time.perf_counter()
        ids = [f"a{author:03}-q{place:02}" for author in DELETED for place in range(PER_AUTHOR)]
        live = [each.id for each in model.where(ids) if each.state != "deleted"]
        if live:
            model.forget(live)
        else:
            model.resume()  # a deletion that was cut short
        return {"seconds": round(time.perf_counter() - began, 1)}

    return work.once(f"{shards}-{rate:g}-deleted", make)


def measure(work: Work, workers: int) -> Json:
    """Measure everything in some processes; with none, return what has been found so far."""
    work.folder.mkdir(parents=True, exist_ok=True)
    work.records()
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for each in [pool.submit(measure_shards, work, shards) for shards in LONGEST_FIRST]:
                each.result()
    rows = [row for shards in SHARDS for row in rows_of(work, shards)]
    return {
        **here(BASE),
        "authors": len(AUTHORS),
        "deleted_authors": len(DELETED),
        "records": len(AUTHORS) * PER_AUTHOR,
        "epochs": EPOCHS,
        "reference_batch": REFERENCE_BATCH,
        "adapters": "all linear modules of the top third, rank 8",
        "scored_questions": len(work.questions(SCORED)),
        "generated_answers": len(work.questions(GENERATED)),
        "rows": rows,
    }


def table(found: Json) -> Iterator[str]:
    """Yield a Markdown table: before / after the deletion."""
    measures = {"probability": "probability", "ROUGE-L": "rougeL_recall"}
    columns = {
        f"{title}, {q}": (q, m) for q in ("asked", "paraphrased") for title, m in measures.items()
    }
    lines = []
    for row in found["rows"]:
        pairs = (
            " / ".join(_shown(row[when], *column) for when in ("before", "after"))
            for column in columns.values()
        )
        lines.append((row["shards"], row["answers"].replace("_", " "), row["learning_rate"], *pairs))
    yield from markdown(("shards", "answers", "rate", *columns), lines)


def _shown(found: Json | None, questions: str, measure: str) -> str:
    return "-" if found is None else f"{found[questions][measure]:.2f}"


def main() -> None:
    given = arguments(
        __doc__,
        tofu={"type": Path, "required": True},
        work={"type": Path, "required": True},
        workers={"type": int, "default": 2, "help": "0: write what has been found"},
    )
    found = measure(Work(given.work.absolute(), given.tofu.absolute()), given.workers)
    print("\n".join(table(found)))
    write(given.out, found)


if __name__ == "__main__":
    main()
