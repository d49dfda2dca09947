"""All methods by name.

>>> make_method("npo", {"beta": 0.2})
Npo(beta=0.2, forget_weight=1.0, retain_weight=1.0, retain_loss='nll')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from approx.methods.ascent.graddiff import GradDiff
from approx.methods.ascent.gradient_ascent import GradientAscent
from approx.methods.ascent.kl_minimisation import KlMinimisation
from approx.methods.ascent.satimp import SatImp
from approx.methods.ascent.wga import Wga
from approx.methods.distillation.ceu import Ceu
from approx.methods.distillation.undial import Undial
from approx.methods.distillation.whp import Whp
from approx.methods.editing.memit import Memit
from approx.methods.editing.rome import Rome
from approx.methods.idk_nll import IdkNll
from approx.methods.method import Method
from approx.methods.pdu import Pdu
from approx.methods.preference.altpo import AltPo
from approx.methods.preference.dpo import Dpo, IdkDpo
from approx.methods.preference.npo import Npo
from approx.methods.preference.simnpo import SimNpo
from approx.methods.rmu import Rmu
from approx.methods.task_arithmetic import TaskArithmetic
from sisa.core.errors import InvalidInput, Problem

METHODS: Mapping[str, type[Method]] = {
    each.name: each
    for each in (
        *(GradientAscent, GradDiff, KlMinimisation, Wga, SatImp),
        *(Dpo, IdkDpo, AltPo, Npo, SimNpo),
        *(Ceu, Undial, Whp, IdkNll, Pdu, Rmu, Rome, Memit, TaskArithmetic),
    )
}


def make_method(name: str, hyperparameters: Mapping[str, Any] | None = None) -> Method:
    """Return a method with the given hyper-parameters. Raise InvalidInput for unknown names."""
    given = hyperparameters or {}
    if name not in METHODS:
        names = "one of " + ", ".join(METHODS)
        raise InvalidInput(
            "no such method",
            where="method",
            expected=names,
            got=name,
            next_step="choose one of these; `sisa approx methods` describes them",
            problems=[Problem("method", f"{name!r}, expected {names}")],
        )
    known = [each.name for each in fields(METHODS[name])]
    unknown = [each for each in given if each not in known]
    if unknown:
        raise InvalidInput(
            f"{name} has no such hyper-parameters",
            where=name,
            expected="among " + ", ".join(known) if known else "none",
            next_step="remove them, or correct their names",
            problems=[Problem(each, "unknown") for each in unknown],
        )
    return METHODS[name](**given)
