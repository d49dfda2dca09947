"""`sisa approx unlearn`, `patches`, `show`, `revert`, `release`: patches on the base.

Rules: as `cli.py`. Whatever is told here is approximate, and says so. Texts and ids are never repeated;
consent is kept and shown as given. A run that is out of time ends with exit code 6, one that no patch
came of with 2, one after which the base still knows some of the texts with 7; all print their report.

Not covered: how results read (`patch_render.py`), settings (`approx/patches/patch_settings.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.approx_cli import approx
from cluster.cli.command import command, consent_option, executor_option, model_option, opened
from cluster.render import patch_render as render
from cluster.render.render import Result
from sisa.core.errors import InvalidInput, Problem

if TYPE_CHECKING:
    from sisa.config.config import RunConfig
    from sisa.flows.patches.patching import Wish
    from sisa.flows.wiring.wiring import OpenExecutor
    from sisa.model import Model

METHODS = (
    *("gradient_ascent", "graddiff", "kl_minimisation", "npo", "simnpo", "dpo", "idk_dpo"),
    "task_arithmetic",
)
METHOD = "npo"
set_option = click.option(
    "--set",
    "assigned",
    multiple=True,
    metavar="KEY=VALUE",
    help="A hyper-parameter of the method, or of the run: num_epochs, max_steps, learning_rate, "
    "batch_size, seed, lora_r and others. Repeatable.",
)
retrain_option = click.option(
    "--retrain-shards", is_flag=True, help="Then train all shards over what is served: takes long."
)


@command(
    "unlearn",
    'sisa approx unlearn -m model --forget texts.jsonl --consent "asked on 2026-11-01"',
    group=approx,
)
@model_option
@click.option("--forget", type=click.Path(path_type=Path), help="Records that the base is to forget.")
@click.option("--request", "requests", multiple=True, help="A request whose text is in the vault.")
@click.option(
    "--retain", type=click.Path(path_type=Path), help="Records to keep; else the base's own answers."
)
@click.option(
    "--reference",
    default="",
    help="A model with the base's tokenizer that never saw the texts, to be measured beside the patch.",
)
@click.option("--method", type=click.Choice(METHODS), help=f"{METHOD} unless given.")
@set_option
@click.option("--max-seconds", type=click.FloatRange(0), help="Then put the run aside (exit code 6).")
@click.option(
    "--max-utility-drop",
    type=click.FloatRange(0),
    help="Most that exp(-mean NLL per token), on texts that are not trained on, may fall by; 0.1 unless "
    "given.",
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
    assigned: tuple[str, ...],
    max_seconds: float | None,
    max_utility_drop: float | None,
    consent: str,
    retrain_shards: bool,
    executor: str | OpenExecutor,
) -> Result:
    """Make the base forget some texts, by a patch as strong as it takes; without any, go on."""
    from sisa.unlearn import unlearn

    values = assignments(assigned)
    if max_utility_drop is not None:
        values["max_utility_drop"] = max_utility_drop
    asked = forget is not None or bool(requests)
    if not asked and (method or retain or reference or values or consent):
        raise click.UsageError("give --forget or --request; to go on with a patch give neither")
    with opened(directory, executor) as model:
        wish = _wish(model, method or METHOD, values, forget, retain, consent) if asked else None
        wish = replace(wish, reference=reference) if wish else None
        done = unlearn(
            *(model, wish),
            request_ids=requests,
            max_seconds=max_seconds,
            retrain_shards=retrain_shards,
        )
    return render.unlearnt(done, directory)


def assignments(assigned: Sequence[str]) -> dict[str, Any]:
    """Values of KEY=VALUE: JSON where it is JSON, else the word. Raises InvalidInput, all listed.

    >>> assignments(["beta=0.2", "retain_loss=kl", "max_steps=null", "lora_target_modules=q,v"])
    {'beta': 0.2, 'retain_loss': 'kl', 'max_steps': None, 'lora_target_modules': ['q', 'v']}
    """
    found: dict[str, Any] = {}
    problems = []
    for number, each in enumerate(assigned, 1):
        name, equals, value = each.partition("=")
        if not equals or not name or name in found:
            problems.append(Problem(f"--set {number}", "not KEY=VALUE, or a key again"))
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
    model: Model,
    method: str,
    values: Mapping[str, Any],
    forget: Path | None,
    retain: Path | None,
    consent: str,
) -> Wish:
    from sisa.data.reader import read_like
    from sisa.flows.patches.patching import Wish

    return Wish(
        _settings(model.config, method, values),
        tuple(read_like(model.config, forget)) if forget else (),
        tuple(read_like(model.config, retain)) if retain else None,
        consent,
    )


def _settings(config: RunConfig, method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    from approx.patches.patch_settings import Adapter, settings_of

    adapter = Adapter(config.lora_r, config.lora_alpha, config.lora_target_modules)
    return settings_of(
        *(method, values, adapter),
        seed=config.seed,
        sequence_len=config.sequence_len,
        overlength=config.overlength,
    )


@command("patches", "sisa approx patches -m model", group=approx)
@model_option
def patches(directory: Path) -> Result:
    """List all patches there ever were, and the texts that the vault holds for them."""
    from sisa.unlearn import patches

    with opened(directory) as model:
        return render.listed(*patches(model))


@command("show", "sisa approx show -m model 1", group=approx)
@model_option
@click.argument("version", type=click.IntRange(1))
def show(directory: Path, version: int) -> Result:
    """Show the report of a patch: what was done, measured, and what it is not."""
    from sisa.unlearn import patches

    with opened(directory) as model:
        found, _, over = patches(model)
    for each in found:
        if each.version == version:
            return render.shown(each, over)
    raise InvalidInput(
        "there is no such patch",
        expected=f"a version from 1 to {len(found)}" if found else "none was ever wanted",
        got=str(version),
        next_step="`sisa approx patches` lists them",
    )


@command("revert", "sisa approx revert -m model", group=approx)
@model_option
@click.option("--all", "everything", is_flag=True, help="All patches, not the newest alone.")
@retrain_option
@executor_option
def revert(
    directory: Path, everything: bool, retrain_shards: bool, executor: str | OpenExecutor
) -> Result:
    """Take back what is wanted or, if nothing is, the newest patch; the base is then as it was."""
    from sisa.unlearn import revert

    with opened(directory, executor) as model:
        return render.reverted(revert(model, everything=everything, retrain_shards=retrain_shards))


@command("release", "sisa approx release -m model --all", group=approx)
@model_option
@click.option("--set", "sets", multiple=True, help="A set's name, or a beginning of 8 letters.")
@click.option("--request", "requests", multiple=True, help="A request whose text is in the vault.")
@click.option("--all", "everything", is_flag=True, help="All texts.")
def release(
    directory: Path, sets: tuple[str, ...], requests: tuple[str, ...], everything: bool
) -> Result:
    """Erase texts from the vault, as when consent is withdrawn; patches that were made stay."""
    from sisa.unlearn import release

    if everything == bool(sets or requests):
        raise click.UsageError("give --set or --request, or --all")
    with opened(directory) as model:
        return render.released(release(model, sets=sets, request_ids=requests, everything=everything))
