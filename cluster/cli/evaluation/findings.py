"""Put what the commands of `sisa eval` found into JSON and lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from approx.attacks.attack_run import AttackedModel
    from approx.benchmarks.headline import Headline
    from approx.evaluation.asking import FinishedLog
    from approx.metrics.auc import Auc
    from approx.metrics.privleak import PrivLeak


def about_model(model: FinishedLog | AttackedModel) -> dict[str, Any]:
    """Return the keys of a model that all of these commands print."""
    settings = None if model.settings is None else dict(model.settings)
    return {"model": model.name, "digest": model.digest, "log": str(model.log), "settings": settings}


def headline_words(found: Headline) -> Iterator[str]:
    """Yield a line for each finding of a headline."""
    for name, each in found.findings.items():
        beside = "" if each.target is None else f", beside {each.target:.4f}"
        if each.away is not None:
            beside += f": {each.away.value:+.4f} [{each.away.low:+.4f}, {each.away.high:+.4f}]"
        lost = "  LOST" if each.lost else ""
        yield f"  {name:<20} {each.value:.4f}{beside} ({each.measure}){lost}"
    for name, needs in found.not_measured.items():
        yield f"  {name:<20} not measured: needs {needs}"


def privleak_words(found: PrivLeak) -> str:
    """Return PrivLeak with the meaning of its sign."""
    return (
        f"  PrivLeak {found.value:+.1f}% [{found.low:+.1f}, {found.high:+.1f}]: 0 is the reference, "
        "below 0 still recognised, above 0 over-unlearned"
    )


def over_unlearned_words(found: Mapping[str, Auc] | None) -> list[str]:
    """Return a line for each meaning of AUCs below 0.5, with its attacks."""
    from approx.metrics.auc import reading

    by_reading: dict[str, list[str]] = {}
    for name, each in (found or {}).items():
        if each.high < 0.5:
            by_reading.setdefault(reading(each), []).append(name)
    return [f"    {', '.join(names)}: {words}" for words, names in by_reading.items()]


def auc_words(found: Mapping[str, Auc] | None, needs: str = "") -> str:
    """Return AUCs with their intervals, or the option that they need."""
    if found is None:
        return f"not measured: give {needs}"
    return ", ".join(
        f"{name} AUC {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for name, each in found.items()
    )
