"""How evaluations read: the JSON contract, and the same in words.

No answer and no generated text is shown: those are in the logs. A value that was not measured is null,
and in words says what it needs. Forget quality is never shown without n, D and the noise floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cluster.render.render import Result, printable

if TYPE_CHECKING:
    from approx.evaluation.tofu_aggregates import Aggregates
    from approx.evaluation.tofu_evaluation import Evaluated
    from approx.metrics.auc import Auc
    from approx.metrics.forget_quality import ForgetQuality


def tofu(
    split: str, found: Sequence[tuple[Evaluated, Aggregates]], references: Sequence[Evaluated]
) -> Result:
    body = {
        "split": split,
        "models": [_named(model) | asdict(aggregates) for model, aggregates in found],
        "references": [_named(each) for each in references],
    }
    lines = [line for model, aggregates in found for line in _words(split, model, aggregates)]
    return Result(body, printable("\n".join(lines)))


def _named(model: Evaluated) -> dict[str, Any]:
    settings = None if model.settings is None else dict(model.settings)
    return {"model": model.name, "digest": model.digest, "log": str(model.log), "settings": settings}


def _words(split: str, model: Evaluated, found: Aggregates) -> list[str]:
    forget = found.forget
    num = ", ".join(f"{name} {count}" for name, count in found.num_questions.items())
    lines = [
        f"{model.name} on TOFU {split} ({num} questions; truth ratio: {found.truth_ratio})",
        f"  model utility {found.model_utility:.4f}: "
        + ", ".join(f"{name} {value:.3f}" for name, value in found.nine.items()),
        f"  forget set: probability {forget.probability:.4f}, ROUGE-L {forget.rouge:.4f}, "
        f"truth ratio {forget.truth_ratio:.4f}",
    ]
    if forget.extraction_strength is not None:
        lines.append(
            f"    extraction strength {forget.extraction_strength:.4f} (knowing nothing scores "
            f"{forget.extraction_floor:.4f}), exact memorisation {forget.exact_memorisation:.4f}"
        )
    lines.append(f"  {_quality(found.forget_quality)}")
    if found.aggregate is not None:
        lines.append(f"  forget quality and utility together {found.aggregate:.4g}")
    lines.append(f"  membership, forget against holdout: {_attacks(found.attacks, '--holdout')}")
    against = _attacks(found.attacks_against_reference, "--reference with scores")
    lines += [f"  the same questions against the reference: {against}", f"  log {model.log}"]
    return lines


def _quality(found: ForgetQuality | None) -> str:
    if found is None:
        return "forget quality not measured: give --reference"
    numbers = f"n = {found.num_model} and {found.num_reference}, D = {found.statistic:.4f}"
    floor = "not measured: give a second --reference"
    if (noise := found.noise_floor) is not None:
        floor = f"p = {noise.p_value:.4g}, D = {noise.statistic:.4f}"
    return f"forget quality {found.p_value:.4g} ({numbers}; noise floor of two references {floor})"


def _attacks(found: Mapping[str, Auc] | None, needs: str) -> str:
    if found is None:
        return f"not measured: give {needs}"
    return ", ".join(
        f"{name} AUC {each.value:.3f} [{each.low:.3f}, {each.high:.3f}]" for name, each in found.items()
    )
