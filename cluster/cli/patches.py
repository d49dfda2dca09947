"""Probe the base and patch it: `sisa approx probe`, `methods`, `unlearn`, `patches`, `show` and others.

All results are approximate and say so. Texts and ids are never printed; consent is kept and shown as
given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.command import (
    PATH,
    ExecutorChoice,
    command,
    command_group,
    consent_option,
    executor_option,
    model_option,
    opened,
)
from cluster.cli.input_files import read_lines
from cluster.render.deletions import probed
from cluster.render.result import Result, counted, of_model
from sisa.core.errors import InvalidInput, Problem
from sisa.planning.patch_plan import num_still_known

if TYPE_CHECKING:
    from sisa.config.config import RunConfig
    from sisa.core.patches import Patch, VaultSet
    from sisa.flows.patches.patching import Unlearnt, Wish

METHOD = "npo"
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
retrain_option = click.option(
    "--retrain-shards", is_flag=True, help="Then retrain all shards over the patched base; takes long."
)
approx = command_group("approx", "Measure and reduce what the base knows; never exact.")


@command("probe", "-m model --file texts.jsonl", group=approx)
@model_option
@click.option(
    "--file",
    required=True,
    type=PATH,
    help="Records (JSONL, Parquet), or a text file with a text on each line.",
)
@click.option("--without-patches", is_flag=True, help="Probe the base as it was before any patch.")
def probe(directory: Path, file: Path, without_patches: bool) -> Result:
    """Ask the base alone whether it reproduces given texts."""
    import sisa.unlearn
    from approx.evaluation.probe import open_probe
    from sisa.config.fields import DATA_SUFFIXES
    from sisa.core.domain import Part, Record
    from sisa.data.reader import read_like

    with opened(directory) as model:
        if file.suffix.lower() in DATA_SUFFIXES:
            records = list(read_like(model.config, file))
        else:
            lines = enumerate(read_lines(file))
            records = [Record(str(n), None, "text", (Part("text", line),)) for n, line in lines]
        base = model.resources.base
        patches = [] if without_patches else sisa.unlearn.served(model)
        found = open_probe(base, model.config, patches)(records)
    return Result({**asdict(found), "approximate": True}, [each.strip() for each in probed(found)])


@command("methods", "--json", group=approx)
def methods() -> Result:
    """List the methods of `sisa approx unlearn`: paper, what they need, defaults."""
    from approx.patches.patch_settings import describe_methods

    return methods_listed(describe_methods())


def methods_listed(found: Sequence[Mapping[str, Any]]) -> Result:
    lines = []
    for each in found:
        chosen = " (default)" if each["name"] == METHOD else ""
        lines += [
            f"approximate method {each['name']}{chosen}, {each['family']}: {each['paper']}",
            f"    needs: {needs_in_words(each['needs'])}",
            f"    defaults: {values_in_words(each['defaults']) or 'none'}",
        ]
    return Result({"approximate": True, "default": METHOD, "methods": list(found)}, lines)


def needs_in_words(needs: Mapping[str, Any]) -> str:
    """Return what a method needs besides the forget set.

    >>> needs_in_words({"retain": True, "reference": True, "preferred": "refusals"})
    'retain set, unpatched base, refusals'
    """
    found = {"retain set": needs["retain"], "unpatched base": needs["reference"]}
    names = [name for name, is_needed in found.items() if is_needed]
    names += [needs["preferred"]] if needs["preferred"] else []
    return ", ".join(names) or "nothing else"


def values_in_words(values: Mapping[str, Any]) -> str:
    """Return values by name, as `--set` takes them; of the scales of task arithmetic the ends.

    >>> values_in_words({"beta": 0.1, "alpha": None, "alphas": (0.05, 1.0, 64.0), "retain_loss": "nll"})
    'beta 0.1, alpha null, alphas 0.05 to 64.0, retain_loss nll'
    """

    def shown(name: str, value: Any) -> str:
        if name == "alphas":
            return f"{value[0]} to {value[-1]}"
        return value if isinstance(value, str) else json.dumps(value)

    return ", ".join(f"{name} {shown(name, value)}" for name, value in values.items())


@command("unlearn", '-m model --forget texts.jsonl --consent "asked on 2026-11-01"', group=approx)
@model_option
@click.option("--forget", type=PATH, help="Records that the base should forget.")
@click.option(
    "--request", "requests", multiple=True, help="A request whose text is in the vault. Repeatable."
)
@click.option("--retain", type=PATH, help="Records to keep, beside the base's own answers.")
@click.option(
    "--reference",
    default="",
    show_default=False,
    help="A model of the base's tokenizer and architecture that never saw the texts, for comparison.",
)
@click.option("--method", help=f"Method, {METHOD} by default; `sisa approx methods` lists them all.")
@click.option(
    "--selection",
    help="What the patch may change: all modules (default); fisher, those that matter most to the "
    "texts; traced, those in the layers that the answers pass through; heads, attention heads in these.",
)
@click.option(
    "--set",
    "assigned",
    multiple=True,
    metavar="KEY=VALUE",
    help="A hyper-parameter of the method, or of the run: num_rounds, max_steps (of a round), "
    "learning_rate, batch_size, seed, lora_r and others. Repeatable.",
)
@click.option(
    "--max-seconds", type=click.FloatRange(0), help="Suspend the run after this time (exit code 6)."
)
@click.option(
    "--max-utility-drop",
    type=click.FloatRange(0),
    help="Largest allowed drop of exp(-mean NLL per token) on texts that are not trained on; 0.1 by "
    "default.",
)
@click.option(
    "--max-drift",
    type=click.FloatRange(0, 1),
    help="Retrain all shards over the patches once these change at least this share of the tokens of "
    "the shards' answers.",
)
@consent_option
@retrain_option
@executor_option
def unlearn(
    directory: Path,
    forget: Path | None,
    requests: tuple[str, ...],
    retain: Path | None,
    reference: str,
    method: str | None,
    selection: str | None,
    assigned: tuple[str, ...],
    max_seconds: float | None,
    max_utility_drop: float | None,
    max_drift: float | None,
    consent: str,
    retrain_shards: bool,
    executor: ExecutorChoice,
) -> Result:
    """Make a patch that makes the base say less of given texts.

    Without texts, continue a suspended run.
    """
    import sisa.unlearn

    values = assignments(assigned)
    options = {"max_utility_drop": max_utility_drop, "selection": selection}
    given = {name: value for name, value in options.items() if value is not None}
    if twice := given.keys() & values.keys():
        raise click.UsageError(f"{', '.join(sorted(twice))}: give the option or --set, not both")
    values |= given
    asked = forget is not None or bool(requests)
    if not asked and (method or retain or reference or values or consent):
        raise click.UsageError("give --forget or --request; to continue with a patch give neither")
    with opened(directory, executor) as model:
        wish = None
        if asked:
            wish = _wish(model.config, method or METHOD, values, forget, retain)
            wish = replace(wish, consent=consent, reference=reference)
        done = sisa.unlearn.unlearn(
            model,
            wish,
            request_ids=requests,
            max_seconds=max_seconds,
            max_drift=0.0 if retrain_shards else max_drift,
        )
    return unlearnt(done, directory)


def assignments(assigned: Sequence[str]) -> dict[str, Any]:
    """Return the values of KEY=VALUE arguments, as JSON or text. Raise InvalidInput with all problems.

    >>> assignments(["beta=0.2", "retain_loss=kl", "max_steps=null", "lora_target_modules=q,v"])
    {'beta': 0.2, 'retain_loss': 'kl', 'max_steps': None, 'lora_target_modules': ['q', 'v']}
    """
    found: dict[str, Any] = {}
    problems = []
    for number, each in enumerate(assigned, 1):
        name, equals, value = each.partition("=")
        if not equals or not name or name in found:
            problems.append(Problem(f"--set {number}", "not KEY=VALUE, or a repeated key"))
        else:
            found[name] = _value(name, value)
    if problems:
        raise InvalidInput("settings can't be read", problems=problems, next_step="write --set beta=0.2")
    return found


def _value(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        listed = name == "lora_target_modules" and value != "all-linear"
        return value.split(",") if listed else value


def _wish(
    config: RunConfig, method: str, values: Mapping[str, Any], forget: Path | None, retain: Path | None
) -> Wish:
    from approx.patches.patch_settings import Adapter, settings_of
    from sisa.data.reader import read_like
    from sisa.flows.patches.patching import Wish

    settings = settings_of(
        method,
        values,
        Adapter(config.lora_r, config.lora_alpha, config.lora_target_modules),
        seed=config.seed,
        sequence_len=config.sequence_len,
        overlength=config.overlength,
    )
    texts = tuple(read_like(config, forget)) if forget else ()
    return Wish(settings, texts, tuple(read_like(config, retain)) if retain else None)


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
        "drift": done.drift,
    }
    if done.unfinished:
        at = f"after step {report.get('step')} of {report.get('num_steps')}"
        lines = [
            f"approximate: out of time {at}; the run is suspended, and nothing of it is served",
            f"  continue: sisa approx unlearn {of_model(directory)}",
            f"  give up:  sisa approx revert {of_model(directory)}",
        ]
        return Result(body, lines, EXIT_UNFINISHED)
    if patch is None:
        why = f"approximate: NO patch was made: {report.get('why')}"
        return Result(body, [why, *_measures(report), *_again(report, directory)], EXIT_NOT_MADE)
    made = f"patch {patch.version} ({report.get('method')}, {patch.num_bytes:,} bytes)"
    lines = [
        f"approximate: {made} is active, and is served beneath every shard",
        *_measures(report),
        f"  texts: {counted(done.erased_sets, 'set')} erased from the vault, {done.kept_sets} kept",
    ]
    if done.drift is not None:
        lines.append(f"  shards: {done.drift:.1%} of the tokens of their answers changed")
    if done.slices_trained:
        lines.append(f"  retrained over it: {counted(done.slices_trained, 'slice')}")
    limits = f"its limits: sisa approx show {of_model(directory)} {patch.version}"
    lines += [*_again(report, directory), f"  an estimate, not a proof; {limits}"]
    return Result(body, lines, EXIT_STILL_KNOWN if num_still_known(patch) else 0)


def _again(report: Mapping[str, Any], directory: Path) -> Iterator[str]:
    if report.get("still_known", {}).get("after"):
        made = ", on top of this patch or after `sisa approx revert`" if report.get("patch_made") else ""
        yield f"  the texts stay in the vault, so you can try again{made}:"
        diverged = report.get("ending") == "diverged"
        way = "a lower learning_rate" if diverged else "a larger --max-utility-drop, more num_rounds"
        yield f"  {way}, or another --method"
        yield f"  to erase them instead: sisa approx release {of_model(directory)} --all"


def _measures(report: Mapping[str, Any]) -> Iterator[str]:
    """Return everything that a report has measured; a run that made no patch measured less."""
    if found := report.get("still_known"):
        counts = f"{found['after']} of {found['of']} probed texts (before: {found['before']})"
        yield f"  still known: {counts}: {report.get('outcome')}"
    before, after = report.get("metrics_before", {}), report.get("metrics_after", {})
    reference, sets = report.get("metrics_reference", {}), report.get("sets", {})

    def change(name: str) -> str:
        beside = f" (reference {_number(reference[name])})" if name in reference else ""
        return f"{NAMES[name]} {_number(before[name])} -> {_number(after[name])}{beside}"

    roles = {
        "forget": f"{sets.get('num_forget_measured')} of {sets.get('num_forget')} texts",
        "retain": f"{sets.get('num_judged_measured')} texts that were not trained on; "
        f"{sets.get('num_retain')} were, {sets.get('retain')}",
    }
    for role, what in roles.items():
        measured = [each for each in NAMES if each.startswith(role) and each in before and each in after]
        if measured:
            yield f"  {role} set ({what}): " + ", ".join(map(change, measured))
    if "forget_extraction_floor" in before:
        floor = _number(before["forget_extraction_floor"])
        yield f"    (knowing nothing of these texts scores an extraction strength of {floor})"
    if "ending" in report:
        yield f"  ended: {report['ending']}, {report.get('why')}"
    if cost := report.get("compute"):
        yield (
            f"  cost: {cost['seconds']:.1f} s, {cost['flops_estimated']:.3g} operations, "
            f"peak memory {cost['peak_memory_bytes'] / 2**20:,.0f} MB"
        )
    yield from _robustness(report)
    yield from _composition(report)


def _robustness(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("robustness")
    if not found:
        return
    steps = sorted((each for each in found["relearning"] if each != "0"), key=int)

    def after(of: Mapping[str, float]) -> str:
        return " and ".join(_number(of[each]) for each in steps)

    control = found.get("control")
    beside = f" (a control that never knew, {control['of']}: {after(control)})" if control else ""
    rounded = sorted(found["rounding"].items(), key=lambda each: -int(each[0]))  # JSON sorts text
    rounding = ", ".join(f"{bits} bits {_number(each)}" for bits, each in rounded)
    yield (
        f"  robustness, as probability: {_number(found['relearning']['0'])}; relearnt for "
        f"{' and '.join(steps)} steps {after(found['relearning'])}{beside}; rounded to {rounding}"
    )
    if (half := found.get("steps_until_half")) is not None:
        yield f"    half of what the patch took is back after {half:.1f} steps"
    if words := found.get("rewording"):
        yield f"    asked in other words {_number(words['before'])} -> {_number(words['after'])}"


def _composition(report: Mapping[str, Any]) -> Iterator[str]:
    found = report.get("composition") or {}
    answers = {"shards": "the shards' own answers", "base": "the base's on the same records"}
    for name, what in answers.items():
        if each := found.get(name):
            yield (
                f"  {what} ({each['num_records']} remaining records): probability "
                f"{_number(each['answer_probability_before'])} -> "
                f"{_number(each['answer_probability_after'])}, "
                f"same likeliest token {each['agreement']:.1%}, KL {_number(each['kl'])}"
            )


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


@command("patches", "-m model", group=approx)
@model_option
def patches(directory: Path) -> Result:
    """List all patches and the vault's texts."""
    import sisa.unlearn

    with opened(directory) as model:
        return patches_listed(*sisa.unlearn.patches(model))


def patches_listed(patches: Sequence[Patch], sets: Sequence[VaultSet], over: Sequence[str]) -> Result:
    body = {
        "approximate": True,
        "patches": [_body(each) for each in patches],
        "vault": [asdict(each) for each in sets],
        "over": list(over),
    }
    lines = [] if patches else ["approximate: no patches"]
    for each in patches:
        trained = ", shards are trained over it" if each.key in over else ""
        lines.append(
            f"approximate patch {each.version}: {each.state}, {each.job.settings.get('method')}, "
            f"requested {each.wanted_at}, key {each.key[:16]}...{trained}"
        )
        lines.append(f"    from {', '.join(name[:16] + '...' for name in each.job.sets)}")
    for found in sets:
        standing = "held, encrypted" if found.held else "erased"
        request = f", of {found.request_id}" if found.request_id else ""
        lines.append(
            f"vault set {found.name[:16]}...: {found.num_records} texts to {found.role}, {standing}, "
            f"since {found.put_at}{request}, consent: {found.consent}"
        )
    return Result(body, lines)


def _body(patch: Patch) -> dict[str, Any]:
    fields = asdict(patch)
    fields.pop("report")
    return {"version": patch.version, "key": patch.key, **fields}


@command("show", "-m model 1", group=approx)
@model_option
@click.argument("version", type=click.IntRange(1))
def show_patch(directory: Path, version: int) -> Result:
    """Show a patch's report: settings, measures, limits."""
    import sisa.unlearn

    with opened(directory) as model:
        found, _, over = sisa.unlearn.patches(model)
    for each in found:
        if each.version == version:
            return patch_shown(each, over)
    raise InvalidInput(
        "there is no such patch",
        expected=f"a version from 1 to {len(found)}" if found else "",
        got=str(version),
        next_step="`sisa approx patches` lists them",
    )


def patch_shown(patch: Patch, over: Sequence[str]) -> Result:
    report = patch.report
    body = {
        "approximate": True,
        "patch": _body(patch),
        "report": dict(report),
        "shards_trained_over_it": patch.key in over,
    }
    lines = [f"approximate patch {patch.version}: {patch.state}, key {patch.key}"]
    if not report:
        return Result(body, [*lines, "  not made yet: `sisa approx unlearn` continues it"])
    blocks = ("hyperparameters", "settings", "selection", "bounds")
    given = {name: value for block in blocks for name, value in report.get(block, {}).items()}
    lines.append(f"  {report.get('method')}: {values_in_words(given)}")
    limits = (f"    - {each}" for each in report.get("limits", []))
    return Result(body, [*lines, *_measures(report), "  limits:", *limits])


@command("revert", "-m model", group=approx)
@model_option
@click.option("--all", "everything", is_flag=True, help="Remove all patches, not only the newest.")
@retrain_option
@executor_option
def revert(directory: Path, everything: bool, retrain_shards: bool, executor: ExecutorChoice) -> Result:
    """Cancel a requested patch, or else remove the newest one."""
    import sisa.unlearn

    with opened(directory, executor) as model:
        return reverted(sisa.unlearn.revert(model, everything=everything, retrain_shards=retrain_shards))


def reverted(gone: Sequence[Patch]) -> Result:
    body = {"approximate": True, "reverted": [_body(each) for each in gone]}
    lines = [
        f"approximate patch {each.version}: {each.state}, "
        + ("no longer served, and erased" if each.state == "reverted" else "given up before it was made")
        for each in gone
    ]
    return Result(body, lines)


@command("release", "-m model --all", group=approx)
@model_option
@click.option(
    "--set", "sets", multiple=True, help="A set's name, or its first 8 letters or more. Repeatable."
)
@click.option(
    "--request", "requests", multiple=True, help="A request whose text is in the vault. Repeatable."
)
@click.option("--all", "everything", is_flag=True, help="Erase all texts.")
def release(
    directory: Path, sets: tuple[str, ...], requests: tuple[str, ...], everything: bool
) -> Result:
    """Erase texts from the vault. Patches made from them stay."""
    import sisa.unlearn

    if everything == bool(sets or requests):
        raise click.UsageError("give --set or --request, or --all")
    with opened(directory) as model:
        return released(
            sisa.unlearn.release(model, sets=sets, request_ids=requests, everything=everything)
        )


def released(gone: Sequence[VaultSet]) -> Result:
    texts = sum(each.num_records for each in gone)
    body = {"approximate": True, "released": [asdict(each) for each in gone]}
    lines = [
        f"{counted(len(gone), 'set')} of {counted(texts, 'text')} erased from the vault, keys first",
        "  approximate patches that were made from them stay; they can't be made again",
    ]
    return Result(body, lines)
