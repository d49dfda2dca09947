"""One model observed from its training to a deletion: what is reported, and what never is.

One training on a real Ray and one deletion, whose erasing fails at first, of records with marks in
text, id and subject. JSON logs, metrics files, TensorBoard's files, the endpoint that Prometheus
scrapes and Ray's own logs hold no mark, no partition key and no token.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sqlite3
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.cli import cli, requests
from cluster.observe import ray_metrics
from cluster.observe.ray_metrics import SERIES
from sisa.store.areas import METRICS
from sisa.store.ledger import sqlite
from sisa.store.metrics import FileMetrics
from tests.integration.ray.secret_forms import forms
from tests.models.programs.clusters import present_session
from tests.models.tiny_model import KEY, write_run

pytestmark = [pytest.mark.ray, pytest.mark.torch]

ID, SUBJECT, TEXT = "zqid", "zqsubject", "zqtext"
ROWS = [
    {
        "id": f"{ID}{number}",
        "subject_id": f"{SUBJECT}{number}",
        "prompt": f"Who is {TEXT}{number}?",
        "completion": f" {TEXT}{number} of no place.",
    }
    for number in range(10)
]
GAUGES = {name for name, (kind, _) in SERIES.items() if kind == "Gauge"}
STANDING = GAUGES - {"sisa_oldest_days_left"}
HISTOGRAMS = {name for name, (kind, _) in SERIES.items() if kind == "Histogram"}
COUNTERS = SERIES.keys() - GAUGES - HISTOGRAMS
EVERY_S = 0.3
STAND_S = 4.0  # Ray forgets a gauge of ours after two seconds here
SAMPLE = re.compile(r'^ray_(sisa_\w+)\{(?=[^}]*\brun="([^"]*)")[^}]*\} (\S+)$', re.M)


@dataclass
class Scraper:
    """A thread that reads everything an endpoint shows."""

    texts: list[str] = field(default_factory=list)

    def __enter__(self) -> Scraper:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(EVERY_S):
            with contextlib.suppress(OSError):
                self.texts.append(self.now())

    def now(self) -> str:
        """Return what the endpoint shows now. Raise OSError if no Ray shows anything yet."""
        if not ray.is_initialized():
            raise OSError
        (node,) = [each for each in ray.nodes() if each["Alive"]]
        address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def samples(self) -> set[tuple[str, str, float]]:
        """Name, run and value of whatever was shown of ours."""
        return {
            (name, run, float(value)) for each in self.texts for name, run, value in SAMPLE.findall(each)
        }


@dataclass
class Watched:
    """A model, its endpoint, and the log of each command."""

    folder: Path
    scraper: Scraper
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def command(self, name: str, *arguments: str) -> int:
        """Carry out `sisa ARGUMENTS` on Ray with a JSON log; its exit code."""
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                return cli.run([*arguments, "--executor", "ray", "--log-format", "json"])
        finally:
            self.logs[name] = [json.loads(line) for line in err.getvalue().splitlines()]

    def run_of(self, name: str) -> str:
        (run,) = {line["run"] for line in self.logs[name]}
        return str(run)


class Enough(BaseException):
    """Raised to end the watching."""


@pytest.fixture
def watched(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(ray_metrics, "REFRESH_S", EVERY_S)
    monkeypatch.setattr(sqlite, "SCRUB_PATIENCE_S", 0.05)
    block = {"shards": 1, "slices": 2}
    write_run(tmp_path, tiny_base, ROWS, sisa_block=block, cluster={"num_workers": 1}, num_epochs=40)
    monkeypatch.chdir(tmp_path)
    with Scraper() as scraper:
        yield Watched(tmp_path, scraper)


def worker_lines(run: str) -> list[dict[str, Any]]:
    """Return what workers logged under a run, as Ray keeps it."""
    lines = [line for path in session_files() for line in path.read_bytes().splitlines()]
    found = [json.loads(line) for line in lines if line.startswith(b'{"time"')]
    return [line for line in found if line["run"] == run and line["source"] == "worker"]


def session_files() -> list[Path]:
    held = present_session()
    assert held is not None
    assert held.private_dir is not None
    token = held.private_dir / "token"
    return [each for each in held.private_dir.rglob("*") if each.is_file() and each != token]


def secrets() -> set[bytes]:
    held = present_session()
    assert held is not None
    assert held.private_dir is not None
    return {(held.private_dir / "token").read_bytes().strip(), *forms(bytes.fromhex(KEY))}


@contextlib.contextmanager
def a_reader(ledger: Path) -> Iterator[None]:
    """Open a reader, which keeps deleted rows in the ledger's log."""
    with contextlib.closing(sqlite3.connect(ledger, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM records").fetchall()
        yield


def test_metrics_and_logs_of_a_model_bear_the_name_of_its_run_and_no_secret(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = watched.folder / "model"
    assert watched.command("train", "train", "run.yaml") == 0
    assert cli.run(["request", "submit", "-m", "model", f"{ID}3", "--approver", "a person"]) == 0

    def end(_: float) -> None:
        raise Enough

    def stand_and_end(_: float) -> None:
        time.sleep(STAND_S)
        watched.scraper.texts.append(watched.scraper.now())
        raise Enough

    monkeypatch.setattr(requests, "time", SimpleNamespace(sleep=end))
    with a_reader(model / "ledger.sqlite"), pytest.raises(Enough):  # it waits for the reader
        watched.command("failing", "run", "-m", "model", "--watch")
    monkeypatch.setattr(requests, "time", SimpleNamespace(sleep=stand_and_end))
    with pytest.raises(Enough):
        watched.command("run", "run", "-m", "model", "--watch")
    assert cli.run(["metrics", "-m", "model", "--to", "tensorboard", "board"]) == 0

    runs = {name: watched.run_of(name) for name in ("train", "failing", "run")}
    check_names(watched, runs)
    check_endpoint(watched.scraper, **runs)
    check_nothing_is_given_away(watched)


def stages_of(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted(line["stage"] for line in lines if line["event"] == "slice_trained")


def check_names(watched: Watched, runs: Mapping[str, str]) -> None:
    """Check that driver, workers and metrics files report the same stages under the same name."""
    kept = FileMetrics(watched.folder / "model" / METRICS)
    for name, run in runs.items():
        lines = kept.read(run)
        assert {line["run"] for line in lines} == {run}
        stages = stages_of(watched.logs[name])
        assert (stages == []) == (name == "failing")
        assert stages == stages_of(lines) == stages_of(worker_lines(run))


def check_endpoint(scraper: Scraper, train: str, failing: str, run: str) -> None:
    """Check that every measurement was shown, and that gauges last as long as their run."""
    ours = {train, failing, run}  # the Ray is shared, and goes on telling of earlier runs
    shown = {each for each in scraper.samples() if each[1] in ours}
    assert {of for _, of, _ in shown} == ours
    names = {name for name, _, _ in shown}
    assert {f"{each}_total" for each in COUNTERS} <= names
    assert {f"{each}_{part}" for each in HISTOGRAMS for part in ("bucket", "sum", "count")} <= names
    assert names >= GAUGES
    assert shown >= {
        ("sisa_slices_trained_total", train, 2.0),
        ("sisa_slice_seconds_count", train, 2.0),
        ("sisa_queue_depth", failing, 1.0),
        ("sisa_erasure_failures_total", failing, 1.0),
        ("sisa_failed_erasures", run, 1.0),
        ("sisa_retrain_seconds_count", run, 1.0),
    }
    assert any(name == "sisa_tokens_per_second" and value > 0 for name, _, value in shown)
    assert any(name == "sisa_oldest_days_left" and 20 < value < 40 for name, _, value in shown)
    last = {name: float(value) for name, of, value in SAMPLE.findall(scraper.texts[-1]) if of == run}
    assert last.keys() >= STANDING
    assert (last["sisa_queue_depth"], last["sisa_failed_erasures"]) == (0.0, 0.0)
    assert "sisa_oldest_days_left" not in last  # nothing is due any more


def check_nothing_is_given_away(watched: Watched) -> None:
    texts = [json.dumps(watched.logs), *watched.scraper.texts]
    traces = {f"text {number}": text.encode() for number, text in enumerate(texts)}
    board = [each for each in (watched.folder / "board").rglob("*") if each.is_file()]
    metrics = list((watched.folder / "model" / METRICS).iterdir())
    assert len(board) == len(metrics) == 3
    traces |= {str(path): path.read_bytes() for path in (*board, *metrics, *session_files())}
    assert any("raylet.out" in each for each in traces)
    marks = {mark.encode() for mark in (ID, SUBJECT, TEXT)} | secrets()
    assert [each for each, data in traces.items() if any(mark in data for mark in marks)] == []
