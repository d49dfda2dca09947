"""The design of TOFU in full: its numbers, its contestants in the order in which they are run, its data.

    base          the frozen base
    ours          a deletion-ready model of all records; forget01, forget05 and forget10 deleted from it,
                  one request each; trained from scratch without them
    lora          one ordinary LoRA on all records, and without each forget set under two seeds
    private       the ordinary LoRA on all records, trained by DP-SGD (where opacus is installed)
    method        approximate unlearning of forget10, over the ordinary LoRA

With fewer authors the last ones of TOFU are all there are: a forget set keeps its share of them, and
questions about those who stay are forget10's. Questions that choose rates and batches are not reported:
the first TUNED_EACH of each author of the retain set, and world facts beyond `facts`.

>>> [each.name for each in contestants(Design(keys=1, layouts=(Layout(50, 4, 4),)))][:2]
['50x4-key0', '50x4-key0-forget10']
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from approx.benchmarks.tofu import ForgetSplit, evaluation_sets, read_sets
from approx.evaluation.questions import PromptForm, Question, questions_digest
from sisa.core.digest import digest_of
from sisa.core.errors import InvalidInput, Problem

Kind = Literal["base", "ours", "lora", "private", "method"]
SHARES: Final[dict[ForgetSplit, float]] = {"forget10": 0.1, "forget05": 0.05, "forget01": 0.01}
ALL_AUTHORS, QUESTIONS_EACH, TUNED_EACH = 200, 20, 5
FORM = PromptForm("completion", "{question} {answer}")  # of what is trained on


@dataclass(frozen=True)
class Layout:
    """Shards and slices of a model, and the batch of each shard."""

    shards: int
    slices: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.shards}x{self.slices}"

    @staticmethod
    def of(shards: int, num_records: int) -> Layout:
        """Return the layout of a number of shards, with smaller batches for smaller shards."""
        return Layout(shards, 4, max(1, min(8, num_records // shards // 20)))


@dataclass(frozen=True)
class Design:
    """All numbers that shape the benchmark. Questions are spread evenly over their set."""

    authors: int = ALL_AUTHORS
    layouts: tuple[Layout, ...] = (Layout(50, 4, 4), Layout(16, 4, 8))
    keys: int = 2
    seeds: tuple[int, ...] = (42, 43)
    epochs: int = 3
    rates: tuple[float, ...] = (1e-2, 3e-3, 1e-3)
    batches: tuple[int, ...] = (8, 32)
    tried_authors: int = 20
    lora_layers: str = "top:10"
    lora_r: int = 8
    lora_alpha: int = 16
    retain: int = 200
    facts: int = 100
    wrong_answers: int = 5
    max_new_tokens: int = 64
    methods: tuple[str, ...] = ("npo", "simnpo", "graddiff", "kl_minimisation", "pdu", "undial")
    budgets: tuple[float, ...] = (0.05, 0.2)
    method_rates: tuple[float, ...] = (2e-3, 8e-3)
    method_batch: int = 8
    method_seeds: tuple[int, ...] = (0,)
    attacked_authors: int = 4
    relearning_steps: int = 10
    samples: int = 8
    seed: int = 0

    @property
    def splits(self) -> list[ForgetSplit]:
        """The forget sets that have whole authors, the largest first."""
        return [split for split, share in SHARES.items() if self.authors * share >= 1]


@dataclass(frozen=True)
class Contestant:
    """One model. `without` is the forget set that it was not trained on, or is to forget."""

    name: str
    kind: Kind
    without: ForgetSplit | None = None
    layout: Layout | None = None
    key: int = 0
    seed: int = 0
    scratch: bool = False
    method: str = ""
    budget: float = 0.0
    rate: float = 0.0

    @property
    def steps(self) -> tuple[str, ...]:
        """The cells of the contestant: one that only shows bytes or a rate is asked nothing."""
        only_made = self.scratch or (self.kind == "lora" and self.rate)
        return ("made",) if only_made else ("made", "asked", "attacked")

    @property
    def state(self) -> str:
        """What became of the forget set in the model."""
        if self.without is None:
            return "base" if self.kind == "base" else "trained on all"
        return {"ours": "deleted", "method": "unlearned"}.get(self.kind, "trained without")


def cell_names(design: Design) -> list[str]:
    """Return the names of all cells, in the order in which they are computed."""
    return [f"{each.name}.{step}" for each in contestants(design) for step in each.steps]


def contestants(design: Design) -> list[Contestant]:
    """Return all contestants, the most important ones first."""
    splits = design.splits
    first, *others = [_ours(layout, key) for key in range(design.keys) for layout in design.layouts]
    found = [first, deleted_from(first, splits[0]), *loras_in_full(design), lora(design.seeds[0])]
    found.append(Contestant("base", "base"))
    found += [Contestant("private", "private", seed=design.seeds[0])] if find_spec("opacus") else []
    found += [*_references(design, splits[0]), scratch_of(deleted_from(first, splits[0]))]
    found += _methods(design, splits[0])
    found += [deleted_from(first, each) for each in splits[1:]]
    found += [each for other in others for each in (other, *(deleted_from(other, s) for s in splits))]
    return found + [each for split in splits[1:] for each in _references(design, split)]


def lora(seed: int, without: ForgetSplit | None = None) -> Contestant:
    """Return an ordinary LoRA."""
    name = "lora" if without is None else f"lora-without-{without}-seed{seed}"
    return Contestant(name, "lora", without, seed=seed)


def loras_in_full(design: Design) -> list[Contestant]:
    """Return an ordinary LoRA on all records at each rate; the best of them is the ordinary LoRA."""
    seed = design.seeds[0]
    return [Contestant(f"lora-rate{rate:g}", "lora", seed=seed, rate=rate) for rate in design.rates]


def _ours(layout: Layout, key: int) -> Contestant:
    return Contestant(f"{layout.name}-key{key}", "ours", None, layout, key)


def deleted_from(trained: Contestant, split: ForgetSplit) -> Contestant:
    """Return the model from which a forget set was deleted."""
    return replace(trained, name=f"{trained.name}-{split}", without=split)


def scratch_of(deleted: Contestant) -> Contestant:
    """Return the model that was never trained on what another has deleted."""
    return replace(deleted, name=f"{deleted.name}-scratch", scratch=True)


def trained_of(deleted: Contestant) -> Contestant:
    """Return the model that another was deleted from."""
    assert deleted.layout is not None
    return _ours(deleted.layout, deleted.key)


def _references(design: Design, split: ForgetSplit) -> list[Contestant]:
    return [lora(seed, split) for seed in design.seeds]


def _methods(design: Design, split: ForgetSplit) -> list[Contestant]:
    """Return methods at each budget and rate.

    The highest rate comes first with the smallest budget, and the next one with the next budget: many
    small steps go about as far as few large ones.
    """
    budgets, rates = sorted(design.budgets), sorted(design.method_rates, reverse=True)
    pairs = [
        (budget, rates[(place + turn) % len(rates)])
        for turn in range(len(rates))
        for place, budget in enumerate(budgets)
    ]
    return [
        _method(name, budget, rate, split, seed)
        for seed in design.method_seeds
        for budget, rate in pairs
        for name in design.methods
    ]


def _method(name: str, budget: float, rate: float, split: ForgetSplit, seed: int) -> Contestant:
    full = f"{name}-{budget:g}-{rate:g}-{split}" + (f"-seed{seed}" if seed else "")
    return Contestant(full, "method", split, seed=seed, method=name, budget=budget, rate=rate)


@dataclass(frozen=True)
class Data:
    """TOFU as the benchmark uses it: all records in order, and the questions of each purpose."""

    full: Sequence[Question] = field(repr=False)
    forget: Sequence[Question] = field(repr=False)  # forget10's; those of the others are its last
    retain: Sequence[Question] = field(repr=False)
    facts: Sequence[Question] = field(repr=False)
    tuned: Sequence[Question] = field(repr=False)
    sizes: dict[ForgetSplit, int]

    @property
    def digest(self) -> str:
        """The digest of everything that was read."""
        sets = (self.full, self.forget, self.retain, self.facts, self.tuned)
        return digest_of([questions_digest(each) for each in sets])

    def asked(self, split: ForgetSplit) -> list[Question]:
        """Return the questions of an evaluation; the forget set is called `forget`, by its numbers in
        forget10."""
        return [*self.retain, *self.facts, *self.forget[-self.sizes[split] :]]

    def kept(self, split: ForgetSplit | None) -> int:
        """Return the number of records that are left without a forget set."""
        return len(self.full) - (self.sizes[split] if split else 0)

    def authors(self, split: ForgetSplit, count: int) -> list[list[Question]]:
        """Return the questions of some authors of a forget set, spread evenly over it."""
        gone = self.forget[-self.sizes[split] :]
        each = [gone[at : at + QUESTIONS_EACH] for at in range(0, len(gone), QUESTIONS_EACH)]
        return [list(each[at]) for at in spread(len(each), count)]


def read_data(source: str, design: Design) -> Data:
    """Return the data. Raise InvalidInput with all that is missing, and EnvironmentFault."""
    found = evaluation_sets(source, "forget10")
    full = read_sets(source, {"full": "full"}, plain=True)
    by_set = {name: [each for each in found if each.set == name] for name in {q.set for q in found}}
    gone = by_set["forget10"]
    forgotten = {each: read_sets(source, {each: each}, plain=True) for each in SHARES}
    sizes = {split: len(each) for split, each in forgotten.items()}
    problems = [
        Problem(split, "is not the end of the full set")
        for split, each in forgotten.items()
        if [q.question for q in each] != [q.question for q in full[-len(each) :]]
    ]
    if [each.question for each in gone] != [each.question for each in full[-len(gone) :]]:
        problems.append(Problem("forget10_perturbed", "is not the end of the full set"))
    if problems:
        raise InvalidInput("the data is not TOFU's", where=source, problems=problems)
    retain, wanted = by_set["retain"], design.authors * QUESTIONS_EACH
    if wanted < len(full):
        full, sizes = full[-wanted:], {split: int(wanted * SHARES[split]) for split in design.splits}
        asked = [replace(each, idx=at) for at, each in enumerate(gone[-wanted:])]
        if len(asked) < wanted:
            raise InvalidInput(
                "questions about fewer authors are forget10's",
                where="authors",
                expected=f"at most {len(gone) // QUESTIONS_EACH}, or {ALL_AUTHORS}",
                got=str(design.authors),
            )
        cut = wanted - sizes["forget10"]
        retain = [replace(each, set="retain") for each in asked[:cut]]
        gone = [replace(each, idx=at) for at, each in enumerate(asked[cut:])]
    facts, spare = [], []
    for name in ("real_authors", "world_facts"):
        chosen = set(spread(len(by_set[name]), design.facts))
        facts += [_asked(each, design) for at, each in enumerate(by_set[name]) if at in chosen]
        spare += [_asked(each, design) for at, each in enumerate(by_set[name]) if at not in chosen]
    rest = [each for each in retain if each.idx % QUESTIONS_EACH >= TUNED_EACH]
    tuned = [each for each in retain if each.idx % QUESTIONS_EACH < TUNED_EACH]
    return Data(
        full,
        [replace(_asked(each, design), set="forget") for each in gone],
        [_asked(rest[at], design) for at in spread(len(rest), design.retain)],
        facts,
        [_asked(each, design) for each in tuned] + spare,
        sizes,
    )


def spread(count: int, wanted: int) -> list[int]:
    """Return `wanted` positions spread evenly over `count`, or all of them where there are fewer.

    >>> spread(10, 4), spread(2, 4)
    ([0, 2, 5, 7], [0, 1])
    """
    wanted = min(count, wanted)
    return [number * count // wanted for number in range(wanted)]


def _asked(question: Question, design: Design) -> Question:
    return replace(question, perturbed=question.perturbed[: design.wrong_answers])


def record_id(number: int) -> str:
    """Return a record's id.

    >>> record_id(3999)
    'a199-q19'
    """
    return f"a{number // QUESTIONS_EACH:03}-q{number % QUESTIONS_EACH:02}"


def write_records(data: Data, numbers: Sequence[int], path: Path) -> Path:
    """Write records of the full set as JSON lines, as they are trained on; the subject is the author."""
    rows = [
        {
            "id": record_id(number),
            "subject_id": record_id(number).partition("-")[0],
            "prompt": data.full[number].question,
            "completion": f" {data.full[number].answer}",
        }
        for number in numbers
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


CHOSEN = ("keys", "seeds", "methods", "budgets", "method_rates", "method_seeds")


def shape(design: Design) -> dict[str, Any]:
    """Return the design as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(design)))
    return found


def meaning(design: Design) -> dict[str, Any]:
    """Return what all cells depend on, apart from their names: what else is chosen adds cells."""
    return {name: value for name, value in shape(design).items() if name not in CHOSEN}
