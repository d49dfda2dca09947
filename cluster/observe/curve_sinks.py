"""Write curves to TensorBoard or MLflow, each behind one small Protocol.

A run is written whole and replaces its earlier version, so nothing is written twice. Only numbers and
the names of curves and runs are written. The libraries are extras, imported when used; a missing one
raises EnvironmentFault. The copies belong to the user: a deletion does not reach them.

    TensorBoard(Path("board")).write("20261125T213749Z-3f9a1c2b", points)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from cluster.observe.curves import Point
from cluster.observe.extras import library, not_installed
from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault
from sisa.store.blobs.files import disk_errors

EVENT_FILES = "events.out.tfevents.*"
RUN_TAG, CONTENT_TAG = "sisa.run", "sisa.content"
BATCH = 1000  # the most metrics that MLflow takes in one call


class CurveSink(Protocol):
    """A tool that stores curves."""

    def write(self, run: str, points: Sequence[Point]) -> None:
        """Write a run's points, in place of its earlier ones."""


class TensorBoard:
    """Write event files of TensorBoard, in one directory per run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = library("tensorboard.summary.writer.event_file_writer", "tensorboard")
        self._events = library("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._summaries = library("tensorboard.compat.proto.summary_pb2", "tensorboard")

    def write(self, run: str, points: Sequence[Point]) -> None:
        folder = self._directory / run
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for former in folder.glob(EVENT_FILES):
                former.unlink()
            writer = self._files.EventFileWriter(str(folder))
            for each in points:
                value = self._summaries.Summary.Value(tag=each.curve, simple_value=each.value)
                summary = self._summaries.Summary(value=[value])
                writer.add_event(self._events.Event(wall_time=each.at, step=each.step, summary=summary))
            writer.close()


class Mlflow:
    """Write runs of an experiment to an MLflow server, or to a database."""

    def __init__(self, uri: str, experiment: str) -> None:
        self._library = library("mlflow", "mlflow")
        self._entities = library("mlflow.entities", "mlflow")
        with self._refusals(uri):
            self._client = self._library.MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment = (
                found.experiment_id if found else self._client.create_experiment(experiment)
            )
        self._uri = uri

    def write(self, run: str, points: Sequence[Point]) -> None:
        content = digest_of([asdict(each) for each in points])
        with self._refusals(self._uri):
            former = self._client.search_runs([self._experiment], f"tags.`{RUN_TAG}` = '{run}'")
            if [each.data.tags.get(CONTENT_TAG) for each in former] == [content]:
                return
            for each in former:
                self._client.delete_run(each.info.run_id)
            times = [round(1000 * each.at) for each in points] or [0]
            made = self._client.create_run(
                self._experiment, start_time=min(times), tags={RUN_TAG: run}, run_name=run
            )
            metrics = [
                self._entities.Metric(each.curve, each.value, at, each.step)
                for each, at in zip(points, times, strict=False)
            ]
            for start in range(0, len(metrics), BATCH):
                self._client.log_batch(made.info.run_id, metrics=metrics[start : start + BATCH])
            self._client.set_tag(made.info.run_id, CONTENT_TAG, content)
            self._client.set_terminated(made.info.run_id, "FINISHED", max(times))

    @contextlib.contextmanager
    def _refusals(self, uri: str) -> Iterator[None]:
        try:
            yield
        except ImportError as error:  # MLflow imports a database's library when it opens the address
            raise not_installed(error.name or "a library", "mlflow", error) from None
        except self._library.MlflowException as error:
            raise EnvironmentFault(
                "MLflow refused",
                where=uri,
                got=str(error).splitlines()[0][:300],
                next_step="check the address, and that the server runs",
            ) from error
