"""Turn a run's metrics into curves, for tools that draw them: named points with a step and a time.

An erased loss has no point. The step of a loss is its epoch; other steps count events.

>>> line = {"at": "2026-11-25T21:37:49.000+00:00", "run": "r", "event": "slice_trained", "shard": 0}
>>> line |= {"slice": 1, "stage": "0f", "num_records": 2, "record_epochs": 4}
>>> line |= {"tokens": 100, "seconds": 2.0}
>>> [(each.curve, each.step, each.value) for each in points([line, line])][-3:]
[('slices_trained', 2, 2.0), ('tokens_trained', 2, 200.0), ('tokens_per_second', 2, 50.0)]
>>> summary([line, line])["tokens_per_second"]
50.0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

QUEUE = ("depth", "undecided", "held", "failed_erasures", "oldest_days_left")
CurveLine = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """Hold one value of a curve, at a step and at a time (seconds since 1970)."""

    curve: str
    step: int
    value: float
    at: float


def points(lines: Iterable[CurveLine]) -> list[Point]:
    """Return the points of a run, in the order of its lines."""
    found: list[Point] = []
    seen: Counter[str] = Counter()
    for line in lines:
        seen[line["event"]] += 1
        at = datetime.fromisoformat(line["at"]).timestamp()
        step, values = _values(line, seen)
        known = {name: value for name, value in values.items() if value is not None}
        found += [Point(name, step, float(value), at) for name, value in known.items()]
    return found


def _values(line: CurveLine, seen: Counter[str]) -> tuple[int, dict[str, Any]]:
    event = line["event"]
    number = seen[event]
    if event == "epoch_trained":
        return line["epoch"], {f"loss/shard-{line['shard']}/slice-{line['slice']}": line["loss"]}
    if event == "slice_trained":
        tokens = line["tokens"] or 0
        seen["tokens"] += tokens
        return number, {
            "slice_seconds": line["seconds"],
            "slices_trained": number,
            "tokens_trained": seen["tokens"] if tokens else None,
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
    """Return a summary of a run.

    Tokens are counted over the stages that still have them. Their speed is that of one worker. The loss
    is the last one that is not erased.
    """
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
