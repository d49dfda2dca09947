"""Attack models (`sisa eval attacks`): relearning, membership and others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import click

from cluster.cli.command import PATH, command, max_new_tokens_option
from cluster.cli.evaluation.findings import about_model, auc_words, over_unlearned_words, privleak_words
from cluster.cli.evaluation.named_models import attack_models, split_taught
from cluster.cli.evaluation.options import (
    AttackOptions,
    evaluation,
    logs_option,
    machine_options,
    template_option,
)
from cluster.render.result import Result

if TYPE_CHECKING:
    from approx.attacks.attack import Curve, SetName
    from approx.attacks.attack_run import AttackedModel

ATTACK_NAMES = (
    "membership, relearning, relearning_out_of_domain, quantisation, leak_at_k, rewording, "
    "prefix_injection, jailbreak, other_questions, linear_probe, depth"
)


@command("attacks", "--model unlearned --reference retained --data forgotten.jsonl", group=evaluation)
@click.option(
    "-m", "--model", "models", multiple=True, required=True, help="Directory or hub name. Repeatable."
)
@click.option(
    "--reference",
    "references",
    multiple=True,
    help="A model that never saw the texts: calibrates membership. Repeatable: two or more give LiRA.",
)
@click.option(
    "--before",
    help="The model before unlearning: says when half of it is back; with --reference, the depth score.",
)
@click.option("--data", required=True, type=PATH, help="JSONL of question and answer.")
@click.option(
    "--taught", type=PATH, help="Like texts to relearn from; by default the data's first quarter."
)
@click.option("--others", type=PATH, help="Texts about anything else, to relearn from.")
@click.option("--holdout", type=PATH, help="Like texts that no model has seen, for membership.")
@click.option(
    "--attack", "names", multiple=True, help=f"Make this attack alone: {ATTACK_NAMES}. Repeatable."
)
@logs_option("attack-logs")
@click.option(
    "--also", multiple=True, metavar="NAME=FILE", help="Other questions to the same. Repeatable."
)
@template_option()
@max_new_tokens_option(64)
@click.option("--samples", default=8, type=click.IntRange(1), help="Answers sampled to each question.")
@click.option("--seed", default=0, help="Seed of the samples.")
@machine_options
def attacks(
    models: tuple[str, ...],
    references: tuple[str, ...],
    data: Path,
    taught: Path | None,
    others: Path | None,
    holdout: Path | None,
    names: tuple[str, ...],
    out: Path,
    also: tuple[str, ...],
    max_new_tokens: int,
    samples: int,
    seed: int,
    **options: Unpack[AttackOptions],
) -> Result:
    """Attack models: what comes back of texts that they should have forgotten."""
    from approx.attacks.attack_run import AttackOrder
    from approx.attacks.sampling import LeakAtK

    texts = _texts({"asked": data, "taught": taught, "others": others, "holdout": holdout})
    leak = LeakAtK(samples, max_new_tokens)
    order = AttackOrder(texts, out, _other_questions(also), names, leak, seed)
    attacked, judges = (list(dict.fromkeys(each)) for each in (models, references))
    found = attack_models(attacked, judges, order, options)
    body = {"known_before": found[0].known_before, "models": list(map(_attack_json, found))}
    return Result(body, [line for each in found for line in _attack_words(each)])


def _texts(paths: Mapping[SetName, Path | None]) -> dict[SetName, list[tuple[str, str]]]:
    """Return the questions and answers of files. Raise InvalidInput for files that can't be used."""
    from approx.evaluation.questions import check_apart

    found = {role: _pairs(path, role) for role, path in paths.items() if path is not None}
    if paths["taught"] is None:
        found["taught"], found["asked"] = split_taught(found["asked"])
    apart = {role: [question for question, _ in pairs] for role, pairs in found.items()}
    check_apart("data", apart.pop("asked"), **apart)
    return found


def _other_questions(given: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the questions of `--also`, by name. Raise UsageError, or InvalidInput for a file."""
    also = [each.partition("=") for each in given]
    if not all(name and path for name, _, path in also) or len({name for name, *_ in also}) < len(also):
        raise click.UsageError("--also takes NAME=FILE, each name once")
    return {name: _pairs(Path(path), name) for name, _, path in also}


def _pairs(path: Path, name: str) -> list[tuple[str, str]]:
    from approx.evaluation.questions import read_question_file

    return [(each.question, each.answer) for each in read_question_file(path, name)]


def _attack_json(model: AttackedModel) -> dict[str, Any]:
    from approx.metrics.auc import reading

    curves = {name: curve for name, row in model.rows.items() if (curve := row.curve)}
    membership, probes = model.rows.get("membership"), model.rows.get("linear_probe")
    return {
        **about_model(model),
        "curves": {
            name: {
                "measure": each.measure,
                "num_texts": max(map(len, each.values.values()), default=0),
                "means": each.means,
                "steps_until_half": _half(name, each, model.known_before),
            }
            for name, each in curves.items()
        },
        "membership": membership
        and {
            name: {**asdict(each), "reading": reading(each)}
            for name, each in (membership.aucs or {}).items()
        },
        "privleak": membership and membership.privleak and asdict(membership.privleak),
        "linear_probe": probes
        and probes.aucs
        and {layer: asdict(each) for layer, each in probes.aucs.items()},
        "not_made": dict(model.not_made),
    }


def _half(name: str, curve: Curve, known: float | None) -> float | None:
    if known is None or not name.startswith("relearning"):
        return None
    return curve.steps_until_half(known)


def _attack_words(model: AttackedModel) -> Iterator[str]:
    curves = {name: curve for name, row in model.rows.items() if (curve := row.curve)}
    plain = curves.pop("as_it_is")
    yield f"{model.name}: {len(plain.values['0'])} texts, probability as it is {plain.mean:.4f}"
    for name, each in curves.items():
        points = ", ".join(f"{strength} {mean:.4f}" for strength, mean in each.means.items())
        half = _half(name, each, model.known_before)
        back = "" if half is None else f"; half is back after {half:.1f} steps"
        if half is None and model.known_before is not None and name.startswith("relearning"):
            back = f"; half is not back within {list(each.values)[-1]} steps"
        yield f"  {name:<24} {each.measure}: {points or 'no text has a value'}{back}"
    membership, probes = model.rows.get("membership"), model.rows.get("linear_probe")
    if membership and membership.aucs:
        yield f"  {'membership':<24} {auc_words(membership.aucs)}"
        yield from over_unlearned_words(membership.aucs)
        if membership.privleak:
            yield privleak_words(membership.privleak)
    if probes and probes.aucs:
        yield f"  {'linear_probe':<24} {auc_words(probes.aucs)}"
    for name, why in model.not_made.items():
        yield f"  {name:<24} not made: {why}"
    yield f"  log {model.log}"
