"""The loop: steps down a method's loss, with a way back to the last good weights.

Rules: weights are good when the next batch's loss at them is finite and utility, if it is measured, is
within its bound. They are checked every `check_every` steps and at the end, and copied, and saved, when
good. Where there is any time, a run takes a step at least, so that one that is gone on with again and
again comes to its end. A loss or a gradient that is not finite, or utility below its bound, ends the
run with the last good weights in the model, and the end says so; it is no exception. A run that is out
of time is checked as any other. A run that goes on from saved weights gives, to the bit, what one
without interruption gives: order, rate and moments are functions of the step, and nothing draws a
random number.

Not covered: mixed precision; more than one device.

    end = Descent(target, sets, method, settings, bounds, saved=None, progress=log, clock=clock).run()
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from approx.answer_tokens import AnswerBatch, collate
from approx.bounds import Bounds, End, Ending, StepLog
from approx.compute import Compute, peak_memory_bytes
from approx.method import Losses, Method, Role, hyperparameters
from approx.pace import MicroBatch, Settings, Step, learning_rate_at, plan_steps
from approx.saved_run import SavedRun
from approx.sets import Sets
from approx.target import Target
from sisa.digest import digest_of, sha256_hex
from sisa.model.adapter import tensor_bytes

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
PAD_ID = 0  # any word: under causal attention, nothing that counts sees padding


@dataclass(frozen=True)
class _Good:
    tensors: Mapping[str, Tensor]
    step: int
    utility: float | None


class Descent:
    """One run over one target."""

    def __init__(
        self,
        target: Target,
        sets: Sets,
        method: Method,
        settings: Settings,
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
        self._optimizer = torch.optim.AdamW(
            list(target.trained.values()),
            settings.learning_rate,
            weight_decay=settings.weight_decay,
            foreach=False,  # the plain implementation: one order of arithmetic
            fused=False,
        )
        self._started = clock()
        self._seconds_before = 0.0
        self._tokens_trained = self._tokens_forward = 0
        self._step = self._first = 0
        self._why = ""

    def run(self) -> End:
        """Start or go on, to the end. Raises ConfigConflict and IntegrityError for saved runs that do
        not fit, InvalidInput when utility is no number before anything was changed."""
        job = "" if self._saved is None else self._job()
        held = None if self._saved is None else self._saved.load(job)
        if held is None:
            self._utility_before = self._bounds.measured_before(self._target.model)
            self._good = _Good(self._target.snapshot(), 0, self._utility_before)
        else:
            self._go_on(held.tensors, held.counts)
        self._first = self._step
        ending = self._descend(job)
        if ending in (Ending.DIVERGED, Ending.BELOW_UTILITY_BOUND):
            self._target.put(self._good.tensors)
        return self._end(ending)

    @property
    def num_taken(self) -> int:
        """Steps that `run` took here, apart from those before it went on."""
        return self._step - self._first

    def _descend(self, job: str) -> Ending:
        while self._step < len(self._steps):
            if self._is_late():
                return self._checked(job) or Ending.OUT_OF_TIME
            if not self._take_step(self._steps[self._step]):
                return Ending.DIVERGED
            self._step += 1
            last = self._step == len(self._steps)
            if (last or self._step % self._bounds.check_every == 0) and (bad := self._checked(job)):
                return bad
        return Ending.FINISHED

    def _is_late(self) -> bool:
        limit = self._bounds.max_seconds
        late = limit is not None and self._clock() - self._started >= limit
        return late and (limit == 0 or self._step > self._first)

    def _take_step(self, step: Step) -> bool:
        """One update; False, and none, when a loss or the gradient is not finite."""
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
        rate = learning_rate_at(self._step, len(self._steps), self._settings)
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
            batch = self._batch(role, micro)
            compare = role in self._method.compares
            rows[role] = self._target.rows(batch, compare=compare)
            num_tokens = batch.ids_BT1.numel()
            self._tokens_trained += num_tokens if trained else 0
            self._tokens_forward += num_tokens * (compare + (not trained))
        return self._method.loss(rows)

    def _batch(self, role: Role, micro: MicroBatch) -> AnswerBatch:
        if role == "retain":
            return collate([self._sets.retain[n] for n in micro.retain], PAD_ID)
        examples = self._sets.forget if role == "forget" else self._sets.preferred
        return collate([examples[n] for n in micro.forget], PAD_ID)

    def _checked(self, job: str) -> Ending | None:
        """Keep and save the present weights if they are good; else how the run ends."""
        if self._step == self._good.step:
            return None
        upcoming = self._steps[min(self._step, len(self._steps) - 1)][0]
        with torch.no_grad():
            loss = self._losses(upcoming, trained=False).total.item()
        if not math.isfinite(loss):
            self._why = f"the loss was not finite after step {self._step}"
            return Ending.DIVERGED
        utility = self._bounds.measured(self._target.model)
        if not self._bounds.allow(utility, self._utility_before):
            self._why = f"utility was {utility} after step {self._step}, from {self._utility_before}"
            return Ending.BELOW_UTILITY_BOUND
        self._good = _Good(self._target.snapshot(), self._step, utility)
        if self._saved is not None:
            self._saved.save(job, self._tensors(), self._counts())
        return None

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
        kept = f"; the weights after step {self._good.step} were kept"
        said = {
            Ending.FINISHED: "all steps were taken",
            Ending.OUT_OF_TIME: f"the time was spent after step {self._step} of {len(self._steps)}",
        }
        return End(
            ending=ending,
            why=said.get(ending) or self._why + kept,
            step=self._good.step,
            num_steps=len(self._steps),
            utility_before=self._utility_before,
            utility=self._good.utility,
            compute=Compute(
                num_parameters=self._target.num_parameters,
                num_trained=self._target.num_trained,
                tokens_trained=self._tokens_trained,
                tokens_forward=self._tokens_forward,
                seconds=self._seconds(),
                peak_memory_bytes=peak_memory_bytes(),
            ),
        )

    def _job(self) -> str:
        """What a saved run must have been to go on as this one."""
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
        for name, each in self._target.trained.items():
            state = self._optimizer.state[each]
            found |= {f"{moment}|{name}": state[moment] for moment in MOMENTS if moment in state}
        return found

    def _counts(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "seconds": self._seconds(),
            "tokens_trained": self._tokens_trained,
            "tokens_forward": self._tokens_forward,
            "utility_before": self._utility_before,
            "utility": self._good.utility,
        }

    def _go_on(self, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> None:
        prefix = "weight|"
        weights = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
        self._target.put(weights)
        for name, each in self._target.trained.items():
            keys = {moment: f"{moment}|{name}" for moment in MOMENTS}
            moments = {
                moment: tensors[key].to(each.device) for moment, key in keys.items() if key in tensors
            }
            if moments:
                moments["step"] = moments["step"].cpu()
                self._optimizer.state[each] = moments
        self._step = counts["step"]
        self._seconds_before = counts["seconds"]
        self._tokens_trained, self._tokens_forward = counts["tokens_trained"], counts["tokens_forward"]
        self._utility_before = counts["utility_before"]
        self._good = _Good(self._target.snapshot(), self._step, counts["utility"])
