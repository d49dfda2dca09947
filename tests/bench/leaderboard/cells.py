"""Compute one cell of the leaderboard: make its model, ask it, and return the result as numbers.

All models share the base's lower layers, which no training changes (`split_model.py`). The fine-tuned
model is the base with a LoRA patch merged in. A method trains a new patch over it, so the model with
the patch disabled is the model before. A result holds numbers only; the log beside it holds answers, as
every log does.

Budgets are equal in operations, not in seconds. Operations are those of `stopping.py` for the whole
model, as if no hidden state were remembered and the backward pass went down to the first layer. They
are counted step by step from the batches that the run will see, with the final evaluation of the loss
and the forward passes of the reference; the plan and the final count agree. Seconds are those of this
machine.

    results = compete(design, HeldCells(directory, design, maker.inputs, maker.make))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from approx.benchmarks.tofu_aggregates import aggregates
from approx.evaluation.asking import Asking, evaluate
from approx.evaluation.evaluated import AnswerScore, EvaluatedModel, PromptForm, PromptKind
from approx.evaluation.evaluated_models import HuggingFaceModel, tokens_of
from approx.evaluation.question_log import LogRow, read_log
from approx.methods.method import Method, Role, Rows, mean_nll
from approx.methods.registry import make_method
from approx.unlearning.examples import Sets, make_refusals
from approx.unlearning.private_training import PrivacySettings, train_privately
from approx.unlearning.schedule import ScheduleSettings, plan_steps
from approx.unlearning.stopping import Bounds, Compute, End
from approx.unlearning.unlearn import unlearn
from sisa.core.digest import canonical_json
from sisa.lm.base.adapter import adapter_tensors, attach, lora_config
from sisa.lm.base.low_rank import read_tensors, tensor_bytes
from sisa.lm.base.tokens import Tokens, encode_plain
from sisa.lm.base.weights import BaseFiles, load_tokenizer
from sisa.store.blobs.files import held_names, read_whole, write_atomic
from tests.bench.leaderboard.authors import Data, asked_of, kept_questions, to_forget
from tests.bench.leaderboard.plan import (
    PRIVATE,
    Cell,
    Design,
    Result,
    cell_name,
    nearest_steps,
    reference_cells,
    training_name,
)
from tests.bench.leaderboard.split_model import SplitModel, load_split

FORM = PromptForm("completion", "Question: {question}\nAnswer: {answer}")
SCORED_AT_ONCE = 16
AT_THE_END = Bounds(check_every=10**6)
MANY_EPOCHS = 200
WARMUP_STEPS = 10


@dataclass(frozen=True)
class FineTuning(Method):
    """The training of the model to unlearn from: L = NLL of the examples."""

    name: ClassVar[str] = "fine_tuning"

    def forget_term(self, rows: Mapping[Role, Rows]) -> Tensor:
        return mean_nll(rows["forget"].current_BTV, rows["forget"].batch)


@dataclass(frozen=True)
class Done:
    """How a training ended, and its cost."""

    ending: str
    steps: int
    compute: Compute

    @staticmethod
    def of(end: End) -> Done:
        return Done(end.ending.value, end.step, end.compute)


@dataclass
class Halves:
    """An EvaluatedModel: the upper layers score over remembered states, the whole model generates."""

    upper: EvaluatedModel
    whole: EvaluatedModel
    digest: str
    name: str = "cell"
    kind: PromptKind = "completion"

    def score(
        self, pairs: Sequence[tuple[str, str]], form: PromptForm, batch_size: int
    ) -> list[AnswerScore]:
        return self.upper.score(pairs, form, batch_size)

    def generate(
        self, questions: Sequence[str], form: PromptForm, max_new_tokens: int, batch_size: int
    ) -> list[str]:
        return self.whole.generate(questions, form, max_new_tokens, batch_size)


class CellMaker:
    """Compute the cells of one base and one data set, in this process."""

    def __init__(self, base: BaseFiles, data: Data, design: Design, directory: Path) -> None:
        self._base, self._data, self._design, self._directory = base, data, design, directory
        self.inputs = {"base": base.digest, "data": data.digest}
        self._tokenizer = load_tokenizer(base.directory)
        self._plain: SplitModel | None = None
        self._tuned: SplitModel | None = None

    def make(self, cell: Cell, name: str) -> Result:
        """Return a cell's result; `name` names its log.

        Raise InvalidInput, IntegrityError or EnvironmentFault.
        """
        if cell.kind == "private":
            return self._privately_tuned(cell, name)
        if cell.method is None:
            return self._fine_tuned(cell, name)
        if self._tuned is None:
            self._tuned = self._with_all_authors()
        return self._unlearned(cell, name, self._tuned)

    def _fine_tuned(self, cell: Cell, name: str) -> Result:
        split = self._without_authors()
        tensors, done = self._taught(cell, split)
        patched = attach(split.upper, self._lora(split), tensors, init_seed=cell.seed)
        result = self._measured(cell, name, split, patched, done)
        patched.unload()
        return result

    def _privately_tuned(self, cell: Cell, name: str) -> Result:
        """Return the result of DP-SGD on all authors, at the cost that its random batches expect."""
        split, examples = self._without_authors(), self._tokens(kept_questions(self._data, 0))
        patched = attach(split.upper, self._lora(split), None, init_seed=cell.seed)
        started = time.monotonic()
        pace = self._design.epochs, cell.learning_rate, cell.seed
        steps, epsilon = by_dp_sgd(patched, examples, *pace)
        trained = sum(each.numel() for each in patched.parameters() if each.requires_grad)
        positions = sum(len(each.input_ids) for each in examples) * self._design.epochs
        compute = Compute(0, trained, positions, 0, time.monotonic() - started)
        result = self._measured(cell, name, split, patched, Done("finished", steps, compute))
        patched.unload()
        return {**result, "privacy": {**PRIVATE, "epsilon": epsilon}}

    def _without_authors(self) -> SplitModel:
        self._plain = self._plain or load_split(self._base.directory, self._design.upper_layers)
        return self._plain

    def _taught(self, cell: Cell, split: SplitModel) -> tuple[dict[str, Tensor], Done]:
        """Return a fine-tuned patch. It is stored: other questions can be asked of the same model."""
        path = self._directory / "models" / training_name(cell, self._design, self.inputs)
        weights, note = path.with_suffix(".safetensors"), path.with_suffix(".json")
        if note.name not in held_names(note.parent):
            examples = self._tokens(kept_questions(self._data, cell.forgotten))
            patched = attach(split.upper, self._lora(split), None, init_seed=cell.seed)
            end = unlearn(patched, Sets(examples), FineTuning(), tuning(cell, self._design), AT_THE_END)
            write_atomic(weights, tensor_bytes(adapter_tensors(patched)))
            write_atomic(note, canonical_json(asdict(Done.of(end))))
            patched.unload()
        held = json.loads(read_whole(note, "fine-tuning's note"))
        tensors = read_tensors({weights.name: read_whole(weights, "fine-tuned patch")}, weights.name)
        return tensors, Done(held["ending"], held["steps"], Compute(**held["compute"]))

    def _unlearned(self, cell: Cell, name: str, tuned: SplitModel) -> Result:
        method, sets = self._method(cell), self._sets(cell)
        patched = attach(tuned.upper, self._lora(tuned), None, init_seed=cell.seed)
        trained = sum(each.numel() for each in patched.parameters() if each.requires_grad)
        settings = self._matched(cell, method, sets, (_count(tuned.whole), trained))
        end = unlearn(patched, sets, method, settings, AT_THE_END)
        result = self._measured(cell, name, tuned, patched, Done.of(end))
        patched.unload()
        return result

    def _with_all_authors(self) -> SplitModel:
        """Return the fine-tuned model, with its patch merged into a copy of the weights."""
        split = load_split(self._base.directory, self._design.upper_layers)
        tensors, _ = self._taught(reference_cells(self._design)[2], split)
        attach(split.upper, self._lora(split), tensors, init_seed=0).merge_and_unload()
        return split

    def _lora(self, split: SplitModel) -> Any:
        wanted = {
            "lora_target_modules": "all-linear",
            "lora_r": self._design.lora_r,
            "lora_alpha": self._design.lora_alpha,
            "lora_dropout": 0.0,
        }
        return lora_config(wanted, split.upper)

    def _matched(
        self, cell: Cell, method: Method, sets: Sets, sizes: tuple[int, int]
    ) -> ScheduleSettings:
        share = self._design.budget_share * cell.forgotten / self._design.forgotten
        budget = share * 6 * sizes[0] * self._full_tokens()
        return within(budget, method, sets, unlearning(cell, self._design), sizes)

    def _full_tokens(self) -> int:
        settings = tuning(reference_cells(self._design)[2], self._design)
        return positions_of(self._tokens(kept_questions(self._data, 0)), settings)

    def _method(self, cell: Cell) -> Method:
        given = {} if cell.alpha is None else {"alpha": cell.alpha}
        return make_method(cell.method or "", given)

    def _sets(self, cell: Cell) -> Sets:
        forget = self._tokens(to_forget(self._data, cell.forgotten))
        ends = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        refusals = [encode_plain(f" {each}", self._tokenizer) + ends for each in self._data.refusals]
        retain = self._tokens(kept_questions(self._data, cell.forgotten))
        return Sets(forget, retain, make_refusals(forget, refusals, cell.seed))

    def _tokens(self, questions: Sequence[Any]) -> list[Tokens]:
        return tokens_of([(each.question, each.answer) for each in questions], FORM, self._tokenizer)

    def _log(self, name: str) -> Path:
        return self._directory / "logs" / f"{name}.jsonl"

    def _measured(self, cell: Cell, name: str, split: SplitModel, patched: Any, done: Done) -> Result:
        started = time.monotonic()
        model = Halves(
            HuggingFaceModel("upper", name, patched, self._tokenizer, "cpu"),
            HuggingFaceModel("whole", name, split.whole, self._tokenizer, "cpu"),
            name,
        )
        asking = Asking(FORM, self._design.max_new_tokens)
        questions = asked_of(cell, self._data, self._design)
        rows = evaluate(model, questions, self._log(name), asking, batch_size=SCORED_AT_ONCE)
        seconds = time.monotonic() - started
        counted = replace(done.compute, num_parameters=_count(split.whole))
        return {
            "cell": asdict(cell),
            "ending": done.ending,
            "steps": done.steps,
            "compute": counted.to_json(self._full_tokens()),
            "seconds_asking": seconds,
        } | summed_up(rows, self._references(cell))

    def _references(self, cell: Cell) -> list[list[LogRow]]:
        """Return the rows of a cell's references. A cell of another size has none."""
        if cell.kind == "size":
            return []
        first, second, _ = reference_cells(self._design)
        judges = {first: [], second: [first]}.get(cell, [first, second])
        names = [cell_name(each, self._design, self.inputs) for each in judges]
        return [read_log(self._log(each))[1] for each in names]


def summed_up(rows: Sequence[LogRow], references: Sequence[Sequence[LogRow]]) -> dict[str, Any]:
    """Return the numbers of a log, without any question or answer."""
    found = aggregates(rows, references)
    attacks = found.attacks_against_reference or {}
    return {
        "num_questions": found.num_questions,
        "model_utility": found.model_utility,
        "aggregate": found.aggregate,
        "nine": found.nine,
        "forget": asdict(found.forget),
        "forget_quality": None if found.forget_quality is None else asdict(found.forget_quality),
        "attacks_against_reference": {name: each.value for name, each in attacks.items()},
    }


def _count(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())


def tuning(cell: Cell, design: Design) -> ScheduleSettings:
    """Return the schedule of the base's fine-tuning."""
    return replace(unlearning(cell, design), num_epochs=design.epochs, warmup_steps=WARMUP_STEPS)


def unlearning(cell: Cell, design: Design) -> ScheduleSettings:
    """Return the schedule of a method, before its steps are cut to the budget."""
    return uncut(cell.learning_rate, design.batch_size, cell.seed)


def uncut(rate: float, batch_size: int, seed: int) -> ScheduleSettings:
    """Return a schedule that is longer than any budget."""
    return ScheduleSettings(
        learning_rate=rate,
        num_epochs=MANY_EPOCHS,
        batch_size=batch_size,
        gradient_accumulation_steps=1,
        weight_decay=0.0,
        seed=seed,
    )


def by_dp_sgd(
    patched: Any, examples: Sequence[Tokens], epochs: int, rate: float, seed: int
) -> tuple[int, float]:
    """Train a patch by DP-SGD for so many passes; return its steps and epsilon."""
    steps = math.ceil(epochs * len(examples) / int(PRIVATE["batch_size"]))
    shape: dict[str, Any] = {**PRIVATE, "learning_rate": rate, "seed": seed}
    return steps, train_privately(patched, examples, PrivacySettings(**shape, num_steps=steps))


def within(
    budget: float, method: Method, sets: Sets, settings: ScheduleSettings, sizes: tuple[int, int]
) -> ScheduleSettings:
    """Return the schedule with the number of steps nearest to the budget, in operations."""
    costs, last = step_costs(method, sets, settings, sizes)
    return replace(settings, max_steps=nearest_steps(costs, last, budget))


def step_costs(
    method: Method, sets: Sets, settings: ScheduleSettings, sizes: tuple[int, int]
) -> tuple[list[float], list[float]]:
    """Return the operations of each step, and of the final evaluation of the loss after it.

    `sizes` are the parameters of the model, and those that are trained.
    """
    roles = {"forget": sets.forget, "retain": sets.retain, "preferred": sets.preferred}
    each_time = method.compares - method.compares_answers
    once = sum(_reference_positions(roles[role], settings) for role in method.compares_answers)
    costs, last = [], []
    for step in plan_steps(len(sets.forget), len(sets.retain), settings):
        trained = compared = 0
        for micro in step:
            for role in method.reads:
                rows = micro.retain if role == "retain" else micro.forget
                count = _positions(roles[role], rows)
                trained += count
                compared += count * (role in each_time)
        costs.append(float(Compute(*sizes, trained, compared).flops))
        last.append(float(Compute(*sizes, 0, trained + compared + once).flops))
    return costs, last


def _reference_positions(examples: Sequence[Tokens], settings: ScheduleSettings) -> int:
    """Return the positions that the reference computes once, in the order of the set."""
    size = settings.batch_size
    starts = range(0, len(examples), size)
    return sum(_positions(examples, range(at, min(at + size, len(examples)))) for at in starts)


def positions_of(examples: Sequence[Tokens], settings: ScheduleSettings) -> int:
    """Return the positions that a fine-tuning computes, including padding."""
    steps = plan_steps(len(examples), 0, settings)
    return sum(_positions(examples, micro.forget) for step in steps for micro in step)


def _positions(examples: Sequence[Tokens], rows: Sequence[int]) -> int:
    return len(rows) * max(len(examples[row].input_ids) for row in rows)
