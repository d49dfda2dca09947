"""Write the curves of runs to TensorBoard or MLflow.

A run is written whole and replaces its earlier version. Only numbers and the names of curves and runs
are written. The copies belong to the user: a deletion does not reach them.

    to_tensorboard(Path("board"), {"20261125T213749Z-3f9a1c2b": points})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.observe.curves import Point
from cluster.observe.extras import extra
from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault
from sisa.store.blobs.files import disk_errors

RUN_TAG, CONTENT_TAG = "sisa.run", "sisa.content"
BATCH = 1000  # the most metrics that MLflow takes in one call
Curves = Mapping[str, Sequence[Point]]  # by run


def to_tensorboard(directory: Path, curves: Curves) -> None:
    """Write event files of TensorBoard, in one directory per run."""
    with extra("tensorboard"):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for run, points in curves.items():
        folder = directory / run
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for former in folder.glob("events.out.tfevents.*"):
                former.unlink()
            writer = EventFileWriter(str(folder))
            for each in points:
                value = Summary.Value(tag=each.curve, simple_value=each.value)
                summary = Summary(value=[value])
                writer.add_event(Event(wall_time=each.at, step=each.step, summary=summary))
            writer.close()


def to_mlflow(uri: str, experiment: str, curves: Curves) -> None:
    """Write runs of an experiment to an MLflow server, or to a database."""
    with _mlflow_errors(uri):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        for run, points in curves.items():
            _write_run(client, place, run, points)


def _write_run(client: Any, experiment: str, run: str, points: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    content = digest_of([asdict(each) for each in points])
    former = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run}'")
    if [each.data.tags.get(CONTENT_TAG) for each in former] == [content]:
        return
    for each in former:
        client.delete_run(each.info.run_id)
    times = [round(1000 * each.at) for each in points] or [0]
    made = client.create_run(experiment, start_time=min(times), tags={RUN_TAG: run}, run_name=run)
    metrics = [
        Metric(each.curve, each.value, at, each.step) for each, at in zip(points, times, strict=False)
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(made.info.run_id, metrics=metrics[start : start + BATCH])
    client.set_tag(made.info.run_id, CONTENT_TAG, content)
    client.set_terminated(made.info.run_id, "FINISHED", max(times))


@contextmanager
def _mlflow_errors(uri: str) -> Iterator[None]:
    with extra("mlflow"):  # MLflow imports a database's library when it opens the address
        from mlflow import MlflowException

        try:
            yield
        except MlflowException as error:
            raise EnvironmentFault(
                "MLflow refused",
                where=uri,
                got=str(error).splitlines()[0][:300],
                next_step="check the address, and that the server runs",
            ) from error
