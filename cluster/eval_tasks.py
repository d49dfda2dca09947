"""Evaluations of several models: one task a model, on Ray at once, or one after another in this process.

Rules: a task opens its model, writes the model's log and returns the rows; a log is continued, so that a
task that is started again loses one batch at most. The CPUs of a node are shared out among the tasks; a
task on CUDA takes one GPU. Every exception comes back as a value, without its message, unless it is of
the error tree. A single task needs no Ray.

Not covered: a model over several nodes; the aggregates (`approx/tofu_aggregates.py`).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sisa.errors import EnvironmentFault, SisaError
from sisa.ports import Event, Notice, Report

if TYPE_CHECKING:
    from approx.evaluated import PromptKind
    from approx.evaluated_models import Dtype
    from approx.tofu import Question
    from approx.tofu_evaluation import Evaluated

NOTICE_EVERY_S = 10.0
POLL_S = 0.2


@dataclass(frozen=True)
class EvaluationTask:
    """One model to evaluate. `kind` None: as suits the model. `out` is a directory for logs."""

    spec: str
    split: str
    questions: Sequence[Question] = field(repr=False)
    out: Path
    kind: PromptKind | None
    template: str
    max_new_tokens: int
    batch_size: int
    device: str
    dtype: Dtype


def carry_out(task: EvaluationTask, report: Report) -> Evaluated:
    """Evaluate one model in this process. Raises as `open_evaluated` and `evaluate` do."""
    from approx.evaluated import PromptForm
    from approx.evaluated_models import open_evaluated
    from approx.tofu_evaluation import Evaluated, Settings, evaluate, header_of, log_name

    model = open_evaluated(task.spec, task.device, task.dtype)
    settings = Settings(PromptForm(task.kind or model.kind, task.template), task.max_new_tokens)
    header = header_of(model, task.questions, settings)
    log = task.out / log_name(model, task.split, header)
    rows = evaluate(
        model,
        task.questions,
        log,
        settings,
        batch_size=task.batch_size,
        progress=_noticing(task.spec, report),
    )
    return Evaluated(task.spec, model.digest, log, header.settings, rows)


def _noticing(name: str, report: Report) -> Callable[[int, int], None]:
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= NOTICE_EVERY_S:
            last = time.monotonic()
            report(Notice(f"{name}: {done} of {total} questions"))

    return progress


def run_tasks(
    tasks: Sequence[EvaluationTask], *, ray: bool, address: str | None, report: Report
) -> list[Evaluated]:
    """All tasks, in order. Raises what a task raised first; logs keep what was done."""
    if not ray or len(tasks) < 2:
        return [carry_out(each, report) for each in tasks]
    return _run_on_ray(tasks, address, report)


def _run_on_ray(tasks: Sequence[EvaluationTask], address: str | None, report: Report) -> list[Evaluated]:
    import ray
    from ray.exceptions import RayError

    from cluster.ray_session import alive_cpus, connect
    from sisa.model.numerics import worker_environment

    here = len(os.sched_getaffinity(0))
    session = connect(address, here)
    threads = max(1, max(alive_cpus(), default=1) // len(tasks))
    remote = ray.remote(max_retries=0)(_carry_out_remotely).options(
        num_cpus=threads,
        num_gpus=int(tasks[0].device.startswith("cuda")),
        runtime_env={"env_vars": worker_environment(threads)},
    )
    run_id = os.urandom(8).hex()
    running = [remote.remote(each, session.mailbox, run_id) for each in tasks]
    waiting = list(running)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            for event in ray.get(session.mailbox.take.remote(run_id)):
                report(event)
            for outcome in ray.get(done):
                if isinstance(outcome, SisaError):
                    raise outcome
        return list(ray.get(running))
    except RayError as error:
        raise EnvironmentFault(
            "Ray failed",
            got=type(error).__name__,
            next_step="a worker may lack memory: use `--executor serial`, or fewer models at once; then "
            "run the command again, logs are kept",
        ) from error
    finally:
        with contextlib.suppress(RayError):
            for reference in waiting:
                ray.cancel(reference, force=True)


def _carry_out_remotely(task: EvaluationTask, mailbox: Any, run_id: str) -> Evaluated | SisaError:
    import ray

    from cluster.ray_worker import describe_fault

    posted: list[Any] = []

    def report(event: Event) -> None:
        posted[:] = [mailbox.put.remote(run_id, event)]

    try:
        found = carry_out(task, report)
        ray.get(posted)
        return found
    except SisaError as error:
        return error
    except Exception as error:
        return describe_fault(error, task.spec)
