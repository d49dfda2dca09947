"""Making a patch: from texts in the vault to an adapter in the patches' store. Approximate, always.

    read the sets -> the base with the patches beneath -> measure -> unlearn -> measure -> store

Rules: a patch is made from what its job names, and from nothing else: same job, same bytes on one
machine. Everything that is wrong with settings and texts is named before a wish is taken in. A run
rests sealed by the vault's keyring until the caller has what came of it: cut short, or out of time, it
goes on. A run that broke off leaves its last good weights; where that is the start, there is no patch,
and the report says so.

Not covered: what is done with a patch (`sisa/patching.py`); a task on Ray (`cluster/patch_tasks.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from approx import patch_measures
from approx.bounds import Bounds, End, Ending, StepLog
from approx.patch_settings import PatchSettings, parse_settings
from approx.patch_texts import (
    Limits,
    distinct,
    kept,
    limits_of,
    preferred,
    text_problems,
    tokenized,
)
from approx.report import ApproxReport
from approx.saved_run import SavedRun
from approx.sets import Sets
from approx.unlearning import unlearn
from approx.written import prompts_that_fit, write_retain_set
from sisa.arithmetic import Arithmetic
from sisa.config import RunConfig
from sisa.domain import Record
from sisa.errors import InvalidInput, Problem
from sisa.events import Notice, PatchProgress, Report
from sisa.model.adapter import (
    ADAPTER_FILE,
    CONFIG_FILE,
    adapter_tensors,
    attach,
    config_bytes,
    lora_config,
    tensor_bytes,
)
from sisa.model.base import load_frozen, load_skeleton, load_tokenizer, local_or_hub
from sisa.model.numerics import fingerprint, pin_threads
from sisa.model.patched import load_patched
from sisa.model.stage import seed_from
from sisa.model.tokens import Tokens
from sisa.opening import PATCHES
from sisa.patch import WRITTEN, PatchJob
from sisa.patch_ports import PatchMade, PatchOrder, PatchSite
from sisa.store import runs
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.vault import FileVault
from sisa.world import patch_files

PROGRESS_EVERY_S = 0.25


def open_patcher(site: PatchSite, config: RunConfig) -> PatchMaker:  # noqa: ARG001
    """Whoever makes patches in this process."""
    return PatchMaker(site)


class PatchMaker:
    """A `sisa.patch_ports.Patcher` in this process."""

    def __init__(self, site: PatchSite) -> None:
        self._site = site

    def refuse(
        self,
        settings: Mapping[str, Any],
        forget: Sequence[Record],
        retain: Sequence[Record] | None,
        reference: str = "",
    ) -> None:
        """As the Protocol. Reads the base's tokenizer and configuration, not its weights."""
        problems = _usual_alone(self._site.arithmetic)
        parsed = _gathered(problems, lambda: parse_settings(settings))
        tokenizer = load_tokenizer(self._site.base_dir)
        skeleton = load_skeleton(self._site.base_dir)
        length = parsed.sequence_len if parsed else self._site.sequence_len
        limits = limits_of(skeleton.config, length)
        if parsed:
            _gathered(problems, lambda: lora_config(_lora(parsed), skeleton))
        method = parsed.method if parsed else None
        problems += text_problems(forget, retain, method, tokenizer, limits)
        if retain is None:
            written = _gathered(problems, lambda: prompts_that_fit(tokenizer, limits.sequence_len))
            if written == []:
                problems.append(Problem("sequence_len", "leaves no room for the base's own answers"))
        if reference:
            _gathered(problems, lambda: _refuse_other_tokenizer(reference, tokenizer))
        if problems:
            raise InvalidInput(
                f"no patch can be made of this: {len(problems)} problems; nothing was changed",
                expected=f"texts of at most {limits.sequence_len} tokens, with an answer, in one set",
                next_step="mend the settings and the sets",
                problems=problems,
            )

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """As the Protocol. `max_seconds` bounds the steps; reading and measuring come on top."""
        site, job = self._site, order.job
        pin_threads(site.threads)
        if job.fingerprint != fingerprint(site.threads):
            report(Notice("the patch was wanted under other numerics: its bits may differ from theirs"))
        parsed = parse_settings(job.settings)
        made = _Making(site, order, parsed, report)
        end = made.run(self._saved(job))
        if end.ending == Ending.OUT_OF_TIME:
            return PatchMade(None, unfinished=True, report=made.report_of(end, measured=False))
        found = made.report_of(end, measured=True)
        if not _says_anything(end):
            return PatchMade(None, unfinished=False, report=found)
        store = FileCheckpoints(site.patches_at, site.patches_keyring, PATCHES)
        saved = store.save(job, made.files())
        return PatchMade(saved, unfinished=False, report=found)

    def _saved(self, job: PatchJob) -> SavedRun:
        keyring = self._site.vault_keyring
        return SavedRun(
            self._site.runs_dir / job.key,
            job.key,
            partial(keyring.seal, runs.ROOM, job.key),
            partial(keyring.unseal, runs.ROOM, job.key),
            kept=True,
        )


def _usual_alone(arithmetic: Arithmetic) -> list[Problem]:
    """A patch is laid on the weights themselves: in bfloat16 most of it would round away, and on another
    device it would not be of the base that it was made on."""
    found = arithmetic.in_jobs().items()
    return [
        Problem(key, f"is {value}: patches are for the CPU in float32 alone") for key, value in found
    ]


def _gathered(problems: list[Problem], check: Callable[[], Any]) -> Any:
    """What a check gives; None, and its problems, where it refuses."""
    try:
        return check()
    except InvalidInput as error:
        problems += error.as_problems("settings")
    return None


def _refuse_other_tokenizer(reference: str, tokenizer: Any) -> None:
    """Raises InvalidInput for a reference that is not there, or reads other tokens than the base."""
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


def _says_anything(end: End) -> bool:
    """Whether the weights differ from those of a fresh patch, which changes nothing."""
    return end.step > 0 and end.alpha != 0


@dataclass
class _Making:
    """One patch on its way: model, texts and measures of an order."""

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
        limits = limits_of(self._base.config, self.settings.sequence_len)
        texts = {each.name: vault.read(each) for each in self.order.sets}
        forget = distinct([record for name in job.forget for record in texts[name]])
        self.sets = Sets(
            forget_tokens := tokenized(forget, "forget", self._tokenizer, limits),
            self._retain(texts.get(job.retain), forget, limits),
            self._preferred(forget, forget_tokens, limits),
        )
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
        self, given: Sequence[Record] | None, forget: Sequence[Record], limits: Limits
    ) -> list[Tokens]:
        if given is None:
            self.report(Notice("the base writes the retain set: its own answers to neutral prompts"))
            return write_retain_set(self._base, self._tokenizer, limits.sequence_len)
        left = kept(distinct(given), forget)
        return tokenized(left, "retain", self._tokenizer, limits)

    def _preferred(
        self, forget: Sequence[Record], tokens: Sequence[Tokens], limits: Limits
    ) -> list[Tokens]:
        if "preferred" not in self.settings.method.reads:
            return []
        seed = self.settings.pace.seed
        return preferred(forget, tokens, self._tokenizer, seed, limits.sequence_len)

    def _measured(self) -> dict[str, float]:
        sets = self.sets
        return patch_measures.measured(self._model, self._tokenizer, sets.forget, sets.retain)

    def run(self, saved: SavedRun) -> End:
        settings, retain = self.settings, self.sets.retain
        bounds = Bounds(
            self.order.max_seconds,
            (lambda model: patch_measures.utility(model, retain)) if retain else None,
            settings.max_utility_drop if retain else None,
            settings.check_every,
        )
        steps = _Ticks(self.report)
        return unlearn(
            *(self._model, self.sets, settings.method, settings.pace, bounds),
            saved=saved,
            progress=steps,
        )

    def report_of(self, end: End, *, measured: bool) -> dict[str, Any]:
        """The ApproxReport as JSON, with what the sets were and whether a patch came of it."""
        settings, sets = self.settings, self.sets
        examples = [*sets.forget, *sets.retain]
        found = ApproxReport(
            method=settings.method,
            settings=settings.pace,
            target="patch",
            end=end,
            before=self._before,
            after=self._measured() if measured else {},
            full_tokens=settings.pace.num_epochs * sum(len(each.input_ids) for each in examples),
            more_limits=(
                *patch_measures.LIMITS,
                "share of a full fine-tuning: of all weights, on the same texts, for as many epochs",
            ),
        ).to_json()
        counts = {
            "num_forget": len(sets.forget),
            "num_retain": len(sets.retain),
            "retain": "written by the base" if self.order.job.retain == WRITTEN else "given",
        }
        if measured and self.order.reference:
            found["metrics_reference"] = self._of_reference()
        made = measured and _says_anything(end)
        return {**found, "sets": counts, "patch_made": made, "num_beneath": len(self.order.beneath)}

    def _of_reference(self) -> dict[str, float]:
        from transformers import AutoModelForCausalLM

        self.report(Notice("measuring the reference, which never saw the texts"))
        model = load_frozen(AutoModelForCausalLM, local_or_hub(self.order.reference))
        return patch_measures.measured(model, self._tokenizer, self.sets.forget, self.sets.retain)

    def files(self) -> dict[str, bytes]:
        """The patch as PEFT reads it."""
        return {
            ADAPTER_FILE: tensor_bytes(adapter_tensors(self._model)),
            CONFIG_FILE: config_bytes(self._model),
        }


class _Ticks:
    """Turns steps into events, at most one each PROGRESS_EVERY_S seconds."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last = 0.0

    def __call__(self, log: StepLog) -> None:
        now = time.monotonic()
        if now - self._last >= PROGRESS_EVERY_S or log.step == log.num_steps:
            self._last = now
            self._report(PatchProgress(log.step, log.num_steps, log.loss))
