"""Make the contestants of TOFU in full, and open them as their users and attackers meet them.

Models, adapters and records lie in the directory of cells, and hold text. A training that was cut short
goes on at its last checkpoint. Cells may come from elsewhere: a model whose files are missing is made
again once a cell needs it.

    models = Models(cells, base, spec, embedder)
    models.made(models.by_name["50x4-key0-forget10"])
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from approx.evaluation.asking import EvaluatedModel
from approx.evaluation.evaluated_models import DeletionReadyModel, records_of
from approx.evaluation.questions import Question
from approx.methods.editing.edit_run import subject_ends
from approx.methods.method import Method
from approx.methods.registry import make_method
from approx.methods.task_arithmetic import TaskArithmetic
from approx.metrics.model_utility import harmonic_mean
from approx.metrics.probability import probability, probability_among
from approx.metrics.word_overlap import rougeL_recall
from approx.unlearning.causal_tracing import choose_layer
from approx.unlearning.compute import Compute
from approx.unlearning.examples import Sets
from approx.unlearning.unlearn import unlearn
from approx.unlearning.written.preferred import Writing, with_preferred
from sisa.config.config import RunConfig
from sisa.core.digest import digest_of, file_sha256
from sisa.core.domain import Record
from sisa.lm.base.adapter import adapter_files, attach
from sisa.model import Model, open_model
from sisa.store.blobs.files import write_atomic
from sisa.train import train_model
from tests.bench.command import Clock
from tests.bench.deletion.retrained import secret_of
from tests.bench.private_training import PrivacySettings, train_privately
from tests.bench.tofu_full.base import Files, FrozenBase, read_adapter
from tests.bench.tofu_full.budgets import AT_THE_END, uncut, within
from tests.bench.tofu_full.cells import Cells, Json
from tests.bench.tofu_full.design import (
    FORM,
    QUESTIONS_EACH,
    Contestant,
    Layout,
    contestants,
    lora,
    loras_in_full,
    record_id,
    trained_of,
    write_records,
)

BATCH = 64  # decoding reads all weights for each step of a batch
SEQUENCE_LEN = 512  # no record is longer
# Where a method's default needs a measured bound, or more than the budget.
GIVEN: dict[str, Json] = {"task_arithmetic": {"alpha": 2.0}, "altpo": {"num_alternates": 1}}
PRIVATE: Json = {"noise_multiplier": 0.7, "max_grad_norm": 1.0, "delta": 1e-5, "batch_size": 16,
                 "learning_rate": 1e-3}  # fmt: skip


class Models:
    """The models of all contestants."""

    def __init__(self, cells: Cells, base: FrozenBase, spec: str, embedder: str) -> None:
        """Take the cells' design and data, and the base with its name in run files."""
        self.cells, self.design, self.data = cells, cells.design, cells.data
        self.base, self._spec, self._embedder = base, spec, embedder
        self.by_name = {each.name: each for each in contestants(self.design)}
        self._ordinary = lora(self.design.seeds[0])

    def made(self, contestant: Contestant) -> Json:
        """Return how a model was made; make it if no cell says so."""
        return self.cells.once(f"{contestant.name}.made", partial(self._make, contestant))

    def have(self, contestant: Contestant) -> Json:
        """Return how a model was made, and have its files: its cell may come from elsewhere."""
        found = self.made(contestant)
        if not self._folder(f"{contestant.name}.made").exists():
            with self.cells.alone(f"{contestant.name}.made"):
                self._make(contestant)
        return found

    def _folder(self, name: str) -> Path:
        """Return the directory of a model's files, which hold text."""
        return self.cells.directory / "models" / name

    def _make(self, contestant: Contestant) -> Json:
        made = self._newly_made(contestant)
        here = self._folder(f"{contestant.name}.made")  # a file: the model was made in this directory
        here.parent.mkdir(parents=True, exist_ok=True)
        here.touch()
        return made

    def _newly_made(self, contestant: Contestant) -> Json:
        match contestant.kind:
            case "base":
                return {"share_of_training": 0.0}
            case "private":
                return self._privately_trained(contestant)
            case "method":
                return self._unlearned(contestant)
            case "ours" if contestant.without and not contestant.scratch:
                return self._deleted(contestant)
            case "lora" if contestant == self._ordinary:
                return self._best_in_full(contestant)
        return self._trained(contestant)

    def _trained(self, contestant: Contestant) -> Json:
        """Train a deletion-ready model or an ordinary LoRA at the best rate."""
        rate, batch = self._best(contestant)
        numbers = range(self.data.kept(contestant.without))
        config = self._run_file(contestant.name, contestant, numbers, rate, batch)
        made = {**_train(config), "learning_rate": rate, "batch": batch}
        if contestant.scratch:
            other = self.made(self.by_name[contestant.name.removesuffix("-scratch")])
            mine, theirs = made["adapters"], other["adapters"]
            equal = sum(mine[shard] == theirs.get(shard) for shard in mine)
            made |= {"adapters_equal": equal, "equal": mine == theirs}
        if contestant.kind == "lora":
            self._keep_adapter(contestant, *self._exported(contestant).values())
        if contestant.rate:
            made |= self._tuned(self.opened(contestant), len(self.data.full) // QUESTIONS_EACH)
        return made

    def _exported(self, contestant: Contestant) -> dict[str, Files]:
        """Return the adapters of all shards that serve one, by the names of their directories."""
        folder = self._folder(contestant.name) / "exported"
        found = {path.name: read_adapter(path) for path in self.opened(contestant).export(folder)}
        shutil.rmtree(folder)
        return found

    def opened(self, contestant: Contestant) -> Model:
        """Open a model that was trained with shards, in this process."""
        return open_model(self._folder(contestant.name) / "model", executor="serial")

    def _best_in_full(self, contestant: Contestant) -> Json:
        """Take over the best of the ordinary LoRAs that were trained on all records, one a rate.

        A rate may make answers likely and yet ruin those that the model writes, so the ROUGE-L recall of
        written answers counts as much as their probability.
        """
        made, chosen = {}, self.cells.known(f"{contestant.name}.made")
        for each in loras_in_full(self.design):
            if chosen and chosen["learning_rate"] != each.rate:
                continue
            found = self.have(each)
            likely: Json = {name: found[name] for name in ("retain", "facts") if name in found}
            means = {**likely, **self._written(each)}
            made[each] = {**found, **means, "score": harmonic_mean([*means.values()])}
        best = max(made, key=lambda each: made[each]["score"])
        self._keep_adapter(contestant, read_adapter(self._adapter(best)))
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
        if contestant.kind == "lora" and contestant.without:
            best = self.made(self._ordinary)
        else:
            best = self.tried(contestant.layout.name if contestant.layout else self._ordinary.name)
        return contestant.rate or best["learning_rate"], best["batch"]

    def _run_file(
        self, name: str, of: Contestant, numbers: Sequence[int], rate: float, batch: int, shards: int = 0
    ) -> RunConfig:
        """Return a run file and write its records; `shards` replaces the layout's number of them."""
        at = self._folder(name).absolute()
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
                "prefix_cache_bytes": 2**31 if self.base.device == "cpu" else 0,
                "micro_batch_size": micro,
                "gradient_accumulation_steps": batch // micro,
                "num_epochs": design.epochs,
                "learning_rate": rate,
                "seed": of.seed or design.seeds[0],
                "device": self.base.device,
                "sisa": {
                    "shards": shards or layout.shards,
                    "slices": layout.slices,
                    "embedder": self._embedder if of.layout else "hashing",
                    "partition_key_file": at / "partition.key",
                    "aggregation": "routed" if of.layout else "mean_prob",
                },
            }
        )

    def tried(self, name: str) -> Json:
        """Return the trials of a layout, or of the ordinary LoRA, by its name."""
        return self.cells.once(f"{name}.tried", partial(self._try, name))

    def _try(self, name: str) -> Json:
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
                seconds = _train(config)["core_seconds"]
                score = self._tuned(open_model(config.output_dir, executor="serial"), authors)
                trials.append({"learning_rate": rate, "batch": batch, "core_seconds": seconds, **score})
        best = max(trials, key=lambda each: each["score"])
        shutil.rmtree(self._folder(f"{name}.tried"))
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
        full = self.have(trained)
        source, target = self._folder(trained.name), self._folder(contestant.name)
        best = self._best(contestant)
        if not (target / "copied").exists():
            shutil.rmtree(target, ignore_errors=True)
            with self.cells.alone(trained.name):
                shutil.copytree(source / "model", target / "model")
            (target / "copied").touch()
        config = self._run_file(contestant.name, contestant, range(len(self.data.full)), *best)
        model, _ = train_model(config, executor="serial")
        gone = range(self.data.kept(contestant.without), len(self.data.full))
        ids = [each.id for each in model.where(list(map(record_id, gone))) if each.state != "deleted"]
        clock = Clock()
        if ids:
            model.forget(ids)
        else:
            model.resume()  # a deletion that was cut short
        (request,) = model.requests()
        assert request.request.num_records == len(gone)
        return {
            **clock.took(),
            "resumed": not ids,
            "num_records": request.request.num_records,
            "record_epochs": request.request.record_epochs_retrained,
            "share_of_training": request.request.record_epochs_retrained / full["record_epochs"],
            "shards_retrained": len(request.request.shards),
            **_digests(model),
        }

    def _keep_adapter(self, contestant: Contestant, files: Files) -> None:
        """Keep an adapter where patches and questions find it."""
        folder = self._adapter(contestant)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(folder / name, data)

    def _adapter(self, contestant: Contestant) -> Path:
        return self.cells.directory / "adapters" / contestant.name

    def _unlearned(self, contestant: Contestant) -> Json:
        """Train a patch over the ordinary LoRA, cut to its budget in operations.

        An edit takes as many operations as it takes.
        """
        self.have(self._ordinary)
        settings = uncut(contestant.rate, self.design.method_batch, contestant.seed)
        with self.base.merged(read_adapter(self._adapter(self._ordinary))):
            method = make_method(contestant.method, GIVEN.get(contestant.method))
            base, records, sets = self.layers_of(contestant), *self._sets(contestant, method)
            method = choose_layer(method, base, sets)
            lora = self.base.lora_config(method, len(records))
            attached = partial(attach, config=lora, tensors=None, init_seed=contestant.seed)
            sizes = self._sizes(attached(base))
            full = Compute(*sizes, self.design.epochs * self._num_tokens, 0).flops
            budget = contestant.budget * full

            def fresh() -> Any:
                return attached(self.base.copied(whole=base is self.base.whole))

            clock = Clock()
            by_heart = within(budget / 2, TaskArithmetic(), Sets(sets.forget), settings, sizes)
            known = base, self.base.tokenizer, records, sets
            sets, cost = with_preferred(method, Writing(*known, by_heart, SEQUENCE_LEN, fresh))
            spent = replace(cost, num_parameters=sizes[0]) if cost else Compute(*sizes, 0, 0)
            patched = attached(base)
            pace = within(max(0.0, budget - spent.flops), method, sets, settings, sizes)
            end = unlearn(patched, sets, method, pace, AT_THE_END)
            took = clock.took()
            self._keep_adapter(contestant, adapter_files(patched))
            patched.unload()
        counted = replace(end.compute, num_parameters=sizes[0]).with_cost_of(spent)
        return {
            **took,
            "ending": end.ending.value,
            "steps": end.step,
            "flops": counted.flops,
            "share_of_training": counted.flops / full,
        }

    def _sizes(self, patched: Any) -> tuple[int, int]:
        """Return the parameters of the base, and those of a patch, which is taken off again."""
        trained = sum(each.numel() for each in patched.parameters() if each.requires_grad)
        patched.unload()
        return sum(each.numel() for each in self.base.whole.parameters()), trained

    def _sets(self, contestant: Contestant, method: Method) -> tuple[list[Record], Sets]:
        """Return what a method is to forget, as records, and the sets without preferred answers."""
        kept = self.data.kept(contestant.without)
        gone = self.data.full[kept:]
        forget, retain = self.base.tokens(gone), self.base.tokens(self.data.full[:kept])
        records = records_of([(each.question, each.answer) for each in gone], FORM)
        subjects = subject_ends(records, forget, self.base.tokenizer) if method.at_subjects else ()
        return records, Sets(forget, retain, subjects=subjects)

    def layers_of(self, contestant: Contestant) -> Any:
        """Return the layers that an adapter changes: all if a method chooses its layer, or the upper."""
        chooses = contestant.method and "layer" in asdict(make_method(contestant.method))
        return self.base.whole if chooses else self.base.split.upper

    def _privately_trained(self, contestant: Contestant) -> Json:
        """Train the ordinary LoRA on all records by DP-SGD."""
        examples = self.base.tokens(self.data.full)
        clock = Clock()
        patched = attach(self.base.split.upper, self.base.lora_config(), None, init_seed=contestant.seed)
        steps = math.ceil(self.design.epochs * len(examples) / PRIVATE["batch_size"])
        privacy = PrivacySettings(**PRIVATE, seed=contestant.seed, num_steps=steps)
        epsilon = train_privately(patched, examples, privacy)
        self._keep_adapter(contestant, adapter_files(patched))
        patched.unload()
        return {
            **clock.took(),
            "share_of_training": 1.0,
            "learning_rate": PRIVATE["learning_rate"],
            "epsilon": epsilon,
        }

    @cached_property
    def _num_tokens(self) -> int:
        return sum(len(each.input_ids) for each in self.base.tokens(self.data.full))

    @contextmanager
    def served(self, contestant: Contestant) -> Iterator[EvaluatedModel]:
        """Open a contestant as its users meet it."""
        if contestant.layout is not None:
            yield self.base.over_states(DeletionReadyModel(self.opened(contestant)))
            return
        with self.worn(contestant):
            names = [file_sha256(each) for each in sorted(self._adapter(contestant).glob("*"))]
            digest = digest_of([self.cells.inputs, contestant.name, names])
            yield self.base.evaluated(self.layers_of(contestant), contestant.name, digest)

    @contextmanager
    def sampled(self, contestant: Contestant) -> Iterator[Any]:
        """Open a contestant as a causal model of transformers, with its router if it has one."""
        if contestant.layout is not None:
            yield self.opened(contestant).as_transformers()
        else:
            with self.worn(contestant):
                yield self.base.whole

    @contextmanager
    def worn(
        self, contestant: Contestant, files: Files | None = None, model: Any = None
    ) -> Iterator[Any]:
        """Put a contestant's adapter on the base as a PEFT model, or `files`, that of one shard.

        `model` is the whole base, or its upper layers.
        """
        beneath: AbstractContextManager[None] = nullcontext()
        if contestant.kind == "method":
            beneath = self.base.merged(read_adapter(self._adapter(self._ordinary)))
        if contestant.kind in ("lora", "private", "method"):
            files = read_adapter(self._adapter(contestant))
        with beneath, self.base.wearing(files, model) as patched:
            yield patched

    def shard_adapters(self, contestant: Contestant) -> dict[int, Files]:
        """Return the adapters of all shards that serve one."""
        with self.cells.alone(contestant.name):
            found = self._exported(contestant)
        return {int(name.rpartition("-")[2]): files for name, files in found.items()}

    def shard_of(self, contestant: Contestant, question: Question) -> int:
        """Return the shard that holds, or held, a forget question's author."""
        number = len(self.data.full) - len(self.data.forget) + question.idx
        (place,) = self.opened(trained_of(contestant)).where([record_id(number)])
        return place.shard


def _train(config: RunConfig) -> Json:
    """Train a model, or what it lacks; return its cost and the digests of its adapters."""
    clock = Clock()
    model, taken = train_model(config, executor="serial")
    status = model.status()
    return {
        **clock.took(),
        "resumed": taken.record_epochs_trained != status.record_epochs_full,
        "record_epochs": status.record_epochs_full,
        "share_of_training": 1.0,
        **_digests(model),
    }


def _digests(model: Model) -> Json:
    """Return the digests of the weights that each shard serves."""
    shards = model.status().shards
    return {"adapters": {str(each.shard): each.adapter_sha256 for each in shards if each.adapter_sha256}}
