"""The version of the training procedure is raised with each change of the code that reaches the bits."""

from __future__ import annotations

import ast

from sisa.lm.base.numerics import PROCEDURE_VERSION
from tests import procedure
from tests.procedure import digest, shape, trained_with


def test_training_is_traced() -> None:
    found = {module.removeprefix("sisa.") for module in trained_with()}
    assert {"lm.train.trainer", "lm.train.losses", "lm.base.adapter", "lm.base.tokens"} <= found
    assert {"lm.base.numerics", "planning.plan", "core.digest"} <= found


def test_words_reach_no_bit_and_numbers_may() -> None:
    one, other = (
        ast.parse(f'"""{word}."""\nx = 1  # {word}\nraise ValueError("{word}")') for word in "ab"
    )
    assert shape(one) == shape(other)
    assert shape(one) != shape(ast.parse('"""a."""\nx = 2\nraise ValueError("a")'))


def test_a_change_of_the_procedure_raises_its_version() -> None:
    assert (PROCEDURE_VERSION, digest()) == procedure.RECORDED, procedure.__doc__
