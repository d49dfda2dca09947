"""Turn the metrics of runs into curves, and write them to TensorBoard or MLflow.

An erased loss has no point. The step of a loss is its epoch; other steps count events. A run is written
whole and replaces its earlier version. The copies belong to the user: a deletion does not reach them.

>>> line = {"at": "2026-11-25T21:37:49.000+00:00", "event": "erasure_failed"}
>>> [(each.curve, each.step, each.value) for each in points([line, line])][-1]
('deletion/erasure_failures', 2, 2.0)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.core.errors import EnvironmentFault, extra
from sisa.store.blobs.files import disk_errors

QUEUE = ("depth", "undecided", "held", "failed_erasures", "oldest_days_left")
CurveLine = Mapping[str, Any]
RUN_TAG, CONTENT_TAG = "sisa.run", "sisa.content"
BATCH = 1000  # the most metrics that MLflow takes in one call


@dataclass(frozen=True, slots=True)
class Point:
    """Hold one value of a curve, at a step and at a time (seconds since 1970)."""

    curve: str
    step: int
    value: float
    at: float


Curves = Mapping[str, Sequence[Point]]  # by run


def points(lines: Iterable[CurveLine]) -> list[Point]:
    """Return the points of a run, in the order of its lines."""
    found: list[Point] = []
    seen: Counter[str] = Counter()
    tokens_trained = 0
    for line in lines:
        event = line["event"]
        seen[event] += 1
        if event == "slice_trained":
            tokens_trained += line["tokens"] or 0
        at = datetime.fromisoformat(line["at"]).timestamp()
        step, values = _values(line, seen[event], tokens_trained)
        found += [Point(name, step, float(n), at) for name, n in values.items() if n is not None]
    return found


def _values(line: CurveLine, number: int, tokens_trained: int) -> tuple[int, dict[str, Any]]:
    """Return the step and the values of a line, which is the `number`th of its event."""
    event = line["event"]
    if event == "epoch_trained":
        return line["epoch"], {f"loss/shard-{line['shard']}/slice-{line['slice']}": line["loss"]}
    if event == "slice_trained":
        tokens = line["tokens"]  # null: erased, or not measured
        return number, {
            "slice_seconds": line["seconds"],
            "slices_trained": number,
            "tokens_trained": tokens_trained if tokens else None,
            "tokens_per_second": tokens / line["seconds"] if tokens and line["seconds"] else None,
        }
    if event == "queue_seen":
        return number, {f"queue/{name}": line[name] for name in QUEUE}
    if event == "deletion_completed":
        return number, {"deletion/seconds": line["seconds"], "deletion/records": line["num_records"]}
    if event == "erasure_failed":
        return number, {"deletion/erasure_failures": number}
    return number, {}


def summary(lines: Sequence[CurveLine]) -> dict[str, Any]:
    """Return a summary of a run, without erased losses and tokens; speed is that of one worker."""
    events = Counter(each["event"] for each in lines)
    slices = [each for each in lines if each["event"] == "slice_trained"]
    counted = [each for each in slices if each["tokens"] is not None]
    tokens, seconds = (sum(each[name] for each in counted) for name in ("tokens", "seconds"))
    losses = [each["loss"] for each in lines if each.get("loss") is not None]
    return {
        "began": lines[0]["at"] if lines else None,
        "slices_trained": len(slices),
        "tokens": tokens,
        "seconds": round(sum(each["seconds"] for each in slices), 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "last_loss": losses[-1] if losses else None,
        "deletions": events["deletion_completed"],
        "erasure_failures": events["erasure_failed"],
    }


def to_tensorboard(directory: Path, curves: Curves) -> None:
    """Write event files of TensorBoard, in one directory per run."""
    with extra("tensorboard"):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for run, found in curves.items():
        folder = directory / run
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for former in folder.glob("events.out.tfevents.*"):
                former.unlink()
            writer = EventFileWriter(str(folder))
            for each in found:
                drawn = Summary(value=[Summary.Value(tag=each.curve, simple_value=each.value)])
                writer.add_event(Event(wall_time=each.at, step=each.step, summary=drawn))
            writer.close()


def to_mlflow(uri: str, experiment: str, curves: Curves) -> None:
    """Write runs of an experiment to an MLflow server, or to a database."""
    with _mlflow_errors(uri):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        place = known.experiment_id if known else client.create_experiment(experiment)
        for run, found in curves.items():
            _write_run(client, place, run, found)


def _write_run(client: Any, experiment: str, run: str, found: Sequence[Point]) -> None:
    from mlflow.entities import Metric

    content = digest_of([asdict(each) for each in found])
    former = client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run}'")
    if [each.data.tags.get(CONTENT_TAG) for each in former] == [content]:
        return
    for each in former:
        client.delete_run(each.info.run_id)
    times = [round(1000 * each.at) for each in found] or [0]
    made = client.create_run(experiment, start_time=min(times), tags={RUN_TAG: run}, run_name=run)
    metrics = [
        Metric(each.curve, each.value, at, each.step) for each, at in zip(found, times, strict=False)
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
