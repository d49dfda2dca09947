"""The loop: steps down a method's loss, in search of the best weights within the bound on utility.

Every `check_every` steps and at the end of each round, the run measures the loss of the next batch,
utility and knowledge of the forget set. Weights are good when that loss is finite and utility is within
its bound. The best weights are the good ones that know least, or the last ones where knowledge is not
measured. A measurement outside the bound does not end the run, because utility often recovers.

While something is still known, each round continues where the last one ended, at GROWTH times its rate.
A round that ends outside the bound is undone: the next one continues from the best weights at a lower
rate and with a heavier retain term. The run ends when enough is forgotten, after the last round, after
`patience` rounds without better weights, or when a loss or a gradient is not finite. The model then
holds the best weights.

Within any positive time limit a run takes at least one step, so that a run that is continued again and
again finishes. A continued run gives the same bits as one without interruption: order, rate and the
weight of the retain term are functions of the step and of the measurements, and nothing draws a random
number.

    end = Descent(method, Run(target, sets, pace, bounds)).run()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from approx.evaluation.answers import collate
from approx.unlearning.schedule import PlannedBatch, Step, learning_rate_at, plan_steps
from approx.unlearning.stopping import End, Ending, Knowledge, StepLog
from sisa.core.digest import digest_of, sha256_hex
from sisa.core.errors import InvalidInput
from sisa.lm.base.low_rank import tensor_bytes
from sisa.lm.base.tokens import Tokens

if TYPE_CHECKING:
    from approx.methods.method import Losses, Method, Role
    from approx.unlearning.unlearn import Run

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
GROWTH = 3.0


class _Point(NamedTuple):
    """Weights that may be kept, with what was measured of them."""

    tensors: Mapping[str, Tensor]
    step: int
    utility: float | None
    knowledge: Knowledge | None
    learning_rate: float


@dataclass
class _Counts:
    """What a run has done so far, as it is saved."""

    rate: float  # of learning, in the present round
    step: int = 0
    hold: float = 1.0  # factor of the retain term's weight
    retain_weight: float | None = None  # where the method changes it from step to step
    why: str = ""
    seconds: float = 0.0  # before this process
    tokens_trained: int = 0
    tokens_forward: int = 0
    utility_before: float | None = None
    knowledge_before: Knowledge | None = None


class Descent:
    """One run of a method over one target."""

    def __init__(self, method: Method, run: Run) -> None:
        self.method = method
        self.target, self.sets, self.pace, self.bounds, self.saved, self.progress, self.clock = run
        self._steps = plan_steps(len(self.sets.forget), len(self.sets.retain), self.pace)
        self._round_len = len(self._steps) // self.pace.num_rounds
        self._optimizer = torch.optim.AdamW(
            list(self.target.trained.values()),
            self.pace.learning_rate,
            weight_decay=self.pace.weight_decay,
            foreach=False,  # the plain implementation has one order of arithmetic
            fused=False,
        )
        self._now = _Counts(self.pace.learning_rate)
        self._first_step, self._within_bound = 0, True

    def run(self) -> End:
        """Start or continue the run until it ends; raise as `unlearn`."""
        self._started = self.clock()
        job = "" if self.saved is None else self._job()
        held = None if self.saved is None else self.saved.load(job)
        self._reference = self._reference_answers()
        if held is None:
            utility = self.bounds.utility_before(self.target.model)
            knowledge = self.bounds.knowledge_of(self.target.model, thorough=True)
            self._now.utility_before, self._now.knowledge_before = utility, knowledge
            self._best = self._point(utility, knowledge)
        else:
            self._resume(*held)
        self.bounds = self.bounds.with_targets_below(self._now.knowledge_before)
        self._first_step = self._now.step
        ending = self._descend(job)
        self.target.put(self._best.tensors)
        return self._end(ending)

    @property
    def num_taken(self) -> int:
        """Return the number of steps that `run` took in this process."""
        return self._now.step - self._first_step

    def _reference_answers(self) -> dict[Role, Tensor]:
        found: dict[Role, Tensor] = {}
        for role in sorted(self.method.compares_answers):
            examples, parts = self._examples(role), []
            for start in range(0, len(examples), self.pace.batch_size):
                batch = collate(examples[start : start + self.pace.batch_size])
                parts.append(self.target.reference_answers_B(batch))
                self._now.tokens_forward += batch.ids_BT1.numel()
            found[role] = torch.cat(parts)
        return found

    def _point(self, utility: float | None, knowledge: Knowledge | None) -> _Point:
        return _Point(self.target.snapshot(), self._now.step, utility, knowledge, self._now.rate)

    def _descend(self, job: str) -> Ending:
        while self._now.step < len(self._steps):
            if self._is_late():
                self._save(job)
                return self._measure() or Ending.OUT_OF_TIME
            if not self._take_step(self._steps[self._now.step]):
                return Ending.DIVERGED
            self._now.step += 1
            at_end = self._now.step % self._round_len == 0
            if at_end or self._now.step % self.bounds.check_every == 0:
                if ended := self._measure():
                    return ended
                if at_end:
                    if self._num_idle_rounds() >= self.bounds.patience:
                        break
                    self._start_next_round()
                self._save(job)
        return Ending.FINISHED if self._now.hold == 1.0 else Ending.BELOW_UTILITY_BOUND

    def _num_idle_rounds(self) -> int:
        """Return the number of whole rounds since the best weights were found."""
        return (self._now.step - self._best.step) // self._round_len

    def _start_next_round(self) -> None:
        """Prepare the next round and its rate."""
        if self._within_bound:
            self._now.rate *= GROWTH
        else:
            self.target.put(self._best.tensors)
            self._optimizer.state.clear()
            self._now.rate, self._now.hold = self._now.rate / GROWTH, self._now.hold * GROWTH

    def _is_late(self) -> bool:
        limit = self.bounds.max_seconds
        late = limit is not None and self.clock() - self._started >= limit
        return late and (limit == 0 or self._now.step > self._first_step)

    def _take_step(self, step: Step) -> bool:
        """Take one update. Return False, without updating, when a loss or the gradient is not finite."""
        num_rows = sum(len(micro.forget) for micro in step)
        sums: list[tuple[float, Losses]] = []
        self._optimizer.zero_grad(set_to_none=True)
        for micro in step:
            losses = self._losses(micro, trained=True)
            if not math.isfinite(losses.total.item()):
                return self._diverged("the loss")
            self._check_reached(losses.total)
            share = len(micro.forget) / num_rows
            (losses.total * share).backward()  # type: ignore[no-untyped-call]
            sums.append((share, losses))
        parameters = list(self.target.trained.values())
        limit = self.pace.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False))
        if not math.isfinite(norm):
            return self._diverged("the gradient")
        schedule = learning_rate_at(self._now.step % self._round_len, self._round_len, self.pace)
        rate = schedule * (self._now.rate / self.pace.learning_rate)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        log = self._log(sums, norm)
        self._now.retain_weight = self._next_retain_weight(log.retain)
        self.progress(log)
        return True

    def _check_reached(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise InvalidInput(
                "nothing that is trained reaches the loss",
                where="layer",
                expected=f"trained modules in layer {self.method.layer} or below it",
                next_step="choose another layer or selection",
            )

    def _next_retain_weight(self, retain: float | None) -> float | None:
        present, pace = self._now.retain_weight, self.pace
        weight = self.method.retain_weight if present is None else present
        num_batches = (self._now.step + 1) * pace.gradient_accumulation_steps
        num_epochs = num_batches / -(-len(self.sets.forget) // pace.batch_size)
        return self.method.next_retain_weight(weight, retain, num_epochs)

    def _present_method(self) -> Method:
        weight = self._now.retain_weight
        method = self.method if weight is None else replace(self.method, **{"retain_weight": weight})
        return method.with_retain_factor(self._now.hold)

    def _diverged(self, what: str) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        self._now.why = f"{what} was not finite at step {self._now.step + 1}"
        return False

    def _losses(self, micro: PlannedBatch, *, trained: bool) -> Losses:
        rows = {}
        for role in sorted(self.method.reads):
            examples = self._examples(role)
            places = list(micro.retain if role == "retain" else micro.forget)
            batch = collate([examples[n] for n in places])
            known = self._reference.get(role)
            compare = role in self.method.compares and known is None
            reference_B = None if known is None else known[places]
            rows[role] = self.target.rows(
                batch, compare=compare, reference_answers_B=reference_B, layer=self.method.layer
            )
            num_tokens = batch.ids_BT1.numel()
            self._now.tokens_trained += num_tokens if trained else 0
            self._now.tokens_forward += num_tokens * (compare + (not trained))
        return self._present_method().loss(rows)

    def _examples(self, role: Role) -> Sequence[Tokens]:
        examples: Sequence[Tokens] = getattr(self.sets, role)
        return examples

    def _measure(self) -> Ending | None:
        """Keep the present weights if they are the best; return how the run ends, if it does."""
        if self._now.step == self._best.step:
            return None
        upcoming = self._steps[min(self._now.step, len(self._steps) - 1)][0]
        with torch.no_grad():
            loss = self._losses(upcoming, trained=False).total.item()
        if not math.isfinite(loss):
            self._now.why = f"the loss was not finite after step {self._now.step}"
            return Ending.DIVERGED
        at_end, model = self._now.step % self._round_len == 0, self.target.model
        utility = self.bounds.utility_of(model)
        self._within_bound = self.bounds.allow(utility, self._now.utility_before)
        if not self._within_bound:
            before = self._now.utility_before
            self._now.why = f"utility was {utility} after step {self._now.step}, from {before}"
            return None
        knowledge = self.bounds.knowledge_of(model, thorough=at_end)
        if self.bounds.is_better(knowledge, self._best.knowledge):
            self._best = self._point(utility, knowledge)
        if self.bounds.is_enough(self._best.knowledge, at_end=at_end):
            return Ending.FINISHED
        return None

    def _save(self, job: str) -> None:
        if self.saved is None:
            return
        tensors = {f"weight|{name}": each.detach() for name, each in self.target.trained.items()}
        tensors |= {f"best|{name}": each for name, each in self._best.tensors.items()}
        for name, each in self.target.trained.items():
            state = self._optimizer.state.get(each, {})
            tensors |= {f"{moment}|{name}": state[moment] for moment in MOMENTS if moment in state}
        best = self._best._asdict()
        del best["tensors"]
        counts = {**asdict(self._now), "seconds": self._seconds(), "best": best}
        self.saved.save(job, tensors, counts)

    def _log(self, sums: list[tuple[float, Losses]], norm: float) -> StepLog:
        retained = [share * each.retain.item() for share, each in sums if each.retain is not None]
        loss = sum(share * each.total.item() for share, each in sums)
        retain = sum(retained) if retained else None
        return StepLog(self._now.step + 1, len(self._steps), loss, retain, norm)

    def _seconds(self) -> float:
        return self._now.seconds + self.clock() - self._started

    def _end(self, ending: Ending) -> End:
        best = self._best
        return End(
            ending=ending,
            why=self._reason(ending),
            step=best.step,
            num_steps=len(self._steps),
            utility_before=self._now.utility_before,
            utility=best.utility,
            compute=self.target.compute(
                tokens_trained=self._now.tokens_trained,
                tokens_forward=self._now.tokens_forward,
                seconds=self._seconds(),
            ),
            learning_rate=best.learning_rate,
            knowledge_before=self._now.knowledge_before,
            knowledge=best.knowledge,
        )

    def _reason(self, ending: Ending) -> str:
        if ending == Ending.OUT_OF_TIME:
            return f"the time limit was reached after step {self._now.step} of {len(self._steps)}"
        if ending == Ending.FINISHED:
            if self.bounds.is_enough(self._best.knowledge, at_end=True):
                return f"nothing is known after step {self._best.step}"
            idle = f"{self._num_idle_rounds()} rounds found nothing better"
            return idle if self._now.step < len(self._steps) else "all steps were taken"
        held = "the bound on utility stopped it: " if ending == Ending.BELOW_UTILITY_BOUND else ""
        return f"{held}{self._now.why}; the weights after step {self._best.step} were kept"

    def _job(self) -> str:
        """Return the digest that a saved run must have to continue as this one."""
        return digest_of(
            {
                "method": self.method.name,
                "hyperparameters": asdict(self.method),
                "settings": asdict(self.pace),  # as saved runs name it
                "sizes": [len(self.sets.forget), len(self.sets.retain), len(self.sets.preferred)],
                "start": sha256_hex(tensor_bytes(self.target.snapshot())),
            }
        )

    def _resume(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        self.target.put(_named(tensors, "weight|"))
        for name, each in self.target.trained.items():
            keys = {moment: f"{moment}|{name}" for moment in MOMENTS}
            if moments := {moment: tensors[key] for moment, key in keys.items() if key in tensors}:
                self._optimizer.state[each] = moments
        best = dict(counts["best"])
        best["knowledge"] = _parsed(best["knowledge"])
        self._best = _Point(tensors=_named(tensors, "best|"), **best)
        now = {name: value for name, value in counts.items() if name != "best"}
        self._now = _Counts(**{**now, "knowledge_before": _parsed(now["knowledge_before"])})


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}


def _parsed(found: list[Any] | None) -> Knowledge | None:
    return None if found is None else Knowledge(*found)
