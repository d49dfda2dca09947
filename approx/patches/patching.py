"""Make a patch: from texts in the vault to an adapter in the patch store. A patch is always
approximate.

    read the sets -> load the base with the patches beneath -> measure -> unlearn -> measure -> store

A patch depends only on what its job names: the same job gives the same bytes on one machine. Settings
and texts are validated, with every problem reported, before a request for a patch is accepted. A run
searches the strength that is needed (`descent.py`). It ends when the probe no longer knows the texts,
or when the bound on utility stops it, and leaves the best weights within the bound. If these are the
first weights, there is no patch. The report gives the outcome and how many texts are still known.

Utility is measured on answers of the base that are not trained on. A run is saved, sealed by the
vault's keyring, until the caller has its result, so an interrupted run continues.

`sisa/flows/patches/patching.py` decides what happens with a patch; `cluster/ray/patch_tasks.py` makes
one in a task on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from approx.evaluation.probe import answers_to_probe
from approx.patches import patch_measures
from approx.patches.patch_settings import PatchSettings, parse_settings
from approx.patches.robustness import measure_robustness
from approx.unlearning.examples import (
    Limits,
    Sets,
    limits_of,
    make_preferred,
    text_problems,
    tokenize_records,
    without_forgotten,
)
from approx.unlearning.generated_retain import prompts_that_fit, write_answers, write_neighbours
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge, StepLog
from approx.unlearning.unlearn import ApproxReport, outcome, unlearn
from sisa.config.config import RunConfig
from sisa.core.domain import WRITTEN, PatchJob, Precision, Record
from sisa.core.errors import InvalidInput, Problem
from sisa.core.events import Notice, PatchProgress, Report
from sisa.core.ports import PatchMade, PatchOrder, PatchSite
from sisa.flows.wiring.context import patch_files
from sisa.flows.wiring.wiring import PATCHES
from sisa.lm.base.adapter import adapter_files, attach, lora_config
from sisa.lm.base.numerics import fingerprint, pin_threads
from sisa.lm.base.tokens import Tokens
from sisa.lm.base.weights import load_frozen, load_patched, load_skeleton, load_tokenizer, local_or_hub
from sisa.lm.train.lora import seed_from
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.records import DRAFTS_AREA, FileVault

PROGRESS_EVERY_S = 0.25
JUDGED_EVERY = 4  # one of this many texts is not trained on
_T = TypeVar("_T")


def open_patcher(site: PatchSite, config: RunConfig) -> PatchMaker:  # noqa: ARG001
    """Return the maker of patches in this process."""
    return PatchMaker(site)


class PatchMaker:
    """A `sisa.core.ports.Patcher` in this process."""

    def __init__(self, site: PatchSite) -> None:
        self._site = site

    def check(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        """Validate settings and texts. Reads the base's tokenizer and configuration, not its weights."""
        problems = _precision_problems(self._site.precision)
        parsed = _gathered(problems, lambda: parse_settings(settings))
        tokenizer = load_tokenizer(self._site.base_dir)
        skeleton = load_skeleton(self._site.base_dir)
        length = parsed.sequence_len if parsed else self._site.sequence_len
        limits = limits_of(skeleton.config, length, parsed.overlength if parsed else "refuse")
        if parsed:
            _gathered(problems, lambda: lora_config(_lora(parsed), skeleton))
        method = parsed.method if parsed else None
        problems += text_problems(forget, retain, method, tokenizer, limits)
        if retain is None:
            written = _gathered(problems, lambda: prompts_that_fit(tokenizer, limits.sequence_len))
            if written == []:
                problems.append(Problem("sequence_len", "leaves no room for the base's own answers"))
        if reference:
            _gathered(problems, lambda: _check_tokenizer(reference, tokenizer))
        if problems:
            raise InvalidInput(
                f"no patch can be made of this: {len(problems)} problems; nothing was changed",
                expected=f"texts of at most {limits.sequence_len} tokens, with an answer, in one set",
                next_step="correct the settings and the sets",
                problems=problems,
            )

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """Make a patch. `max_seconds` bounds the steps; reading and measuring take additional time."""
        site, job = self._site, order.job
        pin_threads(site.threads)
        if job.fingerprint != fingerprint(site.threads):
            report(Notice("the patch was requested under other numerics: its bits may differ"))
        parsed = parse_settings(job.settings)
        made = _Making(site, order, parsed, report)
        end = made.run(self._saved(job))
        if end.ending == Ending.OUT_OF_TIME:
            return PatchMade(None, unfinished=True, report=made.report_of(end, measured=False))
        saved = None
        if _changes_anything(end):
            store = FileCheckpoints(site.patches_at, site.patches_keyring, PATCHES)
            saved = store.save(job, made.files())
        return PatchMade(saved, unfinished=False, report=made.report_of(end, measured=True))

    def _saved(self, job: PatchJob) -> SavedRun:
        keyring = self._site.vault_keyring
        return SavedRun(
            self._site.runs_dir / job.key,
            job.key,
            partial(keyring.seal, DRAFTS_AREA, job.key),
            partial(keyring.unseal, DRAFTS_AREA, job.key),
        )


def _precision_problems(precision: Precision) -> list[Problem]:
    """Return a problem for each part of the precision that is not the default.

    A patch is merged into the weights themselves: in bfloat16 most of it would round away, and on
    another device it would not belong to the base that it was made on.
    """
    found = precision.in_jobs().items()
    return [
        Problem(key, f"is {value}: patches are for the CPU in float32 alone") for key, value in found
    ]


def _gathered(problems: list[Problem], check: Callable[[], Any]) -> Any:
    """Return the result of a check, or None with its problems added to the list."""
    try:
        return check()
    except InvalidInput as error:
        problems += error.as_problems("settings")
    return None


def _check_tokenizer(reference: str, tokenizer: Any) -> None:
    """Raise InvalidInput for a reference that is missing or has another tokenizer than the base."""
    found = load_tokenizer(local_or_hub(reference))
    if found.get_vocab() != tokenizer.get_vocab():
        raise InvalidInput(
            "the reference has another tokenizer than the base",
            where="reference",
            expected=f"the base's {len(tokenizer.get_vocab())} tokens",
            got=f"{len(found.get_vocab())} tokens, or others",
        )


def _lora(settings: PatchSettings) -> dict[str, Any]:
    return {**asdict(settings.adapter), "lora_dropout": 0.0}


def split_judged(texts: Sequence[_T]) -> tuple[list[_T], list[_T]]:
    """Return the texts to train on, and the texts to measure utility on.

    >>> split_judged("abcdefgh")
    (['a', 'b', 'c', 'e', 'f', 'g'], ['d', 'h'])
    """
    judged = list(texts[JUDGED_EVERY - 1 :: JUDGED_EVERY])
    return [each for at, each in enumerate(texts, 1) if at % JUDGED_EVERY], judged


def _changes_anything(end: End) -> bool:
    """Return whether the weights differ from those of a fresh patch, which changes nothing."""
    return end.step > 0 and end.alpha != 0


@dataclass
class _Making:
    """The making of one patch: model, texts and measures of an order."""

    site: PatchSite
    order: PatchOrder
    settings: PatchSettings
    report: Report

    def __post_init__(self) -> None:
        site, job = self.site, self.order.job
        vault = FileVault(site.vault_dir, site.vault_keyring)
        store = FileCheckpoints(site.patches_at, site.patches_keyring, PATCHES)
        beneath = patch_files(store, self.order.beneath)
        self._base, self._tokenizer = load_patched(site.base_dir, site.base_digest, beneath)
        limits = limits_of(self._base.config, self.settings.sequence_len, self.settings.overlength)
        texts = {each.name: vault.read(each) for each in self.order.sets}
        self.forget = list(dict.fromkeys(record for name in job.forget for record in texts[name]))
        tokens = tokenize_records(self.forget, "forget", self._tokenizer, limits)
        retain, self.judged = self._retain(texts.get(job.retain), limits)
        self.sets = Sets(tokens, retain, self._preferred(tokens, limits))
        self._asked = [
            answers_to_probe(record.kind, each, self._tokenizer, limits.sequence_len)
            for record, each in zip(self.forget, tokens, strict=True)
        ]
        self._model = attach(
            self._base,
            lora_config(_lora(self.settings), self._base),
            None,
            init_seed=seed_from(self.settings.pace.seed, "patch"),
        )
        self._model.eval()
        self.report(Notice("measuring what the base says of the texts (approximate)"))
        self._before = self._measured()

    def _retain(
        self, given: Sequence[Record] | None, limits: Limits
    ) -> tuple[list[Tokens], list[Tokens]]:
        """Return the retain set, and the texts that utility is measured on, which are not trained on."""
        self.report(
            Notice(
                "the base writes the retain set: its own answers to neutral prompts, and to the same "
                "questions about invented people"
            )
        )
        neutral = self._written(prompts_that_fit(self._tokenizer, limits.sequence_len), limits)
        neighbours = write_neighbours(self._base, self._tokenizer, self.forget, limits.sequence_len)
        left = without_forgotten(list(dict.fromkeys(given or ())), self.forget)
        tokens = tokenize_records(left, "retain", self._tokenizer, limits)
        self.num_given, self.num_neighbours = len(tokens), len(neighbours)
        trained, judged = split_judged(neutral)
        more_trained, more_judged = split_judged(neighbours)
        return tokens + trained + more_trained, (judged + more_judged) or tokens

    def _written(self, prompts: Sequence[Sequence[int]], limits: Limits) -> list[Tokens]:
        return write_answers(self._base, self._tokenizer, prompts, limits.sequence_len)

    def _preferred(self, tokens: Sequence[Tokens], limits: Limits) -> list[Tokens]:
        if "preferred" not in self.settings.method.reads:
            return []
        seed = self.settings.pace.seed
        return make_preferred(self.forget, tokens, self._tokenizer, seed, limits.sequence_len)

    def _measured(self) -> dict[str, float]:
        return patch_measures.measure_patch(self._model, self._tokenizer, self.sets.forget, self.judged)

    def _known(self, model: Any, thorough: bool) -> Knowledge:
        return patch_measures.measure_knowledge(model, self._tokenizer, self._asked, thorough=thorough)

    def run(self, saved: SavedRun) -> End:
        settings = self.settings
        bounds = Bounds(
            **asdict(settings.bounds),
            max_seconds=self.order.max_seconds,
            utility=partial(patch_measures.measure_utility, retain=self.judged),
            knowledge=self._known,
        )
        steps = _Ticks(self.report)
        return unlearn(
            *(self._model, self.sets, settings.method, settings.pace, bounds),
            saved=saved,
            progress=steps,
        )

    def report_of(self, end: End, *, measured: bool) -> dict[str, Any]:
        """Return the ApproxReport as JSON, with the sets and whether a patch was made."""
        settings, made = self.settings, measured and _changes_anything(end)
        found = ApproxReport(
            method=settings.method,
            settings=settings.pace,
            end=end,
            before=self._before,
            after=self._measured() if measured else {},
            more_limits=patch_measures.MEASURE_LIMITS,
        ).to_json()
        more: dict[str, Any] = {
            "bounds": asdict(settings.bounds),
            "sets": self._counts(),
            "patch_made": made,
            "num_beneath": len(self.order.beneath),
        }
        if measured:
            more |= outcome(end, self._known(self._model, thorough=True))
            reference = self._reference()
            if reference is not None:
                sets = self.sets.forget, self.judged
                more["metrics_reference"] = patch_measures.measure_patch(
                    reference, self._tokenizer, *sets
                )
            more["robustness"] = self._robustness(reference) if made else None
        return {**found, **more}

    def _counts(self) -> dict[str, Any]:
        forget, judged = len(self.sets.forget), len(self.judged)
        return {
            "num_forget": forget,
            "num_forget_measured": min(forget, patch_measures.MAX_MEASURED),
            "num_retain": len(self.sets.retain),
            "num_given": self.num_given,
            "num_neighbours": self.num_neighbours,
            "num_judged": judged,
            "num_judged_measured": min(judged, patch_measures.MAX_MEASURED),
            "retain": "written by the base" + ", and given" * (self.order.job.retain != WRITTEN),
        }

    def _reference(self) -> Any:
        from transformers import AutoModelForCausalLM

        if not self.order.reference:
            return None
        self.report(Notice("measuring the reference, which never saw the texts"))
        return load_frozen(AutoModelForCausalLM, local_or_hub(self.order.reference))

    def _robustness(self, reference: Any) -> dict[str, Any]:
        self.report(Notice("measuring how robust the patch is: relearning, rounding, other wordings"))
        length = self.settings.sequence_len
        model, tokenizer = self._model, self._tokenizer
        return measure_robustness(model, tokenizer, self.forget, self.sets.forget, length, reference)

    def files(self) -> dict[str, bytes]:
        """Return the patch as PEFT reads it."""
        return adapter_files(self._model)


class _Ticks:
    """A filter that turns steps into events, at most one every PROGRESS_EVERY_S seconds."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = 0.0

    def __call__(self, log: StepLog) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_EVERY_S or log.step == log.num_steps:
            self._last = now
            self._report(PatchProgress(log.step, log.num_steps, log.loss))
