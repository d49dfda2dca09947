"""The version of the training procedure: it is raised with every change of the code that reaches the
bits.

Digests of weights can't be goldens, since they differ by processor. So the code itself is pinned: the
syntax trees of all modules of `sisa.lm` that training imports, without docstrings, comments and raised
errors. After a change of that code, compare what `python -m tests.pinned` prints before and after. If it
differs, raise PROCEDURE_VERSION. Then run `python -m tests.unit.lm.test_procedure` and put what it
prints into RECORDED.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.lm.base.numerics import PROCEDURE_VERSION

ROOT = Path(__file__).resolve().parents[3]
TRAINER = "sisa.lm.train.lora"
FETCHING = "sisa.lm.base.packages"  # a base is named by its digest, however it was fetched
RECORDED = (5, "2365ed3e865521c1")


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def trained_with() -> list[str]:
    """Return the modules of `sisa.lm` that the trainer imports, directly or through others."""
    found, waiting = set[str](), [TRAINER]
    while waiting:
        module = waiting.pop()
        if (
            module in (*found, FETCHING)
            or not module.startswith("sisa.lm.")
            or not path_of(module).is_file()
        ):
            continue
        found.add(module)
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{each.name}" for each in node.names)]
    return sorted(found)


def shape(node: Any) -> Any:
    """Return a syntax tree as lists, without what reaches no bit."""
    if isinstance(node, list):
        return [shape(each) for each in node if not isinstance(each, ast.Import | ast.ImportFrom)]
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Raise):
        return ["Raise"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return ["docstring"]
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return [type(node).__name__, *([name, shape(value)] for name, value in fields)]


def digest() -> str:
    return digest_of(sorted(digest_of(shape(tree(each))) for each in trained_with()))[:16]


def test_training_is_traced() -> None:
    found = {module.removeprefix("sisa.lm.") for module in trained_with()}
    assert {"train.stage", "train.losses", "base.adapter", "base.tokens", "base.numerics"} <= found


def test_words_reach_no_bit_and_numbers_may() -> None:
    one, other = (
        ast.parse(f'"""{word}."""\nx = 1  # {word}\nraise ValueError("{word}")') for word in "ab"
    )
    assert shape(one) == shape(other)
    assert shape(one) != shape(ast.parse('"""a."""\nx = 2\nraise ValueError("a")'))


def test_a_change_of_the_procedure_raises_its_version() -> None:
    assert (PROCEDURE_VERSION, digest()) == RECORDED, __doc__


if __name__ == "__main__":
    print((PROCEDURE_VERSION, digest()))
