"""Evaluate or attack several models: one Ray task per model, or one after another in this process.

A log is continued, so a task that is started again repeats at most one batch. Tasks share the CPUs of a
node; a task on CUDA takes one GPU. A single task needs no Ray.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from sisa.core.events import Notice, Report
from sisa.flows.wiring.progress import LINE_EVERY_S

if TYPE_CHECKING:
    from approx.attacks.attack_run import AttackedModel, AttackOrder
    from approx.evaluation.asking import FinishedLog
    from approx.evaluation.evaluated_models import Dtype
    from approx.evaluation.questions import PromptForm, PromptKind, Question

_Task = TypeVar("_Task", "EvaluationTask", "AttackTask")
_Done = TypeVar("_Done")


@dataclass(frozen=True)
class EvaluationTask:
    """Describe one model to evaluate."""

    spec: str
    benchmark: str
    questions: Sequence[Question] = field(repr=False)
    name: str  # the prefix of the names of logs
    out: Path  # the directory for logs
    kind: PromptKind | None  # of prompts; None: the model's own
    template: str
    max_new_tokens: int
    batch_size: int
    device: str
    dtype: Dtype


def evaluate_task(task: EvaluationTask, report: Report) -> FinishedLog:
    """Evaluate one model in this process. Raise as `open_evaluated`, `check_readable` and `evaluate`."""
    from approx.evaluation.asking import Asking, FinishedLog, evaluate, header_of, log_name
    from approx.evaluation.evaluated_models import check_readable, open_evaluated
    from approx.evaluation.questions import PromptForm

    model = open_evaluated(task.spec, task.device, task.dtype)
    settings = Asking(PromptForm(task.kind or model.kind, task.template), task.max_new_tokens)
    check_readable(model, task.questions, settings)
    header = header_of(model, task.questions, settings, task.benchmark)
    log = task.out / log_name(model, task.name, header)
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            report(Notice(f"{task.spec}: {done} of {total} questions"))

    size = task.batch_size
    rows = evaluate(model, task.questions, log, settings, header, batch_size=size, progress=progress)
    return FinishedLog(task.spec, model.digest, log, header.settings, rows)


@dataclass(frozen=True)
class AttackTask:
    """Describe one model to attack."""

    spec: str
    references: Sequence[str]
    before: str | None
    order: AttackOrder = field(repr=False)
    form: PromptForm | str  # a template: in the model's own kind of prompt
    device: str
    dtype: Dtype


def attack_task(task: AttackTask, report: Report) -> AttackedModel:
    """Attack one model in this process. Raise the errors of `attack_opened`."""
    from approx.attacks.attack_run import OpenedModel, attack_opened

    report(Notice(f"{task.spec}: attacking"))

    def opened(spec: str) -> OpenedModel:
        return OpenedModel(spec, task.form, task.device, task.dtype)

    before = None if task.before is None else opened(task.before)
    judges = [opened(each) for each in task.references]
    return attack_opened(opened(task.spec), judges, task.order, before)


def run_on_models(
    tasks: Sequence[_Task],
    carry_out: Callable[[_Task, Report], _Done],
    executor: Literal["ray", "serial"],
    address: str | None,
    report: Report,
) -> list[_Done]:
    """Run all tasks, each of one model, and return their results in order.

    Raise the first error of a task; the logs keep what was done before it.
    """
    if executor == "serial" or len(tasks) < 2:
        return [carry_out(each, report) for each in tasks]
    from cluster.ray.scheduling import Placement
    from cluster.ray.session import alive_cpus, connect
    from cluster.ray.tasks import run_tasks

    session = connect(address, len(os.sched_getaffinity(0)))
    cpus = max(1, max(alive_cpus(), default=1) // len(tasks))
    placement = Placement(cpus, num_gpus=int(tasks[0].device.startswith("cuda")))
    label = attrgetter("spec")
    return run_tasks(tasks, carry_out, report, session=session, placement=placement, label=label)
