"""The loop: steps down a method's loss, in search of the best weights within the bound on utility.

Every `check_every` steps and at the end of each round, the run measures the loss of the next batch,
utility and knowledge of the forget set. Weights are good when that loss is finite and utility is within
its bound. The best weights are the good ones that know least, or the last ones where knowledge is not
measured. A measurement outside the bound does not end the run, because utility often recovers.

A run searches for the strength that is needed. While something is still known, each round continues
where the last one ended, at GROWTH times its rate. A round that ends outside the bound is undone: the
next one continues from the best weights at a lower rate and with a heavier retain term. The run ends
when enough is forgotten, after the last round, or when a loss or a gradient is not finite. The model
then holds the best weights, and the `End` gives the reason.

Within any positive time limit a run takes at least one step, so that a run that is continued again and
again finishes. A run that continues from saved weights gives the same bits as one without interruption:
order and rate are functions of the step and of the measurements, and nothing draws a random number. The
reference's log-probabilities of whole answers are computed once.

The loop supports neither mixed precision nor several devices.

    end = Descent(target, sets, method, settings, bounds, saved=None, progress=log, clock=clock).run()
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx.evaluation.answers import collate
from approx.methods.method import Losses, Method, Role, hyperparameters, with_retain_factor
from approx.unlearning.examples import Sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.schedule import MicroBatch, ScheduleSettings, Step, learning_rate_at, plan_steps
from approx.unlearning.stopping import (
    Bounds,
    Compute,
    End,
    Ending,
    Knowledge,
    StepLog,
    peak_memory_bytes,
)
from approx.unlearning.target import Target
from sisa.core.digest import digest_of, sha256_hex
from sisa.lm.base.adapter import tensor_bytes
from sisa.lm.base.tokens import Tokens

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
PAD_ID = 0  # any word: under causal attention no answer token sees padding
GROWTH = 3.0


@dataclass(frozen=True)
class _Point:
    """Weights that may be kept."""

    tensors: Mapping[str, Tensor]
    step: int
    utility: float | None
    knowledge: Knowledge | None
    learning_rate: float


class Descent:
    """One run over one target."""

    def __init__(
        self,
        target: Target,
        sets: Sets,
        method: Method,
        settings: ScheduleSettings,
        bounds: Bounds,
        *,
        saved: SavedRun | None,
        progress: Callable[[StepLog], None],
        clock: Callable[[], float],
    ) -> None:
        self._target, self._sets, self._method = target, sets, method
        self._settings, self._bounds = settings, bounds
        self._saved, self._progress, self._clock = saved, progress, clock
        self._steps = plan_steps(len(sets.forget), len(sets.retain), settings)
        self._round = len(self._steps) // settings.num_rounds
        self._optimizer = torch.optim.AdamW(
            list(target.trained.values()),
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            foreach=False,  # the plain implementation has one order of arithmetic
            fused=False,
        )
        self._started = clock()
        self._seconds_before = 0.0
        self._tokens_trained = self._tokens_forward = 0
        self._step = self._first = 0
        self._rate, self._hold, self._within = settings.learning_rate, 1.0, True
        self._why = ""

    def run(self) -> End:
        """Start or continue the run until it ends.

        Raise ConfigConflict or IntegrityError for a saved run that does not fit, and InvalidInput if
        utility is not a number before the first step.
        """
        job = "" if self._saved is None else self._job()
        held = None if self._saved is None else self._saved.load(job)
        self._reference = self._reference_answers()
        if held is None:
            self._utility_before = self._bounds.measured_before(self._target.model)
            self._knowledge_before = self._bounds.known(self._target.model, thorough=True)
            self._best = self._point(self._utility_before, self._knowledge_before)
        else:
            self._resume(held.tensors, held.counts)
        self._bounds = self._bounds.with_target_below(self._knowledge_before)
        self._first = self._step
        ending = self._descend(job)
        self._target.put(self._best.tensors)
        return self._end(ending)

    @property
    def num_taken(self) -> int:
        """Return the number of steps that `run` took in this process."""
        return self._step - self._first

    def _reference_answers(self) -> dict[Role, Tensor]:
        found: dict[Role, Tensor] = {}
        for role in sorted(self._method.compares_answers):
            examples, parts = self._examples(role), []
            for start in range(0, len(examples), self._settings.batch_size):
                batch = collate(examples[start : start + self._settings.batch_size], PAD_ID)
                parts.append(self._target.reference_answers_B(batch))
                self._tokens_forward += batch.ids_BT1.numel()
            found[role] = torch.cat(parts)
        return found

    def _point(self, utility: float | None, knowledge: Knowledge | None) -> _Point:
        return _Point(self._target.snapshot(), self._step, utility, knowledge, self._rate)

    def _descend(self, job: str) -> Ending:
        while self._step < len(self._steps):
            if self._is_late():
                self._save(job)
                return self._measure() or Ending.OUT_OF_TIME
            if not self._take_step(self._steps[self._step]):
                return Ending.DIVERGED
            self._step += 1
            at_end = self._step % self._round == 0
            if at_end or self._step % self._bounds.check_every == 0:
                if ended := self._measure():
                    return ended
                if at_end:
                    self._start_next_round()
                self._save(job)
        return Ending.FINISHED if self._hold == 1.0 else Ending.BELOW_UTILITY_BOUND

    def _start_next_round(self) -> None:
        """Prepare the next round and its rate."""
        if self._within:
            self._rate *= GROWTH
        else:
            self._target.put(self._best.tensors)
            self._optimizer.state.clear()
            self._rate, self._hold = self._rate / GROWTH, self._hold * GROWTH

    def _is_late(self) -> bool:
        limit = self._bounds.max_seconds
        late = limit is not None and self._clock() - self._started >= limit
        return late and (limit == 0 or self._step > self._first)

    def _take_step(self, step: Step) -> bool:
        """Take one update. Return False, without updating, when a loss or the gradient is not finite."""
        num_rows = sum(len(micro.forget) for micro in step)
        sums: list[tuple[float, Losses]] = []
        self._optimizer.zero_grad(set_to_none=True)
        for micro in step:
            losses = self._losses(micro, trained=True)
            if not math.isfinite(losses.total.item()):
                return self._diverged("the loss")
            share = len(micro.forget) / num_rows
            (losses.total * share).backward()  # type: ignore[no-untyped-call]
            sums.append((share, losses))
        parameters = list(self._target.trained.values())
        limit = self._settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False))
        if not math.isfinite(norm):
            return self._diverged("the gradient")
        schedule = learning_rate_at(self._step % self._round, self._round, self._settings)
        rate = schedule * (self._rate / self._settings.learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._progress(self._log(sums, norm, rate))
        return True

    def _diverged(self, what: str) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        self._why = f"{what} was not finite at step {self._step + 1}"
        return False

    def _losses(self, micro: MicroBatch, *, trained: bool) -> Losses:
        rows = {}
        for role in sorted(self._method.reads):
            examples = self._examples(role)
            places = list(micro.retain if role == "retain" else micro.forget)
            batch = collate([examples[n] for n in places], PAD_ID)
            known = self._reference.get(role)
            compare = role in self._method.compares and known is None
            reference_B = None if known is None else known[places]
            rows[role] = self._target.rows(batch, compare=compare, reference_answers_B=reference_B)
            num_tokens = batch.ids_BT1.numel()
            self._tokens_trained += num_tokens if trained else 0
            self._tokens_forward += num_tokens * (compare + (not trained))
        return with_retain_factor(self._method, self._hold).loss(rows)

    def _examples(self, role: Role) -> Sequence[Tokens]:
        sets = {
            "forget": self._sets.forget,
            "retain": self._sets.retain,
            "preferred": self._sets.preferred,
        }
        return sets[role]

    def _measure(self) -> Ending | None:
        """Measure the present weights and keep them if they are the best.

        Return how the run ends, or None when it continues.
        """
        if self._step == self._best.step:
            return None
        upcoming = self._steps[min(self._step, len(self._steps) - 1)][0]
        with torch.no_grad():
            loss = self._losses(upcoming, trained=False).total.item()
        if not math.isfinite(loss):
            self._why = f"the loss was not finite after step {self._step}"
            return Ending.DIVERGED
        at_end, model = self._step % self._round == 0, self._target.model
        utility = self._bounds.measured(model)
        self._within = self._bounds.allow(utility, self._utility_before)
        if not self._within:
            self._why = f"utility was {utility} after step {self._step}, from {self._utility_before}"
            return None
        knowledge = self._bounds.known(model, thorough=at_end)
        if self._bounds.is_better(knowledge, self._best.knowledge):
            self._best = self._point(utility, knowledge)
        if self._bounds.is_enough(self._best.knowledge, at_end=at_end):
            return Ending.FINISHED
        return None

    def _save(self, job: str) -> None:
        if self._saved is not None:
            self._saved.save(job, self._tensors(), self._counts())

    def _log(self, sums: list[tuple[float, Losses]], norm: float, rate: float) -> StepLog:
        retained = [share * each.retain.item() for share, each in sums if each.retain is not None]
        return StepLog(
            step=self._step + 1,
            num_steps=len(self._steps),
            loss=sum(share * each.total.item() for share, each in sums),
            forget=sum(share * each.forget.item() for share, each in sums),
            retain=sum(retained) if retained else None,
            gradient_norm=norm,
            learning_rate=rate,
            seconds=self._seconds(),
        )

    def _seconds(self) -> float:
        return self._seconds_before + self._clock() - self._started

    def _end(self, ending: Ending) -> End:
        best = self._best
        return End(
            ending=ending,
            why=self._reason(ending),
            step=best.step,
            num_steps=len(self._steps),
            utility_before=self._utility_before,
            utility=best.utility,
            compute=Compute(
                num_parameters=self._target.num_parameters,
                num_trained=self._target.num_trained,
                tokens_trained=self._tokens_trained,
                tokens_forward=self._tokens_forward,
                seconds=self._seconds(),
                peak_memory_bytes=peak_memory_bytes(),
            ),
            learning_rate=best.learning_rate,
            knowledge_before=self._knowledge_before,
            knowledge=best.knowledge,
        )

    def _reason(self, ending: Ending) -> str:
        if ending == Ending.OUT_OF_TIME:
            return f"the time limit was reached after step {self._step} of {len(self._steps)}"
        if ending == Ending.FINISHED:
            enough = self._bounds.is_enough(self._best.knowledge, at_end=True)
            return f"nothing is known after step {self._best.step}" if enough else "all steps were taken"
        held = "the bound on utility stopped it: " if ending == Ending.BELOW_UTILITY_BOUND else ""
        return f"{held}{self._why}; the weights after step {self._best.step} were kept"

    def _job(self) -> str:
        """Return the digest that a saved run must have to continue as this one."""
        return digest_of(
            {
                "method": self._method.name,
                "hyperparameters": hyperparameters(self._method),
                "settings": dataclasses.asdict(self._settings),
                "sizes": [len(self._sets.forget), len(self._sets.retain), len(self._sets.preferred)],
                "start": sha256_hex(tensor_bytes(self._target.snapshot())),
            }
        )

    def _tensors(self) -> dict[str, Tensor]:
        found = {f"weight|{name}": each.detach() for name, each in self._target.trained.items()}
        found |= {f"best|{name}": each for name, each in self._best.tensors.items()}
        for name, each in self._target.trained.items():
            state = self._optimizer.state.get(each, {})
            found |= {f"{moment}|{name}": state[moment] for moment in MOMENTS if moment in state}
        return found

    def _counts(self) -> dict[str, Any]:
        best = {**vars(self._best), "knowledge": _listed(self._best.knowledge)}
        best.pop("tensors")
        return {
            "step": self._step,
            "rate": self._rate,
            "hold": self._hold,
            "why": self._why,
            "seconds": self._seconds(),
            "tokens_trained": self._tokens_trained,
            "tokens_forward": self._tokens_forward,
            "utility_before": self._utility_before,
            "knowledge_before": _listed(self._knowledge_before),
            "best": best,
        }

    def _resume(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        self._target.put(_named(tensors, "weight|"))
        for name, each in self._target.trained.items():
            keys = {moment: f"{moment}|{name}" for moment in MOMENTS}
            moments = {
                moment: tensors[key].to(each.device) for moment, key in keys.items() if key in tensors
            }
            if moments:
                moments["step"] = moments["step"].cpu()
                self._optimizer.state[each] = moments
        self._step, self._rate = counts["step"], counts["rate"]
        self._hold, self._why = counts["hold"], counts["why"]
        self._seconds_before = counts["seconds"]
        self._tokens_trained, self._tokens_forward = counts["tokens_trained"], counts["tokens_forward"]
        self._utility_before = counts["utility_before"]
        self._knowledge_before = _parsed(counts["knowledge_before"])
        best = {**counts["best"], "knowledge": _parsed(counts["best"]["knowledge"])}
        held = {
            name: each.to(self._target.model.device) for name, each in _named(tensors, "best|").items()
        }
        self._best = _Point(tensors=held, **best)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def _listed(found: Knowledge | None) -> list[float] | None:
    return None if found is None else list(dataclasses.astuple(found))


def _parsed(found: list[float] | None) -> Knowledge | None:
    return None if found is None else Knowledge(int(found[0]), int(found[1]), found[2])
