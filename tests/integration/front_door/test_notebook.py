"""The notebook runs to its end on a tiny base, and proves what it says.

What is committed holds no outputs and defines nothing: it calls the library. The kernel is a process of
its own, so that its warnings are its own; it gets its folder, its base and nothing else from here.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[3] / "notebooks" / "01_train_find_forget_prove.ipynb"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
MACHINE_PATHS = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|Users|mnt|opt|var)\b|[A-Z]:\\\\|\.venv")
MAGIC = re.compile(r"^%.*$", re.MULTILINE)
TIMEOUT_S = 300

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture
def book() -> Any:
    import nbformat

    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def test_what_is_committed_is_valid_and_bare(book: Any) -> None:
    import nbformat

    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(book))
    assert all(not cell.metadata for cell in book.cells)
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert not MACHINE_PATHS.search(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_notebook_defines_nothing(book: Any) -> None:
    for cell in code_cells(book):
        tree = ast.parse(MAGIC.sub("", cell.source))
        assert not [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)], cell.source


def test_the_notebook_runs_to_its_end(
    book: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SISA_NOTEBOOK_BASE", str(tiny_base))
    monkeypatch.setenv("SISA_NOTEBOOK_EXECUTOR", "serial")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    execute(book, tmp_path)
    outputs = {cell.id: cell.outputs for cell in code_cells(book)}
    pictures = [
        cell for cell, made in outputs.items() if any("image/png" in o.get("data", {}) for o in made)
    ]
    assert pictures == ["picture-before", "picture-after"]
    assert re.search(r"\bletter-1  \(of p\d+\)$", said(outputs["find-like"]).split("\n")[0])
    assert "deleted 6 records exactly" in said(outputs["forget"])
    proofs = re.findall(r"^shard \d: .*$", said(outputs["verify"]), re.MULTILINE)
    assert len(proofs) == 5  # one of the four shards once more, stage by stage
    assert all(re.search("equal, byte for byte|the shard holds no records", each) for each in proofs)
    assert said(outputs["verify"]).endswith("ok\n")
    assert said(outputs["where-deleted"]).count("deleted at") == 6
    assert "95 records, 6 deleted" in said(outputs["status"])
    assert not list(tmp_path.glob("tmp*")), "it cleans up after itself"


def execute(book: Any, folder: Path) -> None:
    """Run all cells in a fresh kernel of this very Python."""
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=TIMEOUT_S, kernel_name="python3", resources=resources)
    client.execute()


def said(outputs: list[Any]) -> str:
    return "".join(each.text for each in outputs if each.get("name") == "stdout")
