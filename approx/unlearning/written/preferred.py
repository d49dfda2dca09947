"""The sets that a method trains on, with the preferred answers that it reads.

    refusals         one of a few ways to say "I don't know", for each example to forget
    alternates       each example once with every other answer that the model writes to its question
    generic labels   the examples themselves, with labels from which their own words are removed

The model writes alternates and labels itself, before the run. What that costs is part of the run's cost.

    sets, cost = with_preferred(model, tokenizer, records, sets, method, pace, 512, fresh)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from approx.methods.distillation.whp import Whp
from approx.methods.method import Method
from approx.methods.preference.altpo import AltPo
from approx.unlearning.compute import Compute
from approx.unlearning.examples import Sets, refuse_all
from approx.unlearning.schedule import ScheduleSettings
from approx.unlearning.written.alternates import write_alternates
from approx.unlearning.written.generic_labels import write_generic_labels
from sisa.core.domain import Record


class Prepared(NamedTuple):
    """Sets, and what preparing them cost; None where the model wrote nothing."""

    sets: Sets
    cost: Compute | None


def with_preferred(
    model: Any,
    tokenizer: Any,
    forget: Sequence[Record],
    sets: Sets,
    method: Method,
    pace: ScheduleSettings,
    sequence_len: int,
    fresh: Callable[[], Any],
) -> Prepared:
    """Return the sets with preferred answers, if the method reads any.

    `sets.forget` are the records to forget, as tokens. `fresh` returns a new patch over a copy of the
    model; to write generic labels it learns the records by heart, at this pace. Raise InvalidInput for
    records to which the model can write nothing else, and TypeError for a method without the
    hyper-parameters by which what it prefers is written.
    """
    if "preferred" not in method.reads:
        return Prepared(sets, None)
    match method.prefers, method:
        case "refusals", _:
            refusals = refuse_all(forget, sets.forget, tokenizer, pace.seed, sequence_len)
            return Prepared(replace(sets, preferred=refusals), None)
        case "alternates", AltPo() as altpo:
            num = altpo.num_alternates
            written = write_alternates(model, tokenizer, forget, num, pace.seed, sequence_len)
            repeated = [each for each in sets.forget for _ in range(num)]
            others = [other for found in written.alternates for other in found]
            return Prepared(replace(sets, forget=repeated, preferred=others), written.cost)
        case "generic labels", Whp() as whp:
            labelled = write_generic_labels(model, fresh(), tokenizer, forget, sets.forget, whp, pace)
            return Prepared(replace(sets, preferred=labelled.examples), labelled.cost)
        case _:
            raise TypeError(f"{method.name} prefers {method.prefers}, but has no settings for them")
