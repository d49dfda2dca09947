"""Train a base with Ray Train: Hugging Face's `Trainer` in workers of the run file's cluster.

A job carries paths and a recipe, never text; texts and the place for the base lie where all nodes
see them. What must be set before torch is imported travels in the workers' runtime environment. A worker
that dies is started again, from the beginning of the base's training. The first worker saves.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from cluster.ray.ray_session import Listener, connect
from sisa.core.errors import EnvironmentFault, InvalidInput, rebuilt
from sisa.core.events import Notice, Report
from sisa.flows.scratch import BaseJob
from sisa.lm.base.numerics import worker_environment

POLL_S, ANSWER_S = 1.0, 10.0
REFUSED = "refused.json"  # what a worker found wrong, for the driver to say


def train_on_ray(job: BaseJob, cluster: Mapping[str, Any], report: Report) -> None:
    """Train a base in `workers` processes. Raises EnvironmentFault when Ray or a worker fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray's, of settings of its own
        _train(job, cluster, report)


def _train(job: BaseJob, cluster: Mapping[str, Any], report: Report) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    threads, workers = job.recipe["threads"], job.recipe["workers"]
    session = connect(cluster["address"], threads * workers)
    run_id = secrets.token_hex(8)
    trainer = TorchTrainer(
        _in_worker,
        train_loop_config={
            "job": job,
            "mailbox": session.mailbox,
            "run_id": run_id,
        },
        scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": threads}),
        run_config=RunConfig(
            name=run_id,
            storage_path=str(job.target.parent),
            failure_config=FailureConfig(max_failures=cluster["max_retries"]),
            worker_runtime_env={"env_vars": worker_environment(threads)},
        ),
    )
    try:
        with _reported(session.mailbox, run_id, report), _own_interrupt():
            trainer.fit()
    except Exception as error:
        if not isinstance(error, RayError) and type(error).__module__.partition(".")[0] != "ray":
            raise
        raise _failed(job, error) from None
    _raise_refused(job)


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Ray Train answers Ctrl-C by a handler that it leaves in the process; shards are trained next, and
    there Ctrl-C must be the caller's again."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _in_worker(config: Mapping[str, Any]) -> None:
    import ray.train
    from ray.train.huggingface.transformers import prepare_trainer

    from sisa.lm.base.scratch_base import train_base

    job: BaseJob = config["job"]
    first = ray.train.get_context().get_world_rank() == 0

    def notify(text: str) -> None:
        if first:
            config["mailbox"].put.remote(config["run_id"], Notice(text))

    try:
        train_base(job.recipe, job.texts, job.target, notify, prepare_trainer, saves=first)
    except InvalidInput as error:  # all workers see the same, and none is to be started again
        if first:
            (job.target / REFUSED).write_text(json.dumps(error.to_json()))


@contextlib.contextmanager
def _reported(mailbox: Any, run_id: str, report: Report) -> Iterator[None]:
    """Report what workers send, while Ray Train has the driver's thread."""
    done, listener = threading.Event(), Listener(mailbox, run_id)

    def listen() -> None:
        last = False
        while not last:
            last = done.wait(POLL_S)  # once more at the end
            with contextlib.suppress(RayError):  # of a Ray that is gone
                for event in listener.received(ANSWER_S):
                    report(event)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2 * ANSWER_S)


def _raise_refused(job: BaseJob) -> None:
    file = job.target / REFUSED
    if file.is_file():
        raise rebuilt(InvalidInput, json.loads(file.read_text()))


def _failed(job: BaseJob, error: Exception) -> EnvironmentFault:
    return EnvironmentFault(
        "the base could not be trained on Ray",
        where=str(Path(job.target).parent),
        got=type(error).__name__,
        next_step="see that all nodes see this directory, or train with `--executor serial`",
    )
