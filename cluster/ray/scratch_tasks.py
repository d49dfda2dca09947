"""Train a base with Ray Train: Hugging Face's `Trainer` in workers of the run file's cluster.

A job carries paths and a recipe, never text; all nodes must see the rows and the directory for the
base. If a worker dies, the training of the base starts again from its beginning. The first
worker saves the base.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from ray.exceptions import RayError

from cluster.ray.session import Listener, connect
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Notice, Report
from sisa.flows.wiring.scratch_base import BaseJob
from sisa.lm.base.numerics import worker_environment

LISTEN_EVERY_S, LISTENER_S = 1.0, 10.0


def train_on_ray(job: BaseJob, cluster: Mapping[str, Any], report: Report) -> None:
    """Train a base in `workers` processes. Raise EnvironmentFault if Ray or a worker fails."""
    threads, workers = job.recipe["threads"], job.recipe["workers"]
    session = connect(cluster["address"], threads * workers)
    run_id = secrets.token_hex(8)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=DeprecationWarning),  # of Ray's settings
            _reported(session.mailbox, run_id, report),
            _own_interrupt(),
        ):
            from ray.train import FailureConfig, RunConfig, ScalingConfig
            from ray.train.torch import TorchTrainer

            TorchTrainer(
                _in_worker,
                train_loop_config={"job": job, "mailbox": session.mailbox, "run_id": run_id},
                scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": threads}),
                run_config=RunConfig(
                    name=run_id,
                    storage_path=str(job.target.parent),
                    failure_config=FailureConfig(max_failures=cluster["max_retries"]),
                    worker_runtime_env={"env_vars": worker_environment(threads)},
                ),
            ).fit()
    except Exception as error:
        if not isinstance(error, RayError) and type(error).__module__.partition(".")[0] != "ray":
            raise
        raise EnvironmentFault(
            "the base could not be trained on Ray",
            where=str(job.target.parent),
            got=type(error).__name__,
            next_step="check that all nodes see this directory, or train with `--executor serial`",
        ) from None


@contextlib.contextmanager
def _own_interrupt() -> Iterator[None]:
    """Restore the handler of Ctrl-C when the block ends, since Ray Train leaves its own."""
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

    train_base(job.recipe, job.rows, job.target, notify, prepare_trainer, saves=first)


@contextlib.contextmanager
def _reported(mailbox: Any, run_id: str, report: Report) -> Iterator[None]:
    """Report the workers' events while Ray Train blocks the driver's thread."""
    done, listener = threading.Event(), Listener(mailbox, run_id)

    def listen() -> None:
        last = False
        while not last:
            last = done.wait(LISTEN_EVERY_S)  # once more at the end
            with contextlib.suppress(RayError):  # Ray may be gone
                for event in listener.received(LISTENER_S):
                    report(event)

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(2 * LISTENER_S)
