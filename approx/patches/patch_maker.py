"""The making of a patch: from texts in the vault to an adapter in the patch store.

    read the sets -> load the base with the patches beneath -> measure -> unlearn -> measure -> store

A patch is always approximate. It depends only on what its job names: the same job gives the same bytes
on one machine. A run searches the strength that is needed (`descent.py`). If the best weights within the
bound on utility are the first ones, there is no patch. Utility is measured on answers of the base that
are not trained on. A run is saved, sealed by the vault's keyring, until the caller has its result, so an
interrupted run continues.

`sisa/flows/patches/patching.py` decides what happens with a patch; `cluster/ray/patch_tasks.py` makes
one in a task on Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from approx.evaluation.probe import answers_to_probe
from approx.methods.editing.edit_run import subject_ends
from approx.methods.method import Method
from approx.patches import patch_measures
from approx.patches.patch_report import ApproxReport
from approx.patches.patch_settings import PatchSettings, parse_settings
from approx.patches.selection import Selected, select
from approx.patches.texts import limits_of, text_problems, tokenize_records, without_forgotten
from approx.unlearning.causal_tracing import check_layer, choose_layer
from approx.unlearning.examples import Sets
from approx.unlearning.saved_run import SavedRun
from approx.unlearning.stopping import Bounds, End, Ending, Knowledge, StepLog
from approx.unlearning.unlearn import unlearn
from approx.unlearning.written.preferred import Writing, with_preferred
from approx.unlearning.written.retain_set import prompts_that_fit, write_answers, write_neighbours
from sisa.config.config import RunConfig
from sisa.core.domain import Record
from sisa.core.errors import InvalidInput, Problem
from sisa.core.events import Notice, PatchProgress, Report
from sisa.core.patches import WRITTEN
from sisa.core.ports import PatchMade, PatchOrder, PatchSite
from sisa.flows.context.context import patch_files
from sisa.lm.base import adapter
from sisa.lm.base.numerics import fingerprint, pin_threads, seed_from
from sisa.lm.base.tokens import Tokens
from sisa.lm.base.weights import (
    load_frozen,
    load_patched,
    load_skeleton,
    load_tokenizer,
    own_modules,
    stored_model,
)
from sisa.store.areas import PATCHES, RUNS
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.vault import FileVault

PROGRESS_EVERY_S = 0.25
JUDGED_EVERY = 4  # one of this many texts is not trained on
WRITING = {
    "alternates": "the base writes other answers to the questions to forget",
    "generic labels": "a copy learns the texts by heart, so that its words can be avoided",
}
WRITTEN_RETAIN, GIVEN_RETAIN = "written by the base", "written by the base, and given"
_T = TypeVar("_T")


def open_patcher(site: PatchSite, config: RunConfig) -> PatchMaker:  # noqa: ARG001
    """Return the maker of patches in this process."""
    return PatchMaker(site)


@dataclass
class PatchMaker:
    """A `sisa.core.ports.Patcher` in this process."""

    site: PatchSite

    def check(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        """Validate settings and texts. Reads the base's tokenizer and configuration, not its weights."""
        site = self.site
        # A patch is merged into the weights: in bfloat16 most of it would round away, and on another
        # device it would not belong to the base that it was made on.
        problems = [
            Problem(key, f"is {value}: patches are for the CPU in float32 alone")
            for key, value in site.precision.in_jobs().items()
        ]
        parsed = _gathered(problems, lambda: parse_settings(settings))
        tokenizer, skeleton = load_tokenizer(site.base.directory), load_skeleton(site.base.directory)
        length = parsed.sequence_len if parsed else site.sequence_len
        limits = limits_of(skeleton.config, length, parsed.overlength if parsed else "refuse")
        if parsed:
            _gathered(problems, lambda: adapter.lora_config(_lora(parsed), skeleton))
            _gathered(problems, lambda: _check_base(parsed.method, skeleton))
        method = parsed.method if parsed else None
        problems += text_problems(forget, retain, method, tokenizer, limits)
        prompts = _gathered(problems, lambda: prompts_that_fit(tokenizer, limits.sequence_len))
        if prompts == [] and retain is None:
            problems.append(Problem("sequence_len", "leaves no room for the base's own answers"))
        if reference:
            _gathered(problems, lambda: _check_reference(reference, tokenizer, skeleton))
        if problems:
            raise InvalidInput(
                "no patch can be made of this; nothing was changed",
                next_step="correct the settings and the sets",
                problems=problems,
            )

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """Make a patch. `max_seconds` bounds the steps; reading and measuring take additional time."""
        site, job = self.site, order.job
        pin_threads(site.threads)
        if job.fingerprint != fingerprint(site.threads):
            report(Notice("the patch was requested under other numerics: its bits may differ"))
        making = _Making(site, order, parse_settings(job.settings), report)
        making.prepare()
        end = making.run()
        if end.ending == Ending.OUT_OF_TIME:
            return PatchMade(None, unfinished=True, report=making.report_of(end, measured=False))
        saved = making.store.save(job, making.files()) if _changes_anything(end) else None
        return PatchMade(saved, unfinished=False, report=making.report_of(end, measured=True))


def _gathered(problems: list[Problem], check: Callable[[], Any]) -> Any:
    """Return the result of a check, or None with its problems added to the list."""
    try:
        return check()
    except InvalidInput as error:
        problems += error.as_problems("settings")
    return None


def _check_base(method: Method, skeleton: Any) -> None:
    """Raise InvalidInput for a base in which a method can't act."""
    check_layer(method, skeleton)
    if method.lacks_layer:  # whether the lowest one can be changed is known before it is measured
        method = replace(method, **{"layer": 0})
    method.adapter_values(skeleton, 1)


def _check_reference(reference: str, tokenizer: Any, skeleton: Any) -> None:
    """Raise InvalidInput for a reference that is missing, or has other tokens or modules than the base.

    The same adapter is trained on it, to show what a model that never knew the texts relearns.
    """
    directory = stored_model(reference)
    problems: list[Problem] = []
    if load_tokenizer(directory).get_vocab() != tokenizer.get_vocab():
        problems.append(Problem("reference", "has another tokenizer than the base"))
    wanted, held = (
        {name for name, _ in each.named_modules()} for each in (skeleton, load_skeleton(directory))
    )
    if lacking := wanted - held:
        what = f"has another architecture: it lacks {len(lacking)} of the base's {len(wanted)} modules"
        problems.append(Problem("reference", what))
    if problems:
        raise InvalidInput("the reference can't stand beside the base", problems=problems)


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


@dataclass(frozen=True)
class _Texts:
    """The records to forget, the sets without preferred answers, and what utility is measured on."""

    records: list[Record]
    sets: Sets
    judged: list[Tokens]  # not in the retain set
    num_given: int
    num_neighbours: int


@dataclass
class _Making:
    """The making of one patch: `prepare`, then `run`, then its report and files."""

    site: PatchSite
    order: PatchOrder
    settings: PatchSettings
    report: Report

    def prepare(self) -> None:
        """Read the texts, choose what the patch may change, attach a fresh one, and measure."""
        self.store = FileCheckpoints(self.site.patches_at, self.site.patches_keyring, PATCHES)
        beneath = patch_files(self.store, self.order.beneath)
        self._base, self._tokenizer = load_patched(self.site.base, beneath)
        self._limits = limits_of(self._base.config, self.settings.sequence_len, self.settings.overlength)
        self._texts = self._read_texts()
        method = choose_layer(self.settings.method, self._base, self._texts.sets)
        self.settings = replace(self.settings, method=method)
        self._selected, prescribed = self._select()
        lora = _lora(self.settings) | prescribed | {"lora_target_modules": self._selected.modules}
        attach = partial(
            adapter.attach,
            config=adapter.lora_config(lora, self._base),
            tensors=None,
            init_seed=seed_from(self.settings.pace.seed, "patch"),
        )
        if "preferred" in method.reads and method.prefers in WRITING:
            self.report(Notice(WRITING[method.prefers]))
        writing = Writing(
            self._base,
            self._tokenizer,
            self._texts.records,
            self._texts.sets,
            self.settings.pace,
            self._limits.sequence_len,
            lambda: attach(own_modules(self._base)),
        )
        self._sets, self._prepared = with_preferred(method, writing)
        self._asked = [
            answers_to_probe(record.kind, each, self._tokenizer, self._limits.sequence_len)
            for record, each in zip(self._texts.records, self._texts.sets.forget, strict=True)
        ]
        self._model = attach(self._base).eval()
        self.report(Notice("measuring what the base says of the texts (approximate)"))
        self._before = self._measured(self._model)

    def _read_texts(self) -> _Texts:
        """Read the order's sets from the vault, and let the base write its part of the retain set."""
        job, limits = self.order.job, self._limits
        vault = FileVault(self.site.vault_dir, self.site.vault_keyring)
        held = {each.name: vault.read(each) for each in self.order.sets}
        records = list(dict.fromkeys(record for name in job.forget for record in held[name]))
        forget = tokenize_records(records, "forget", self._tokenizer, limits)
        at_subjects = self.settings.method.at_subjects
        self.report(
            Notice(
                "the base writes the retain set: its own answers to neutral prompts, and to the same "
                "questions about invented people"
            )
        )
        prompts = prompts_that_fit(self._tokenizer, limits.sequence_len)
        neutral = write_answers(self._base, self._tokenizer, prompts, limits.sequence_len)
        neighbours = write_neighbours(self._base, self._tokenizer, records, limits.sequence_len)
        left = without_forgotten(list(dict.fromkeys(held.get(job.retain, ()))), records)
        given = tokenize_records(left, "retain", self._tokenizer, limits)
        trained, judged = split_judged(neutral)
        more_trained, more_judged = split_judged(neighbours)
        return _Texts(
            records,
            Sets(
                forget,
                given + trained + more_trained,
                subjects=subject_ends(records, forget, self._tokenizer) if at_subjects else (),
            ),
            judged=(judged + more_judged) or given,
            num_given=len(given),
            num_neighbours=len(neighbours),
        )

    def _select(self) -> tuple[Selected, dict[str, Any]]:
        """Return what the patch may change, and the adapter's values that the method prescribes."""
        method, chosen, sets = self.settings.method, self.settings.selection, self._texts.sets
        if prescribed := method.adapter_values(self._base, len(sets.forget)):
            return Selected(prescribed["lora_target_modules"]), prescribed
        if chosen.selection != "all":
            self.report(Notice(f"selecting the modules to change: {chosen.selection}"))
        wanted = self.settings.adapter.lora_target_modules
        return select(self._base, wanted, sets.forget, sets.retain, chosen), {}

    def _measured(self, model: Any) -> dict[str, float]:
        return patch_measures.measure_patch(
            model, self._tokenizer, self._texts.sets.forget, self._texts.judged
        )

    def _known(self, model: Any, thorough: bool) -> Knowledge:
        return patch_measures.measure_knowledge(model, self._tokenizer, self._asked, thorough=thorough)

    def run(self) -> End:
        """Unlearn, from the saved run on if there is one."""
        site, job, settings = self.site, self.order.job, self.settings
        bounds = Bounds(
            **asdict(settings.bounds),
            max_seconds=self.order.max_seconds,
            utility=partial(patch_measures.measure_utility, retain=self._texts.judged),
            knowledge=self._known,
        )
        saved = SavedRun(
            site.runs_dir / job.key,
            job.key,
            partial(site.vault_keyring.seal, RUNS, job.key),
            partial(site.vault_keyring.unseal, RUNS, job.key),
        )
        parts = (self._model, self._sets, settings.method, settings.pace, bounds)
        with self._selected.confined(self._model):
            end = unlearn(*parts, saved=saved, progress=_Ticks(self.report))
        return replace(end, compute=end.compute.with_cost_of(self._prepared)) if self._prepared else end

    def report_of(self, end: End, *, measured: bool) -> dict[str, Any]:
        """Return the ApproxReport as JSON; a run that is suspended is not measured yet."""
        made, texts, most = measured and _changes_anything(end), self._texts, patch_measures.MAX_MEASURED
        reference = self._reference() if measured else None
        return ApproxReport(
            settings=self.settings,
            selected=self._selected,
            end=end,
            sets={
                "num_forget": len(texts.sets.forget),
                "num_forget_measured": min(len(texts.sets.forget), most),
                "num_retain": len(texts.sets.retain),
                "num_given": texts.num_given,
                "num_neighbours": texts.num_neighbours,
                "num_judged": len(texts.judged),
                "num_judged_measured": min(len(texts.judged), most),
                "retain": WRITTEN_RETAIN if self.order.job.retain == WRITTEN else GIVEN_RETAIN,
            },
            num_beneath=len(self.order.beneath),
            patch_made=made,
            before=self._before,
            after=self._measured(self._model) if measured else {},
            known=self._known(self._model, thorough=True) if measured else None,
            reference=None if reference is None else self._measured(reference),
            robustness=self._robustness(reference) if made else None,
        ).to_json()

    def _reference(self) -> Any:
        from transformers import AutoModelForCausalLM

        if not self.order.reference:
            return None
        self.report(Notice("measuring the reference, which never saw the texts"))
        return load_frozen(AutoModelForCausalLM, stored_model(self.order.reference))

    def _robustness(self, reference: Any) -> dict[str, Any]:
        self.report(Notice("measuring how robust the patch is: relearning, rounding, other wordings"))
        return patch_measures.measure_robustness(
            self._model, self._tokenizer, self._texts.records, self._limits.sequence_len, reference
        )

    def files(self) -> dict[str, bytes]:
        """Return the patch as PEFT reads it."""
        return adapter.adapter_files(self._model)


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
