"""The whole promise in minutes: train, ask, find, delete, ask again, prove.

Rules: it uses the public API as any caller would, on the embedded base model and on made-up people. A
step that fails to show what it should is reported as it is found, never smoothed over: `answered`
says whether the trained model knew the answer, `leaked` whether it still does after the deletion.

Not covered: tuning; data of your own (`sisa init`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.observe.reporting import say, watched
from cluster.render.render import ENDED_AT_ONCE
from sisa import Model, open_model, train_model
from sisa.config.runfile import load_run_file
from sisa.config.template import FEW_RECORDS, commented_run_file
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.data.samples import distinctive_word, make_corpus, make_people, to_jsonl
from sisa.flows.scratch import prepare_base
from sisa.flows.wiring.opening import OpenExecutor
from sisa.store.blobs.files import write_atomic

RECORDS_PER_PERSON = 5
# Few texts, often repeated: so small a base, trained for minutes, learns that answers hold names and
# places, and adapters learn which (measured: 95 of 100 answers; with many texts, each seen once, none).
CORPUS_TEXTS = 600
SCRATCH = {  # about 10 million parameters, minutes on two cores
    "corpus": [{"path": "corpus.jsonl"}],
    "vocab_size": 2048,
    "layers": 8,
    "context_len": 128,
    "tokens": 200_000,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "threads": 2,
}
OVER_SCRATCH = {"micro_batch_size": 2, "learning_rate": 3e-3, "num_epochs": 24}
SAMPLE_PEOPLE = 20


@dataclass(frozen=True)
class Start:
    """What `sisa init` wrote."""

    run_file: Path
    data_file: Path
    records: int


@dataclass
class Story:
    """What happened, step by step; seconds of wall time."""

    directory: str = ""
    records: int = 0
    question: str = ""
    answer_before: str = ""
    answer_after: str = ""
    answered: bool = False
    leaked: bool = False
    subject: str = ""
    shard: int = 0
    slice: int = 0
    deleted_records: int = 0
    slices_retrained: int = 0
    record_epochs_retrained: int = 0
    record_epochs_full: int = 0
    equal: bool = False
    reason: str = ""
    stages_replayed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, told: str) -> Iterator[None]:
        say(f"\n== {told}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)

    def to_json(self) -> dict[str, Any]:
        share = self.record_epochs_retrained / max(1, self.record_epochs_full)
        return asdict(self) | {"share_of_full_training": round(share, 4)}

    def summary(self) -> str:
        """The end of the story in words."""
        share = 100 * self.record_epochs_retrained / max(1, self.record_epochs_full)
        knew = "yes" if self.answered else "NO"
        gone = "STILL KNOWN" if self.leaked else "gone"
        proof = "equal, byte for byte" if self.equal else self.reason or "DIFFERENT"
        return "\n".join(
            [
                f"trained      {self.records} records, 4 shards x 3 slices, in {self.directory}",
                f"asked        {self.question}",
                f"  before     {self.answer_before or ENDED_AT_ONCE}   (knows the fact: {knew})",
                f"  after      {self.answer_after or ENDED_AT_ONCE}   (the fact is {gone})",
                f"deleted      {self.deleted_records} records of {self.subject}, "
                f"shard {self.shard}, slice {self.slice}",
                f"retrained    {self.slices_retrained} slices, {self.record_epochs_retrained} of "
                f"{self.record_epochs_full} record-epochs ({share:.1f}% of training it all again)",
                f"proof        {self.stages_replayed} stages of shard {self.shard} trained from scratch "
                f"without the records: {proof}",
                "seconds      " + ", ".join(f"{name} {took}" for name, took in self.seconds.items()),
            ]
        )


def write_start(
    directory: Path, num_people: int = SAMPLE_PEOPLE, *, from_scratch: bool = False
) -> Start:
    """Write a run file and sample data; `from_scratch` also a corpus, and a base to train on it.

    Raises InvalidInput where the directory holds anything.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInput(
            "the directory is not empty",
            where=str(directory),
            next_step="name another directory, or remove this one",
        )
    rows = make_people(num_people, RECORDS_PER_PERSON)
    start = Start(directory / "run.yaml", directory / "people.jsonl", len(rows))
    write_atomic(start.data_file, to_jsonl(rows).encode())
    chosen: dict[str, Any] = dict(FEW_RECORDS)
    if from_scratch:
        corpus = make_corpus(CORPUS_TEXTS)
        write_atomic(directory / "corpus.jsonl", to_jsonl(corpus).encode())
        chosen |= OVER_SCRATCH
        chosen |= {"base_model": {"scratch": SCRATCH}, "sequence_len": SCRATCH["context_len"]}
    write_atomic(start.run_file, commented_run_file("people.jsonl", "model", **chosen).encode())
    return start


def tell(
    directory: Path,
    num_people: int,
    num_epochs: int | None,
    executor: str | OpenExecutor,
    *,
    from_scratch: bool = False,
) -> Story:
    """Run the whole story in a new directory."""
    story = Story(directory=str(directory))
    start = write_start(directory, num_people, from_scratch=from_scratch)
    config = load_run_file(start.run_file)
    if num_epochs is not None:
        config = config.model_copy(update={"num_epochs": num_epochs})
    with watched() as report:
        if from_scratch:
            with story.step("base", "training a base from scratch, on a corpus of nobody's data"):
                prepare_base(
                    config, read_records(config.datasets, limits=config.limits), executor, report
                )
        else:
            with story.step("base", "fetching the base model (once; kept in your cache)"):
                _fetch(config.base)
        with story.step("train", f"training on {start.records} records of {num_people} invented people"):
            model, taken = train_model(config, executor=executor, report=report)
            story.records = taken.records
        _ask(story, model, num_people)
        _delete(story, open_model(model.directory, executor=executor, report=report), num_people)
    return story


def _fetch(base_model: str) -> None:
    from sisa.lm.base.weights import resolve_base

    resolve_base(base_model)


def _ask(story: Story, model: Model, num_people: int) -> None:
    """Ask about one person until the model answers rightly, and look up where that person is."""
    rows = make_people(num_people, RECORDS_PER_PERSON)
    subject = _typical(model, rows)
    about = [row for row in rows if row["subject_id"] == subject]
    with story.step("ask", "asking the model about one of them"):
        answers = model.generate_all([row["prompt"] for row in about], max_new_tokens=16)
        known = [
            distinctive_word(row["completion"]) in answer.text
            for row, answer in zip(about, answers, strict=True)
        ]
        chosen = known.index(True) if any(known) else 0
        story.question = _one_line(about[chosen]["prompt"])
        story.answer_before = _one_line(answers[chosen].text)
        story.answered = known[chosen]
        story.subject = subject
    with story.step("where", "looking up where that person's records live"):
        located = model.where([row["id"] for row in about])
        story.shard, story.slice = located[0].shard, located[0].slice
        say(f"shard {story.shard}, slice {story.slice}, in {len(located[0].checkpoints)} checkpoints")


def _typical(model: Model, rows: Sequence[Mapping[str, str]]) -> str:
    """The person whose deletion costs the median of those that retrain anything (who was alone in a
    last slice leaves nothing to retrain)."""
    people = list(dict.fromkeys(row["subject_id"] for row in rows))
    plans = {who: model.plan_forget(subject=who).forgetting for who in people}
    costs = {who: plan.record_epochs_retrained for who, plan in plans.items()}
    ranked = sorted((who for who in people if costs[who]), key=lambda who: costs[who])
    return ranked[len(ranked) // 2] if ranked else people[0]


def _delete(story: Story, model: Model, num_people: int) -> None:
    rows = make_people(num_people, RECORDS_PER_PERSON)
    row = next(each for each in rows if _one_line(each["prompt"]) == story.question)
    with story.step("forget", "deleting that person and retraining what they touched"):
        request = model.forget(subject=story.subject).request
        if request is not None:
            story.deleted_records = request.num_records
            story.slices_retrained = sum(retrained for _, _, retrained in request.shards)
            story.record_epochs_retrained = request.record_epochs_retrained
            story.record_epochs_full = request.record_epochs_full
    with story.step("ask again", "asking again"):
        story.answer_after = _one_line(model.generate(row["prompt"], max_new_tokens=16).text)
        story.leaked = distinctive_word(row["completion"]) in story.answer_after
    with story.step("replay", "training that shard from scratch without them, to compare the bytes"):
        proof = model.verify("sample", shard=story.shard)
        mine = next(each for each in proof.shards if each.shard == story.shard)
        story.equal = proof.ok and mine.equal is True
        story.reason = mine.reason
        story.stages_replayed = mine.stages


def _one_line(text: str) -> str:
    return " ".join(text.split())
