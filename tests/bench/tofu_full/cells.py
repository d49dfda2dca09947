"""Compute the cells of TOFU in full: make a model, ask it, attack it; each result is a file of its own.

    tried       six trials of a layout or of the ordinary LoRA, on a tenth of the records
    made        the model: trained, deleted from, unlearned; seconds, cost, digests
    asked       TOFU's questions, in a log (`approx.evaluation`)
    attacked    relearning, rounding and sampling, for some authors of the forget set

`DIR/cells/NAME.json` holds numbers only, is whole or absent, and is not computed again; what it needs is
computed first. Models, logs and records lie under DIR, too, and hold text. A training that was cut short
goes on at its last checkpoint, and an evaluation at its last batch. Several processes may share DIR. All
cells travel in one file (`packed`, `take_over`); a model that is then missing is made again once a cell
needs it.

    cells = Cells(Path("out"), design, data, base, device="cpu")
    cells.once("50x4-key0-forget10.made")
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from approx.attacks.attack import AttackSets
from approx.attacks.quantisation import Quantisation
from approx.attacks.relearning import Relearning, RelearningOutOfDomain
from approx.attacks.sampling import LeakAtK
from approx.evaluation.asking import Asking, EvaluatedModel, evaluate
from approx.evaluation.evaluated_models import (
    DeletionReadyModel,
    HuggingFaceModel,
    records_of,
    tokens_of,
)
from approx.evaluation.questions import PromptForm, Question
from approx.methods.editing.editing import Edit
from approx.methods.method import Method
from approx.methods.registry import METHODS, make_method
from approx.methods.task_arithmetic import TaskArithmetic
from approx.metrics.model_utility import harmonic_mean
from approx.metrics.probability import probability, probability_among
from approx.metrics.rouge import rougeL_recall
from approx.unlearning.causal_tracing import choose_layer
from approx.unlearning.compute import Compute
from approx.unlearning.editing import edit_adapter, subject_ends
from approx.unlearning.examples import Sets
from approx.unlearning.private_training import PrivacySettings, train_privately
from approx.unlearning.unlearn import unlearn
from approx.unlearning.written.preferred import with_preferred
from sisa.config.config import RunConfig
from sisa.core.digest import canonical_json, digest_of, file_sha256
from sisa.core.domain import Record
from sisa.core.errors import ConfigConflict
from sisa.lm.base.adapter import adapter_files, attach, lora_config, read_config
from sisa.lm.base.low_rank import ADAPTER_FILE, CONFIG_FILE, read_tensors
from sisa.lm.base.tokens import Tokens, end_tokens
from sisa.lm.base.weights import BaseFiles, load_frozen, load_tokenizer, own_modules
from sisa.model import Model, open_model
from sisa.store.blobs.files import read_whole, write_atomic, writer_lock
from sisa.train import train_model
from tests.bench.deletion.retrained import secret_of
from tests.bench.tofu_full.budgets import AT_THE_END, uncut, within
from tests.bench.tofu_full.design import (
    QUESTIONS_EACH,
    TUNED_EACH,
    Contestant,
    Data,
    Design,
    Layout,
    contestants,
    lora,
    loras_in_full,
    meaning,
    record_id,
    scratch_of,
    trained_of,
    write_records,
)
from tests.bench.tofu_full.split_model import Halves, SplitModel, load_split, split

FORM, CHAT = PromptForm("completion", "{question} {answer}"), PromptForm("chat")  # of the base alone
Json = dict[str, Any]
ORDINARY = "lora"
BATCH = 64  # decoding reads all weights for each step of a batch
SEQUENCE_LEN = 512  # no record is longer
# Where a method's default needs a measured bound, or more than the budget.
GIVEN: dict[str, Json] = {"task_arithmetic": {"alpha": 2.0}, "altpo": {"num_alternates": 1}}
BITS = (8, 4)
PRIVATE: Json = {"noise_multiplier": 0.7, "max_grad_norm": 1.0, "delta": 1e-5, "batch_size": 16,
                 "learning_rate": 1e-3}  # fmt: skip
Files = Mapping[str, bytes]


class Cells:
    """The cells of one design, base and data set in a directory."""

    def __init__(
        self,
        directory: Path,
        design: Design,
        data: Data,
        base: BaseFiles,
        *,
        spec: str,
        embedder: str,
        device: str = "cpu",
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open a directory. Raise ConfigConflict for one of another design, base or data."""
        self.directory, self.design, self.data = directory, design, data
        self._base, self._spec, self._embedder = base, spec, embedder
        self._device, self._report = device, report
        self._tokenizer = load_tokenizer(base.directory)
        self.by_name = {each.name: each for each in contestants(design)}
        deleted = [each for each in self.by_name.values() if each.layout and each.without]
        self.by_name |= {each.name: each for each in map(scratch_of, deleted)}
        self.inputs = {
            "base": base.digest, "data": data.digest, "embedder": embedder, "device": device
        }  # fmt: skip
        self._check_same({"inputs": self.inputs, "design": meaning(design)})

    def _check_same(self, wanted: Json) -> None:
        path = self.directory / "design.json"
        if not path.exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            write_atomic(path, canonical_json(wanted))
        else:
            self._check_equal(json.loads(path.read_bytes()), wanted, str(path))

    @staticmethod
    def _check_equal(held: Json, wanted: Json, where: str) -> None:
        if held != json.loads(canonical_json(wanted)):
            raise ConfigConflict(
                "these are cells of another design, base, data or device",
                where=where,
                next_step="give the same options, or another directory and file of results",
            )

    def packed(self) -> bytes:
        """Return all finished cells as one compressed file."""
        named = {path.stem: path for path in (self.directory / "cells").glob("*.json")}
        held = {name: json.loads(path.read_bytes()) for name, path in named.items()}
        whole = {"inputs": self.inputs, "design": meaning(self.design), "cells": held}
        return gzip.compress(canonical_json(whole), mtime=0)

    def take_over(self, packed: bytes, where: str) -> None:
        """Keep the cells that this directory lacks. Raise ConfigConflict as opening does."""
        held = json.loads(gzip.decompress(packed))
        cells = held.pop("cells")
        self._check_equal(held, {"inputs": self.inputs, "design": meaning(self.design)}, where)
        for name in cells:
            if self.known(name) is None:
                self._keep(name, cells[name])

    def _keep(self, name: str, found: Json) -> None:
        path = self.directory / "cells" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, canonical_json(found) + b"\n")

    def known(self, name: str) -> Json | None:
        """Return the result of a cell, or None before it was computed."""
        path = self.directory / "cells" / f"{name}.json"
        found: Json = json.loads(read_whole(path, "cell")) if path.is_file() else {}
        return found or None

    def once(self, name: str) -> Json:
        """Return the result of a cell, computed now or read.

        Raise Busy while another process computes it, or something that it needs.
        """
        if (found := self.known(name)) is not None:
            return found
        with self._alone(name):
            return self.known(name) or self._computed(name)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep other processes out of a cell, or out of a model's files."""
        folder = self.directory / "locks"
        folder.mkdir(exist_ok=True)
        with writer_lock(folder / name):
            yield

    def _computed(self, name: str) -> Json:
        of, _, step = name.rpartition(".")
        began, at_work = time.perf_counter(), time.process_time()
        made = self._tried(of) if step == "tried" else self._step(self.by_name[of], step)
        took = {
            "total_seconds": time.perf_counter() - began,
            "total_core_seconds": time.process_time() - at_work,
        }
        self._keep(name, {**made, **took})
        self._report(
            f"{name}: {took['total_seconds']:.0f} s, {took['total_core_seconds']:.0f} of a core"
        )
        return {**made, **took}

    def _step(self, contestant: Contestant, step: str) -> Json:
        if step == "made":
            return self._made(contestant)
        self._have(contestant)
        return self._asked(contestant) if step == "asked" else self._attacked(contestant)

    # Models

    def _have(self, contestant: Contestant) -> Json:
        """Return how a model was made, and have its files: its cell may come from elsewhere."""
        found = self.once(f"{contestant.name}.made")
        if not self._at_hand(contestant).exists():
            with self._alone(f"{contestant.name}.made"):
                self._made(contestant)
        return found

    def _at_hand(self, contestant: Contestant) -> Path:
        """Return the path of a file that shows that a model was made in this directory."""
        return self.directory / "models" / f"{contestant.name}.made"

    def _made(self, contestant: Contestant) -> Json:
        made = self._newly_made(contestant)
        self._at_hand(contestant).parent.mkdir(parents=True, exist_ok=True)
        self._at_hand(contestant).touch()
        return made

    def _newly_made(self, contestant: Contestant) -> Json:
        if contestant.kind == "base":
            return {"share_of_training": 0.0}
        if contestant.kind == "method":
            return self._unlearned(contestant)
        if contestant.kind == "private":
            return self._privately_trained(contestant)
        if contestant.kind == "ours" and contestant.without and not contestant.scratch:
            return self._deleted(contestant)
        if contestant.name == ORDINARY:
            return self._best_in_full(contestant)
        best = self._best(contestant)
        numbers = range(self.data.kept(contestant.without))
        config = self._run_file(contestant.name, contestant, numbers, *best)
        made = {**_trained(config), "learning_rate": best[0], "batch": best[1]}
        if contestant.scratch:
            made |= self._equal(contestant, made)
        if contestant.kind == "lora":
            self._keep_adapter(contestant)
        if contestant.rate:
            made |= self._tuned(self._opened(contestant), len(self.data.full) // QUESTIONS_EACH)
        return made

    def _best_in_full(self, contestant: Contestant) -> Json:
        """Take over the best of the ordinary LoRAs that were trained on all records, one a rate.

        A rate may make answers likely and yet ruin those that the model writes, so the ROUGE-L recall of
        written answers counts as much as their probability.
        """
        made, chosen = {}, self.known(f"{ORDINARY}.made")
        for each in loras_in_full(self.design):
            if chosen and chosen["learning_rate"] != each.rate:
                continue
            found = self._have(each)
            likely: Json = {name: found[name] for name in ("retain", "facts") if name in found}
            means = {**likely, **self._written(each)}
            made[each] = {**found, **means, "score": harmonic_mean([*means.values()])}
        best = max(made, key=lambda each: made[each]["score"])
        for name, data in self._files(best).items():
            write_atomic(self._adapter(contestant) / name, data)
        return {**made[best], "trials": [*made.values()]}

    def _written(self, contestant: Contestant) -> Json:
        """Return the mean ROUGE-L recall of the answers that a model writes to the tuned questions."""
        questions = self.data.tuned
        with self.served(contestant) as model:
            answers = model.generate(
                [each.question for each in questions], FORM, self.design.max_new_tokens, BATCH
            )
        found: dict[str, list[float]] = {}
        for each, text in zip(questions, answers, strict=True):
            name = "written_retain" if each.set == "retain" else "written_facts"
            found.setdefault(name, []).append(rougeL_recall(each.answer, text))
        return {name: fmean(values) for name, values in found.items()}

    def _best(self, contestant: Contestant) -> tuple[float, int]:
        """Return the rate and the batch of the best trial.

        The more steps, the smaller the best rate. A shard takes as many steps in a trial as in full, and
        an ordinary LoRA ten times as many in full: its trials choose the batch, and the rate is tried in
        full.
        """
        if contestant.layout:
            best = self.once(f"{contestant.layout.name}.tried")
        else:
            best = self.once(f"{ORDINARY}.made" if contestant.without else f"{ORDINARY}.tried")
        return contestant.rate or best["learning_rate"], best["batch"]

    def _run_file(
        self, name: str, of: Contestant, numbers: Sequence[int], rate: float, batch: int, shards: int = 0
    ) -> RunConfig:
        """Return a run file and write its records; `shards` replaces the layout's number of them."""
        at = (self.directory / "models" / name).absolute()
        rows = write_records(self.data, numbers, at / "records.jsonl")
        (at / "partition.key").write_text(secret_of(of.key).hex(), encoding="utf-8")
        layout, design = of.layout or Layout(1, 1, 1), self.design
        micro = min(8, batch)
        return RunConfig.model_validate(
            {
                "base_model": self._spec,
                "datasets": ({"path": str(rows)},),
                "output_dir": at / "model",
                "witness": at / "witness",
                "keyring": at / "keys",
                "probe": False,
                "lora_layers": design.lora_layers,
                "lora_r": design.lora_r,
                "lora_alpha": design.lora_alpha,
                "prefix_cache_bytes": 2**31 if self._device == "cpu" else 0,
                "micro_batch_size": micro,
                "gradient_accumulation_steps": batch // micro,
                "num_epochs": design.epochs,
                "learning_rate": rate,
                "seed": of.seed or design.seeds[0],
                "device": self._device,
                "sisa": {
                    "shards": shards or layout.shards,
                    "slices": layout.slices,
                    "embedder": self._embedder if of.layout else "hashing",
                    "partition_key_file": at / "partition.key",
                    "aggregation": "routed" if of.layout else "mean_prob",
                },
            }
        )

    def _tried(self, name: str) -> Json:
        """Try rates and batches on the first authors; the layout has as many records a shard as in full.

        Trials are scored by the harmonic mean of two means over questions that are not reported: the
        probability of answers of the retain set, and that of facts among their wrong answers.
        """
        layout = next((each for each in self.design.layouts if each.name == name), None)
        of = Contestant(f"{name}.tried", "ours" if layout else "lora", layout=layout)
        authors = self.design.tried_authors
        shards = max(1, layout.shards * authors * QUESTIONS_EACH // len(self.data.full)) if layout else 1
        trials = []
        for batch in (layout.batch,) if layout else self.design.batches:
            for rate in self.design.rates:
                at = f"{name}.tried/{rate:g}-{batch}"
                numbers = range(authors * QUESTIONS_EACH)
                config = self._run_file(at, of, numbers, rate, batch, shards)
                seconds = _trained(config)["core_seconds"]
                score = self._tuned(open_model(config.output_dir, executor="serial"), authors)
                trials.append({"learning_rate": rate, "batch": batch, "core_seconds": seconds, **score})
        best = max(trials, key=lambda each: each["score"])
        shutil.rmtree(self.directory / "models" / f"{name}.tried")
        return {"learning_rate": best["learning_rate"], "batch": best["batch"], "trials": trials}

    def _tuned(self, model: Model, authors: int) -> Json:
        """Score a model of the first authors."""
        of = authors * QUESTIONS_EACH
        questions = [q for q in self.data.tuned if q.set != "retain" or q.idx < of]
        wrong = {q.place: q.perturbed if q.set != "retain" else () for q in questions}
        pairs = [(q.question, text) for q in questions for text in (q.answer, *wrong[q.place])]
        losses = iter([s.loss for s in DeletionReadyModel(model).score(pairs, FORM, BATCH)])
        found: dict[str, list[float]] = {"retain": [], "facts": []}
        for each in questions:
            own, others = next(losses), [next(losses) for _ in wrong[each.place]]
            if each.set == "retain":
                found["retain"].append(probability(own))
            else:
                found["facts"].append(probability_among(own, others))
        means = {name: fmean(values) for name, values in found.items() if values}
        num = {f"num_{name}": len(values) for name, values in found.items()}
        return {**means, **num, "score": harmonic_mean(list(means.values()))}

    def _deleted(self, contestant: Contestant) -> Json:
        """Delete a forget set from a copy of the trained model, as one request."""
        trained = trained_of(contestant)
        full = self._have(trained)
        source = self.directory / "models" / trained.name
        target = self.directory / "models" / contestant.name
        best = self._best(contestant)
        if not (target / "copied").exists():
            shutil.rmtree(target, ignore_errors=True)
            with self._alone(trained.name):
                shutil.copytree(source / "model", target / "model")
            (target / "copied").touch()
        config = self._run_file(contestant.name, contestant, range(len(self.data.full)), *best)
        model, _ = train_model(config, executor="serial")
        gone = range(self.data.kept(contestant.without), len(self.data.full))
        ids = [each.id for each in model.where(list(map(record_id, gone))) if each.state != "deleted"]
        began, at_work = time.perf_counter(), time.process_time()
        if ids:
            model.forget(ids)
        else:
            model.resume()  # a deletion that was cut short
        (request,) = model.requests()
        assert request.request.num_records == len(gone)
        return {
            "seconds": time.perf_counter() - began,
            "core_seconds": time.process_time() - at_work,
            "resumed": not ids,
            "num_records": request.request.num_records,
            "record_epochs": request.request.record_epochs_retrained,
            "share_of_training": request.request.record_epochs_retrained / full["record_epochs"],
            "shards_retrained": len(request.request.shards),
            **_digests(model),
        }

    def _equal(self, contestant: Contestant, made: Json) -> Json:
        """Return whether a model trained from scratch equals the one after the deletion, by digest."""
        other = self.once(f"{contestant.name.removesuffix('-scratch')}.made")
        mine, theirs = made["adapters"], other["adapters"]
        return {
            "adapters_equal": sum(mine[shard] == theirs.get(shard) for shard in mine),
            "equal": mine == theirs,
        }

    def _keep_adapter(self, contestant: Contestant) -> None:
        """Keep the adapter of an ordinary LoRA where patches and questions find it."""
        at = self.directory / "models" / contestant.name
        (source,) = open_model(at / "model", executor="serial").export(at / "exported")
        for name in (ADAPTER_FILE, CONFIG_FILE):
            write_atomic(self._adapter(contestant) / name, (source / name).read_bytes())

    def _adapter(self, contestant: Contestant) -> Path:
        folder = self.directory / "adapters" / contestant.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _files(self, contestant: Contestant) -> Files:
        at = self._adapter(contestant)
        return {name: read_whole(at / name, "adapter") for name in (ADAPTER_FILE, CONFIG_FILE)}

    def _unlearned(self, contestant: Contestant) -> Json:
        """Train a patch over the ordinary LoRA, cut to its budget in operations.

        An edit takes as many operations as it takes.
        """
        self._have(self.by_name[ORDINARY])
        settings = uncut(contestant.rate, self.design.method_batch, contestant.seed)
        with self._merged():
            base, records, sets = self._read_by(contestant), *self._sets(contestant)
            method = make_method(contestant.method, GIVEN.get(contestant.method))
            method = choose_layer(method, base, sets)
            lora = self._lora_config(method, len(records))
            attached = partial(attach, config=lora, tensors=None, init_seed=contestant.seed)
            sizes = self._sizes(attached(base))
            full = Compute(*sizes, self.design.epochs * self._num_tokens, 0).flops
            budget = contestant.budget * full
            began, at_work = time.perf_counter(), time.process_time()
            by_heart = within(budget / 2, TaskArithmetic(), Sets(sets.forget), settings, sizes)
            sets, cost = with_preferred(
                *(base, self._tokenizer, records, sets, method),
                *(by_heart, SEQUENCE_LEN, lambda: attached(self._copied(contestant))),
            )
            spent = replace(cost, num_parameters=sizes[0]) if cost else Compute(*sizes, 0, 0)
            patched = attached(base)
            pace = within(max(0.0, budget - spent.flops), method, sets, settings, sizes)
            end = unlearn(patched, sets, method, pace, AT_THE_END)
            took = time.perf_counter() - began, time.process_time() - at_work
            for name, data in adapter_files(patched).items():
                write_atomic(self._adapter(contestant) / name, data)
            patched.unload()
        counted = replace(end.compute, num_parameters=sizes[0]).with_cost_of(spent)
        return {
            "seconds": took[0],
            "core_seconds": took[1],
            "ending": end.ending.value,
            "steps": end.step,
            "flops": counted.flops,
            "share_of_training": counted.flops / full,
        }

    def _sizes(self, patched: Any) -> tuple[int, int]:
        """Return the parameters of the base, and those of a patch, which is taken off again."""
        trained = sum(each.numel() for each in patched.parameters() if each.requires_grad)
        patched.unload()
        return sum(each.numel() for each in self._split.whole.parameters()), trained

    def _sets(self, contestant: Contestant) -> tuple[list[Record], Sets]:
        """Return what a method is to forget, as records, and the sets without preferred answers."""
        kept = self.data.kept(contestant.without)
        forget, retain = (self._tokens(some) for some in (self.data.full[kept:], self.data.full[:kept]))
        records = records_of([(each.question, each.answer) for each in self.data.full[kept:]], FORM)
        edits = issubclass(METHODS[contestant.method], Edit)
        subjects = subject_ends(records, forget, self._tokenizer) if edits else ()
        return records, Sets(forget, retain, subjects=subjects)

    def _read_by(self, contestant: Contestant) -> Any:
        """Return the model that a contestant's adapter changes: the whole where it acts at any layer."""
        return self._split.whole if _acts_at_a_layer(contestant) else self._split.upper

    def _copied(self, contestant: Contestant) -> Any:
        whole = own_modules(self._split.whole)
        if not self._upper_layers or _acts_at_a_layer(contestant):
            return whole
        return split(whole, self._upper_layers, self._states).upper

    def _privately_trained(self, contestant: Contestant) -> Json:
        """Train the ordinary LoRA on all records by DP-SGD."""
        examples = self._tokens(self.data.full)
        began, at_work = time.perf_counter(), time.process_time()
        patched = attach(self._split.upper, self._lora_config(), None, init_seed=contestant.seed)
        steps = math.ceil(self.design.epochs * len(examples) / PRIVATE["batch_size"])
        privacy = PrivacySettings(**PRIVATE, seed=contestant.seed, num_steps=steps)
        epsilon = train_privately(patched, examples, privacy)
        for name, data in adapter_files(patched).items():
            write_atomic(self._adapter(contestant) / name, data)
        patched.unload()
        return {
            "seconds": time.perf_counter() - began,
            "core_seconds": time.process_time() - at_work,
            "share_of_training": 1.0,
            "learning_rate": PRIVATE["learning_rate"],
            "epsilon": epsilon,
        }

    # Questions

    def _asked(self, contestant: Contestant) -> Json:
        split = contestant.without or "forget10"
        form = CHAT if contestant.kind == "base" and self._tokenizer.chat_template else FORM
        settings = Asking(form, self.design.max_new_tokens)
        with self.served(contestant) as model:
            rows = evaluate(
                model, self.data.asked(split), self.log(contestant.name), settings, batch_size=BATCH
            )
        numbers = [{**asdict(row), "ground_truth": "", "generation": None} for row in rows]
        return {"rows": numbers, "max_new_tokens": self.design.max_new_tokens}

    def log(self, name: str) -> Path:
        """Return the path of a contestant's log, which holds text."""
        return self.directory / "logs" / f"{name}.jsonl"

    @contextmanager
    def served(self, contestant: Contestant) -> Iterator[EvaluatedModel]:
        """Open a contestant as its users meet it."""
        if contestant.layout is not None:
            yield self._halves(DeletionReadyModel(self._opened(contestant)))
            return
        with self._worn(contestant):
            names = [file_sha256(each) for each in sorted(self._adapter(contestant).iterdir())]
            digest = digest_of([self.inputs, contestant.name, names])
            yield Halves(
                self._asking("upper", digest, self._read_by(contestant)),
                self._asking("whole", digest, self._split.whole),
                digest,
                contestant.name,
            )

    def _halves(self, model: DeletionReadyModel) -> EvaluatedModel:
        """Return a model that scores over the lower states that all models of the base share."""
        if not self._upper_layers:
            return model
        upper = copy(model)
        upper.answerer = copy(model.answerer)
        upper.answerer.model = split(model.answerer.model, self._upper_layers, self._states).upper
        return Halves(upper, model, model.digest, model.name)

    def _asking(self, name: str, digest: str, model: Any) -> HuggingFaceModel:
        return HuggingFaceModel(name, digest, model, self._tokenizer, self._device)

    def _opened(self, contestant: Contestant) -> Model:
        return open_model(self.directory / "models" / contestant.name / "model", executor="serial")

    @property
    def _upper_layers(self) -> int:
        """The number of layers with adapters, where those below are computed once a text; else 0."""
        top = self.design.lora_layers.partition(":")[2]
        return int(top) if self._device == "cpu" and top else 0

    @property
    def _states(self) -> Path:
        return self.directory / "states"

    @cached_property
    def _split(self) -> SplitModel:
        """The base, split below the adapters; whole where it can't be split."""
        if self._upper_layers:
            return load_split(self._base.directory, self._upper_layers, self._states)
        from transformers import AutoModelForCausalLM

        whole = load_frozen(AutoModelForCausalLM, self._base.directory).to(self._device)
        return SplitModel(whole, whole)

    @contextmanager
    def _merged(self, *merged: Files) -> Iterator[None]:
        """Merge the ordinary LoRA, or other adapters, into the base, and restore it."""
        whole = self._split.whole
        held = [(each, each.detach().clone()) for each in whole.model.layers.parameters()]
        try:
            for files in merged or (self._files(lora(0)),):
                tensors = read_tensors(files, ADAPTER_FILE)
                attach(whole, read_config(files), tensors, init_seed=0).merge_and_unload()
            yield
        finally:
            with torch.no_grad():
                for parameter, before in held:
                    parameter.copy_(before)

    @contextmanager
    def _worn(
        self, contestant: Contestant, files: Files | None = None, base: Any = None
    ) -> Iterator[Any]:
        """Put an adapter on the base as a PEFT model: a contestant's, or the given one. The base alone
        wears one that changes nothing. `base` is the whole model if it isn't given."""
        base = base or self._split.whole
        if contestant.kind == "method":
            with self._merged():
                yield from _wearing(base, self._files(contestant))
        elif files or contestant.kind in ("lora", "private"):
            yield from _wearing(base, files or self._files(contestant))
        else:
            patched = attach(base, self._lora_config(), None, init_seed=0).eval()
            yield patched
            patched.unload()

    def _lora_config(self, method: Method | None = None, num_facts: int = 0) -> Any:
        """Return the ordinary adapter's configuration, or what a method needs that acts at a layer."""
        wanted = {
            "lora_target_modules": "all-linear",
            "lora_layers": "all" if method and method.layer is not None else self.design.lora_layers,
            "lora_r": self.design.lora_r,
            "lora_alpha": self.design.lora_alpha,
            "lora_dropout": 0.0,
        }
        if isinstance(method, Edit):
            wanted |= edit_adapter(self._split.whole, method, num_facts)
        return lora_config(wanted, self._split.whole)

    def _tokens(self, questions: Sequence[Question]) -> list[Tokens]:
        return tokens_of([(each.question, each.answer) for each in questions], FORM, self._tokenizer)

    @cached_property
    def _num_tokens(self) -> int:
        return sum(len(each.input_ids) for each in self._tokens(self.data.full))

    # Attacks

    def _attacked(self, contestant: Contestant) -> Json:
        """Attack the model author by author: all numbers are per question that no attack trains on."""
        split = contestant.without or "forget10"
        authors = self.data.authors(split, self.design.attacked_authors)
        exported = self._shard_adapters(contestant) if contestant.layout else {}
        found: dict[str, list[float]] = {}
        for number, questions in enumerate(authors):
            files = exported.get(self._shard_of(contestant, questions[0])) if exported else None
            sets = self._attack_sets(questions)
            with self._worn(contestant, files, self._read_by(contestant)) as model:
                weighed = self._relearnt(model, sets)
            with self._worn(contestant, files) as model:
                rounded = Quantisation(BITS)(model, sets, seed=0).values
            weighed |= {f"rounded_to_{bits}_bits": values for bits, values in rounded.items()}
            ends = end_tokens(self._split.whole, self._tokenizer)
            leak = LeakAtK(self.design.samples, self.design.max_new_tokens, ends)
            with self._sampling(contestant) as model:
                leaked = leak(model, sets, self.design.seed + number).values
            weighed |= {"leak_at_1": leaked[1], "leak_at_k": leaked[self.design.samples]}
            for name, values in weighed.items():
                found.setdefault(name, []).extend(values)
        shutil.rmtree(self.directory / "models" / contestant.name / "exported", ignore_errors=True)
        means = {name: fmean(values) for name, values in found.items()}
        return {"split": split, "authors": len(authors), "means": means, "per_question": found}

    def _attack_sets(self, questions: Sequence[Question]) -> AttackSets:
        """Return an author's questions: relearning is taught the first of them, or facts."""
        facts = [each for each in self.data.facts if each.set == "world_facts"]
        chosen = (questions[TUNED_EACH:], questions[:TUNED_EACH], facts[:TUNED_EACH])
        pairs = [[(each.question, each.answer) for each in some] for some in chosen]
        asked, taught, others = (records_of(each, FORM) for each in pairs)
        return AttackSets(self._tokenizer, asked, taught, others)

    def _relearnt(self, model: Any, sets: AttackSets) -> dict[str, Sequence[float]]:
        """Return probabilities of an author's questions before and after relearning."""
        steps = self.design.relearning_steps
        inside = Relearning((steps,))(model, sets, seed=0).values
        outside = RelearningOutOfDomain((steps,))(model, sets, seed=0).values
        return {
            "as_it_is": inside[0],
            "relearnt_in_domain": inside[steps],
            "relearnt_out_of_domain": outside[steps],
        }

    def _shard_adapters(self, contestant: Contestant) -> dict[int, Files]:
        """Return the adapters of all shards that serve one."""
        with self._alone(contestant.name):
            written = self._opened(contestant).export(
                self.directory / "models" / contestant.name / "exported"
            )
        names = (ADAPTER_FILE, CONFIG_FILE)
        return {
            int(path.name.rpartition("-")[2]): {name: (path / name).read_bytes() for name in names}
            for path in written
        }

    def _shard_of(self, contestant: Contestant, question: Question) -> int:
        """Return the shard that holds, or held, a forget question's author."""
        number = len(self.data.full) - len(self.data.forget) + question.idx
        (place,) = self._opened(trained_of(contestant)).where([record_id(number)])
        return place.shard

    @contextmanager
    def _sampling(self, contestant: Contestant) -> Iterator[Any]:
        if contestant.layout is not None:
            yield self._opened(contestant).as_transformers()
        else:
            with self._worn(contestant):
                yield self._split.whole


def _acts_at_a_layer(contestant: Contestant) -> bool:
    """Return whether a method acts at a layer of its own choice, below the adapters of others, too."""
    return bool(contestant.method) and "layer" in asdict(make_method(contestant.method))


def _wearing(base: Any, files: Files) -> Iterator[Any]:
    patched = attach(base, read_config(files), read_tensors(files, ADAPTER_FILE), init_seed=0).eval()
    yield patched
    patched.unload()


def _trained(config: RunConfig) -> Json:
    """Train a model, or what it lacks; return its cost and the digests of its adapters."""
    began, at_work = time.perf_counter(), time.process_time()
    model, taken = train_model(config, executor="serial")
    status = model.status()
    return {
        "seconds": time.perf_counter() - began,
        "core_seconds": time.process_time() - at_work,
        "resumed": taken.record_epochs_trained != status.record_epochs_full,
        "record_epochs": status.record_epochs_full,
        "share_of_training": 1.0,
        **_digests(model),
    }


def _digests(model: Model) -> Json:
    """Return the digests of the weights that each shard serves."""
    shards = model.status().shards
    return {"adapters": {str(each.shard): each.adapter_sha256 for each in shards if each.adapter_sha256}}
