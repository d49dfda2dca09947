"""The notebooks run to their ends on tiny bases, and show what they say.

What is committed holds no outputs and defines nothing: it calls the library. The first one runs in a
kernel, a process of its own, so that its warnings are its own; it gets its folder, its base and nothing
else from here. The cells of the others run in this process, which has torch already.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIRST, CHOOSE, ROUTING, BASE, AUDITOR = NOTEBOOKS
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
MACHINE_PATHS = re.compile(r"(?<![\w.])/(home|root|tmp|work|usr|Users|mnt|opt|var)\b|[A-Z]:\\\\|\.venv")
MAGIC = re.compile(r"^%.*$", re.MULTILINE)
TIMEOUT_S = 300

all_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    import nbformat

    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


@all_notebooks
def test_what_is_committed_is_valid_and_bare(path: Path) -> None:
    import nbformat

    book = read(path)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(book))
    assert all(not cell.metadata for cell in book.cells)
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert not MACHINE_PATHS.search(path.read_text(encoding="utf-8"))
    assert f"]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


@all_notebooks
def test_the_notebook_defines_nothing(path: Path) -> None:
    for cell in code_cells(read(path)):
        tree = ast.parse(MAGIC.sub("", cell.source))
        assert not [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)], cell.source


@pytest.mark.torch
@pytest.mark.slow
def test_the_first_notebook_runs_to_its_end(
    smallest_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SISA_NOTEBOOK_BASE", str(smallest_base))
    monkeypatch.setenv("SISA_NOTEBOOK_EXECUTOR", "serial")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    book = read(FIRST)
    execute(book, tmp_path)
    outputs = {cell.id: cell.outputs for cell in code_cells(book)}
    pictures = [
        cell for cell, made in outputs.items() if any("image/png" in o.get("data", {}) for o in made)
    ]
    assert pictures == ["picture-before", "picture-after"]
    assert re.search(r"\bletter-1  \(of p\d+\)$", printed(outputs["find-like"]).split("\n")[0])
    assert "deleted 6 records exactly" in printed(outputs["forget"])
    proofs = re.findall(r"^shard \d: .*$", printed(outputs["verify"]), re.MULTILINE)
    assert len(proofs) == 5  # one of the four shards once more, stage by stage
    assert all(re.search("equal, byte for byte|the shard holds no records", each) for each in proofs)
    assert printed(outputs["verify"]).endswith("ok\n")
    assert printed(outputs["where-deleted"]).count("deleted at") == 6
    assert "95 records, 6 deleted" in printed(outputs["status"])
    assert not list(tmp_path.glob("tmp*")), "it cleans up after itself"


def execute(book: Any, folder: Path) -> None:
    """Run all cells in a fresh kernel of this very Python."""
    from nbclient import NotebookClient

    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=TIMEOUT_S, kernel_name="python3", resources=resources)
    client.execute()


def printed(outputs: list[Any]) -> str:
    return "".join(each.text for each in outputs if each.get("name") == "stdout")


Cells = dict[str, tuple[str, Any]]  # by their ids: what a cell printed, and the value of its last line


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Path], Cells]]:
    """Run a notebook's cells in this process, in a folder of the test's own."""
    from matplotlib import pyplot

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(pyplot, "show", lambda: print(f"{len(pyplot.get_fignums())} figures"))

    def run(path: Path) -> Cells:
        names: dict[str, Any] = {}
        found: Cells = {}
        for cell in code_cells(read(path)):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                value = run_cell(MAGIC.sub("", cell.source), names)
            found[cell.id] = printed.getvalue(), value
            pyplot.close("all")
        return found

    yield run
    assert not list(tmp_path.glob("tmp*")), "it cleans up after itself"


def run_cell(code: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, where that is an expression."""
    body = ast.parse(code).body
    last = body[-1] if body else None
    before = body[:-1] if isinstance(last, ast.Expr) else body
    exec(compile(ast.Module(before, []), "cell", "exec"), names)  # noqa: S102 - our own notebook
    if isinstance(last, ast.Expr):
        return eval(compile(ast.Expression(last.value), "cell", "eval"), names)  # noqa: S307
    return None


def test_prices_of_deletions_follow_from_the_layout(run_here: Callable[[Path], Cells]) -> None:
    cells = run_here(CHOOSE)
    assert cells["advice"][0].startswith("recommended: 64 shards x ")
    assert cells["choices"][1].axes
    closed, counted = zip(*(map(float, each) for each in prices(cells["prices"][0])), strict=True)
    assert counted == pytest.approx(closed, rel=0.05)
    assert sorted(counted, reverse=True) == list(counted)
    without, banded = (float(each) for each in re.findall(r"0\.\d+(?= of)", cells["bands"][0]))
    assert banded < 0.9 * without
    runs = [float(each) for each in re.findall(r": (\S+) trainings", cells["batch"][0])]
    assert sorted(runs, reverse=True) == runs
    assert '"shards": 64' in cells["write"][0]


def prices(text: str) -> list[tuple[str, str]]:
    """Return the prices of each layout, by the closed form and by the count."""
    return re.findall(r"^\d+ x \d+ +(\S+) +(\S+)$", text, re.MULTILINE)


@pytest.mark.torch
@pytest.mark.slow
def test_questions_reach_their_shard_or_the_base(
    run_here: Callable[[Path], Cells], smallest_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SISA_NOTEBOOK_BASE", str(smallest_base))
    monkeypatch.setenv("SISA_NOTEBOOK_EXECUTOR", "serial")
    cells = run_here(ROUTING)
    assert cells["routes"][0].startswith("40 of 40 held questions")
    assert [line.endswith("the base alone") for line in lines(cells, "other-words")] == [False] * 3 + [
        True
    ] * 2
    assert cells["conversation"][1] is True
    loosest, auto, *_ = lines(cells, "scores")
    assert "about strangers: 0%" in auto
    assert "held, as asked: 100%" in auto
    assert "about strangers: 0%" not in loosest
    assert all(", 0 slices trained" in line for line in lines(cells, "scores"))
    assert [line.split()[0] for line in lines(cells, "together") if "shards (" in line] == [
        *("routed", "mean_prob", "merged")
    ]
    assert all(line.endswith("the base alone") for line in lines(cells, "orphans")[-4:])
    assert "4 questions go to strangers" in cells["orphans-lowered"][0]
    assert "turned_away=0" in cells["held"][0]


def lines(cells: Cells, name: str) -> list[str]:
    return cells[name][0].strip().splitlines()


@pytest.mark.torch
@pytest.mark.slow
def test_what_the_base_knew_is_noticed_and_less_is_said(run_here: Callable[[Path], Cells]) -> None:
    cells = run_here(BASE)
    assert "3 of 18 records share their text with the corpus" in cells["guard"][0]
    known = [int(each) for each in re.findall(r"base alone: (\d) of 3", cells["probe"][0])]
    assert known == [3, 0, 0, 0, 0, 0]
    assert "base alone: 3 of 3 probed records" in cells["forget"][0]
    assert "consent: letter of 3 May, case 17" in cells["vault"][0]
    assert "held, encrypted" in cells["vault"][0]
    for name in ("patch", "again"):
        assert cells[name][0].startswith("approximate: patch")
        assert "an estimate, not a proof" in cells[name][0]
    assert "still known: 0 of 3 probed texts (before: 3): forgotten" in cells["again"][0]
    assert "1 set erased from the vault" in cells["again"][0]
    assert len(lines(cells, "limits-of")) > 3
    assert "texts to forget, erased" in cells["after"][0]


@pytest.mark.torch
@pytest.mark.slow
def test_an_auditor_checks_a_deletion_without_the_model(run_here: Callable[[Path], Cells]) -> None:
    cells = run_here(AUDITOR)
    assert "torch loaded: False" in cells["check"][0]
    assert "exit code 0" in cells["check"][0]
    assert "remaining  14 records" in cells["verify"][0]
    assert "named: []" in cells["covers"][0]
    for name, number in (("forged", 5), ("denied", 3)):
        assert cells[name][0].count(":\n    ") == number
        assert "NOT CAUGHT" not in cells[name][0]
    absent, present = lines(cells, "absence")
    assert "is not there" in absent
    assert "'shard':" in present
    assert lines(cells, "chain") == lines(cells, "tree") == ["1 figures"]
    assert [line.rpartition(" ")[2] for line in lines(cells, "kept")] == ["True", "False", "False"]
