"""A base that knows some invented people by heart, and a deletion-ready model over it.

The model's shards are trained on the records of those people and of as many others, whom the base does
not know. What is forgotten exactly is therefore still known to the base, and a patch is needed. People
come from `sisa.data.samples` by its seed. Everything is done by commands, as a user does it, and is
measured on the base as it is served, under its patches, and on the served model.

    ground = Ground.laid(folder, base, TINY)
    ground.sisa("forget", "--subject", "p001", "--consent", "asked for")
    ground.asked().served(ground.rows("p001")).probability
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from cluster.cli.patches import EXIT_NOT_MADE, EXIT_STILL_KNOWN, METHOD, values_in_words
from sisa.data.samples import make_people, to_jsonl
from sisa.lm.base.weights import resolve_base
from tests.models.knowing_base import record, teach
from tests.models.tiny_base import make_tiny_base
from tests.models.tiny_model import KEY

CONSENT = "asked for by the person"
NEUTRAL = (
    "Water freezes when it gets cold enough, and ice floats on the surface of the lake.",
    "The train to the city leaves every hour from the second platform.",
    "In the morning she made a cup of tea and read the newspaper at the kitchen table.",
    "A triangle has three sides, and the sum of its angles is one hundred and eighty degrees.",
    "Many birds fly south in autumn and come back when the days grow longer.",
    "The library is open from nine to five on weekdays and closed on public holidays.",
    "To bake bread you need flour, water, salt and a little patience.",
    "The heart pumps blood through the body, and the lungs take in oxygen.",
    "He closed the window because the wind had blown his papers onto the floor.",
    "Mountains are formed over millions of years as plates of the earth's crust collide.",
)
SET = {"action": "append", "metavar": "KEY=VALUE", "help": "as in `sisa approx unlearn`"}
Row = Mapping[str, str]


@dataclass(frozen=True)
class Scale:
    """The number of people that the base knows, the amount of teaching, the training of the shards."""

    per_person: int = 4
    steps: int = 150
    learning_rate: float = 3e-5
    shards: int = 2
    slices: int = 2
    epochs: int = 4
    run: Mapping[str, Any] = field(default_factory=dict)
    num_known: int = 10
    seed: int = 7  # of the people


TINY = Scale(2, 600, 3e-3, run={"learning_rate": 0.01, "lora_r": 4, "sequence_len": 128})


def base_dir(tiny: bool, base_model: str, folder: Path) -> Path:
    """Return the directory of a base to teach; a tiny one is made in `folder`."""
    return make_tiny_base(folder / "base", hidden=96) if tiny else resolve_base(base_model).directory


@dataclass(frozen=True)
class Answers:
    """Means over records: token probability (geometric) and ROUGE-L recall of greedy answers."""

    probability: float
    rougeL_recall: float

    def to_json(self) -> dict[str, float]:
        return {
            "probability": round(self.probability, 4),
            "rougeL_recall": round(self.rougeL_recall, 4),
        }


@dataclass(frozen=True)
class Way:
    """A way to make a patch: the method, and what is retained.

    With `keep`, the retain set is the records of people to keep; otherwise the base writes it. With
    `max_drift`, shards are retrained once they have drifted that far. Settings that are not given have
    the command's defaults.
    """

    keep: bool = True
    method: str = METHOD
    settings: Mapping[str, Any] = field(default_factory=dict)
    max_drift: float | None = None

    def to_json(self) -> dict[str, Any]:
        retain = "records of the others" if self.keep else "written by the base"
        found = {"method": self.method, "retain": retain, "settings": dict(self.settings)}
        return found if self.max_drift is None else {**found, "max_drift": self.max_drift}


def method_in_words(method: str, settings: Mapping[str, Any]) -> str:
    """Return a method with the settings that differ from its defaults, as in a table."""
    return ", ".join(filter(None, [method, values_in_words(settings)]))


@dataclass(frozen=True)
class Ground:
    """The folder of an experiment."""

    folder: Path
    base: Path
    scale: Scale
    taught: Mapping[str, Any]

    @classmethod
    def laid(cls, folder: Path, base: Path, scale: Scale, **settings: Any) -> Ground:
        """Teach the base and train the model. `settings` are more keys of the run file."""
        people = make_people(scale.num_known, scale.per_person, scale.seed)
        to, rate = folder / "knowing", scale.learning_rate
        taught = teach(base, list(map(record, people)), to=to, steps=scale.steps, learning_rate=rate)
        return cls(folder, to, scale, taught).trained(settings)

    def beside(self, folder: Path, **settings: Any) -> Ground:
        """Return another model over the same base."""
        return replace(self, folder=folder).trained(settings)

    def copied(self, folder: Path, **settings: Any) -> Ground:
        """Return a copy of the model as it is now; train it no further."""
        for name in ("model", "witness", "keys"):  # keys are made when something is sealed
            if (self.folder / name).exists():
                shutil.copytree(self.folder / name, folder / name)
        return replace(self, folder=folder).trained(settings)

    def trained(self, settings: Mapping[str, Any]) -> Ground:
        """Train the model, or move it to changed settings."""
        (self.folder / "people.jsonl").write_text(to_jsonl(self.people))
        (self.folder / "partition.key").write_text(KEY)
        shape = {"shards": self.scale.shards, "slices": self.scale.slices}
        run = {
            "base_model": str(self.base),
            "datasets": [{"path": "people.jsonl"}],
            "output_dir": "model",
            "witness": "witness",
            "keyring": "keys",
            "num_epochs": self.scale.epochs,
            **self.scale.run,
            **settings,
            "sisa": {**shape, "partition_key_file": "partition.key", "embedder": "hashing"},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump(run))
        run_json("train", self.folder / "run.yaml", "--executor", "serial")
        return self

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @cached_property
    def people(self) -> list[dict[str, str]]:
        return make_people(2 * self.scale.num_known, self.scale.per_person, self.scale.seed)

    @property
    def known(self) -> list[str]:
        """Return the subjects that the base was taught."""
        return list(dict.fromkeys(row["subject_id"] for row in self.people))[: self.scale.num_known]

    def rows(self, *subjects: str) -> list[dict[str, str]]:
        return [row for row in self.people if row["subject_id"] in subjects]

    def file(self, name: str, *subjects: str) -> Path:
        """Write the records of some people to a file."""
        path = self.folder / name
        path.write_text(to_jsonl(self.rows(*subjects)))
        return path

    def sisa(self, *arguments: Any, codes: Collection[int] = (0,)) -> dict[str, Any]:
        """Return the result of a command on the model; `-m` goes behind its name of one or two words."""
        at = 2 if arguments[0] in ("approx", "eval", "request") else 1
        return run_json(*arguments[:at], "-m", self.model, *arguments[at:], codes=codes)

    def unlearn(
        self,
        way: Way,
        retained: Sequence[str],
        *,
        requests: Sequence[str] = (),
        forget: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Make a patch for requests' texts, or for people's records; return the command's result."""
        asked: list[Any] = [word for each in requests for word in ("--request", each)]
        if not requests:
            asked = ["--forget", self.file("forget.jsonl", *forget)]
        if way.keep:
            asked += ["--retain", self.file("retain.jsonl", *retained)]
        if way.keep or not requests:
            asked += ["--consent", CONSENT]
        if way.max_drift is not None:
            asked += ["--max-drift", way.max_drift]
        values = [("--set", f"{name}={json.dumps(value)}") for name, value in way.settings.items()]
        return self.sisa(
            *("approx", "unlearn", *asked, "--method", way.method, "--executor", "serial"),
            *(each for pair in values for each in pair),
            codes=(0, EXIT_NOT_MADE, EXIT_STILL_KNOWN),
        )

    def probed(self, *subjects: str) -> dict[str, Any]:
        """Return what the base alone knows, as it is served."""
        return self.sisa("approx", "probe", "--file", self.file("asked.jsonl", *subjects))

    def asked(self) -> Asked:
        """Open the model as it is served now."""
        return Asked(self.model)


class Asked:
    """The served model, and the base beneath it, at one moment."""

    def __init__(self, directory: Path) -> None:
        import sisa
        from approx.evaluation.evaluated_models import DeletionReadyModel
        from approx.evaluation.questions import PromptForm

        model = sisa.open_model(directory, executor="serial")
        self._served = DeletionReadyModel(model)
        self._answerer, _ = model.answerer()
        self._form = PromptForm("completion")

    def served(self, rows: Sequence[Row]) -> Answers:
        """Return the answers of the shards that questions are routed to."""
        from approx.metrics.probability import probability
        from approx.metrics.word_overlap import rougeL_recall

        pairs = [(row["prompt"], row["completion"]) for row in rows]
        scores = self._served.score(pairs, self._form, batch_size=8)
        answers = self._served.generate([q for q, _ in pairs], self._form, 32, batch_size=1)
        recalls = [
            rougeL_recall(row["completion"].strip(), answer)
            for row, answer in zip(rows, answers, strict=True)
        ]
        return Answers(fmean(probability(each.loss) for each in scores), fmean(recalls))

    def base(self, rows: Sequence[Row]) -> float:
        """Return the probability of answers under the base alone."""
        from approx.metrics.probability import probability

        return fmean(probability(loss) for loss in self._base_losses([record(row) for row in rows]))

    def neutral(self) -> float:
        """Return the base's utility on neutral text: exp(-mean loss of a token), from 0 to 1."""
        from approx.metrics.probability import probability
        from sisa.core.domain import Part, Record

        texts = [Record(str(n), None, "text", (Part("text", each),)) for n, each in enumerate(NEUTRAL)]
        return probability(fmean(self._base_losses(texts)))

    def _base_losses(self, records: Sequence[Any]) -> list[float]:
        from approx.evaluation.answers import answer_scores, collate
        from sisa.lm.base.tokens import tokenize
        from sisa.lm.routing.route import Route

        found = []
        for each in records:
            tokens = tokenize(each, self._answerer.tokenizer, train_on_inputs=False)
            batch = collate([tokens])
            (score,) = answer_scores(
                self._answerer.logprobs([Route()], input_ids=batch.ids_BT1[:, :-1], use_cache=False),
                batch,
            )
            found.append(score.loss)
        return found


def run_json(*arguments: Any, codes: Collection[int] = (0,)) -> dict[str, Any]:
    """Return the result of `sisa ARGUMENTS --json`. Raise RuntimeError for another exit code."""
    from cluster.cli.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*map(str, arguments), "--json"])
    if code not in codes:
        raise RuntimeError(f"sisa {arguments[0]} ended with {code}: {out.getvalue()}{err.getvalue()}")
    found: dict[str, Any] = json.loads(out.getvalue())
    return found
