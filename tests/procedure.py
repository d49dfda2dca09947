"""Record the code behind the version of the training procedure, to notice when it changes.

    python -m tests.pinned > before.txt    # on the code before the change
    python -m tests.pinned | diff before.txt -
    python -m tests.procedure --accept

Digests of weights can't be goldens, since they differ by processor. So the code itself is recorded: the
syntax trees of the modules that the trainer imports, without docstrings, comments and raised errors.
After a change there compare what `tests.pinned` prints. If it differs, raise PROCEDURE_VERSION. The last
command states that the version is right for the code.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from sisa.core.digest import digest_of
from sisa.lm.base.numerics import PROCEDURE_VERSION

ROOT = Path(__file__).resolve().parents[1]
TRAINER = "sisa.lm.train.trainer"
REACHES_NO_BIT = (
    # a base is named by its digest, however it was fetched
    *("sisa.lm.base.model_cache", "sisa.lm.base.packages"),
    *("sisa.core.errors", "sisa.core.events", "sisa.core.patches", "sisa.core.ports"),
    "sisa.core.requests",
)
RECORDED = (5, "f867fc59f6ffeede")


def path_of(module: str) -> Path:
    return (ROOT / module.replace(".", "/")).with_suffix(".py")


def tree(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


def trained_with() -> list[str]:
    """Return the modules of `sisa` that the trainer imports, directly or through others."""
    found, waiting = set[str](), [TRAINER]
    while waiting:
        module = waiting.pop()
        if (
            module in (*found, *REACHES_NO_BIT)
            or not module.startswith("sisa.")
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


def accept() -> None:
    """Write the present version and code into this file."""
    file = Path(__file__)
    recorded = f'RECORDED = ({PROCEDURE_VERSION}, "{digest()}")'
    text = re.sub(r"^RECORDED = .*$", recorded, file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--accept"]:
        accept()
    else:
        print(f"{(PROCEDURE_VERSION, digest())}; recorded: {RECORDED}")
