"""How patches read, as JSON and as words.

Rules: as `render.py`. Every result says `approximate`. No text and no id is shown; consent is, as given.

Not covered: arguments (`patch_cli.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.render.render import Result, printable
from sisa.planning.patch_plan import num_still_known

if TYPE_CHECKING:
    from sisa.core.patch import Patch, VaultSet
    from sisa.flows.patches.patching import Unlearnt

EXIT_UNFINISHED, EXIT_NOT_MADE, EXIT_STILL_KNOWN = 6, 2, 7
NAMES = {
    "forget_probability": "probability",
    "forget_extraction_strength": "extraction strength",
    "forget_exact_memorisation": "exact memorisation",
    "forget_rougeL_recall": "ROUGE-L recall",
    "forget_min_k_plus_plus": "min-k%++",
    "retain_utility": "utility",
    "retain_probability": "probability",
}


def unlearnt(done: Unlearnt, directory: Path) -> Result:
    patch, report = done.patch, done.report
    body = {
        "approximate": True,
        "unfinished": done.unfinished,
        "patch": None if patch is None else _body(patch),
        "report": dict(report),
        "sets_erased": done.erased_sets,
        "sets_kept": done.kept_sets,
        "slices_trained": done.slices_trained,
    }
    if done.unfinished:
        at = f"after step {report.get('step')} of {report.get('num_steps')}"
        lines = [
            f"approximate: the time was spent {at}; the run is put aside, and nothing of it is served",
            f"  go on:   sisa approx unlearn -m {directory}",
            f"  give up: sisa approx revert -m {directory}",
        ]
        return Result(body, printable("\n".join(lines)), EXIT_UNFINISHED)
    if patch is None:
        lines = [f"approximate: NO patch was made: {report.get('why')}", *_known(report)]
        lines += [*_measures(report), *_again(report, directory)]
        return Result(body, printable("\n".join(lines)), EXIT_NOT_MADE)
    made = f"patch {patch.version} ({report.get('method')}, {patch.num_bytes:,} bytes)"
    lines = [
        f"approximate: {made} lies on the base, and is served beneath every shard",
        *_known(report),
        *_measures(report),
        *_robustness(report),
        *_composition(report),
        f"  texts: {done.erased_sets} sets erased from the vault, {done.kept_sets} kept",
    ]
    if done.slices_trained:
        lines.append(f"  {done.slices_trained} slices were trained over it")
    lines += _again(report, directory)
    lines.append(
        f"  an estimate, not a proof; its limits: sisa approx show -m {directory} {patch.version}"
    )
    code = EXIT_STILL_KNOWN if num_still_known(patch) else 0
    return Result(body, printable("\n".join(lines)), code)


def _known(report: Mapping[str, Any]) -> Iterator[str]:
    if found := report.get("still_known"):
        counts = f"{found['after']} of {found['of']} probed texts (before: {found['before']})"
        yield f"  still known: {counts}: {report.get('outcome')}"


def _again(report: Mapping[str, Any], directory: Path) -> Iterator[str]:
    """How to go on where something is still known."""
    if report.get("still_known", {}).get("after"):
        yield "  the texts stay in the vault, so that it can be tried again, upon this patch or after"
        yield "  `sisa approx revert`: a larger --max-utility-drop, another --method, more num_rounds"
        yield f"  to erase them instead: sisa approx release -m {directory} --all"


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("robustness")
    if not found:
        return
    steps = [each for each in found["relearning"] if each != "0"]

    def after(of: Mapping[str, float]) -> str:
        return " and ".join(_number(of[each]) for each in steps)

    control = found.get("control")
    beside = f" (a control that never knew, {control['of']}: {after(control)})" if control else ""
    rounding = ", ".join(f"{bits} bits {_number(each)}" for bits, each in found["rounding"].items())
    yield (
        f"  robustness, as probability: {_number(found['relearning']['0'])}; relearnt for "
        f"{' and '.join(steps)} steps {after(found['relearning'])}{beside}; rounded to {rounding}"
    )
    if words := found.get("rewording"):
        yield f"    asked in other words {_number(words['before'])} -> {_number(words['after'])}"


def _body(patch: Patch) -> dict[str, Any]:
    fields = asdict(patch)
    fields.pop("report")
    return {"version": patch.version, "key": patch.key, **fields}


def _measures(report: Mapping[str, Any]) -> Iterator[str]:
    before, after = report.get("metrics_before", {}), report.get("metrics_after", {})
    sets = report.get("sets", {})
    measured = {
        "forget": f"{sets.get('num_forget_measured')} of {sets.get('num_forget')} texts",
        "retain": f"{sets.get('num_judged_measured')} texts that were not trained on; "
        f"{sets.get('num_retain')} were, {sets.get('retain')}",
    }
    for role, told in measured.items():
        found = [
            f"{NAMES[name]} {_number(before[name])} -> {_number(after[name])}"
            for name in NAMES
            if name.startswith(role) and name in before and name in after
        ]
        if found:
            yield f"  {role} set ({told}): " + ", ".join(found)
    if reference := report.get("metrics_reference"):
        own = [f"{NAMES[name]} {_number(reference[name])}" for name in NAMES if name in reference]
        yield "  reference: " + ", ".join(own)
    if "forget_extraction_floor" in before:
        floor = _number(before["forget_extraction_floor"])
        yield f"    (knowing nothing of these texts scores an extraction strength of {floor})"
    if "ending" in report:
        yield f"  ended: {report['ending']}, {report.get('why')}"
    if cost := report.get("compute"):
        yield (
            f"  cost: {cost['seconds']:.1f} s, {cost['flops_estimated']:.3g} operations, "
            f"{_share(cost.get('share_of_full_finetuning'))}"
            f"peak memory {cost['peak_memory_bytes'] / 2**20:,.0f} MB"
        )


def _composition(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("composition") or {}
    for name, what in (
        ("shards", "the shards' own answers"),
        ("base", "the base's on the same records"),
    ):
        if each := found.get(name):
            yield (
                f"  {what} ({each['num_records']} remaining records): probability "
                f"{_number(each['answer_probability_before'])} -> "
                f"{_number(each['answer_probability_after'])}, "
                f"same likeliest token {_percent(each['agreement'])}, KL {_number(each['kl'])}"
            )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _share(value: float | None) -> str:
    """Of the fine-tuning that the knowledge came from; nothing where that is not known."""
    return "" if value is None else f"{_percent(value)} of the fine-tuning that taught it, "


def listed(patches: Sequence[Patch], sets: Sequence[VaultSet], over: Sequence[str]) -> Result:
    body = {
        "approximate": True,
        "patches": [_body(each) for each in patches],
        "vault": [asdict(each) for each in sets],
        "over": list(over),
    }
    lines = [] if patches else ["approximate: no patch was ever wanted"]
    for each in patches:
        trained = ", shards are trained over it" if each.key in over else ""
        lines.append(
            f"approximate patch {each.version}: {each.state}, {each.job.settings.get('method')}, "
            f"wanted {each.wanted_at}, key {each.key[:16]}...{trained}"
        )
        lines.append(f"    from {', '.join(name[:16] + '...' for name in each.job.sets)}")
    for found in sets:
        standing = "held, encrypted" if found.held else "erased"
        request = f", of {found.request_id}" if found.request_id else ""
        lines.append(
            f"vault set {found.name[:16]}...: {found.num_records} texts to {found.role}, {standing}, "
            f"since {found.put_at}{request}, consent: {found.consent}"
        )
    return Result(body, printable("\n".join(lines)))


def shown(patch: Patch, over: Sequence[str]) -> Result:
    report = patch.report
    body = {
        "approximate": True,
        "patch": _body(patch),
        "report": dict(report),
        "shards_trained_over_it": patch.key in over,
    }
    lines = [f"approximate patch {patch.version}: {patch.state}, key {patch.key}"]
    if not report:
        lines.append("  not made yet: `sisa approx unlearn` goes on with it")
        return Result(body, printable("\n".join(lines)))
    given = {**report.get("hyperparameters", {}), **report.get("settings", {})}
    lines.append(f"  {report.get('method')}: " + ", ".join(f"{k} {v}" for k, v in given.items()))
    lines += [*_known(report), *_measures(report), *_robustness(report), *_composition(report)]
    lines.append("  limits:")
    lines += [f"    - {each}" for each in report.get("limits", [])]
    return Result(body, printable("\n".join(lines)))


def reverted(gone: Sequence[Patch]) -> Result:
    body = {"approximate": True, "reverted": [_body(each) for each in gone]}
    lines = [
        f"approximate patch {each.version}: {each.state}, "
        + ("no longer served, and erased" if each.state == "reverted" else "given up before it was made")
        for each in gone
    ]
    return Result(body, printable("\n".join(lines)))


def released(gone: Sequence[VaultSet]) -> Result:
    texts = sum(each.num_records for each in gone)
    body = {"approximate": True, "released": [asdict(each) for each in gone]}
    lines = [f"{len(gone)} sets with {texts} texts are erased from the vault, their keys first"]
    lines.append("  approximate patches that were made from them stay; they can't be made again")
    return Result(body, printable("\n".join(lines)))
