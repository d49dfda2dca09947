"""The rules of the house: where things are, what every module documents, and what is never written.

Each test lists all offenders at once.
"""

from __future__ import annotations

import ast
import doctest
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import sisa
import sisa.__main__ as entry

ROOT = Path(__file__).resolve().parents[3]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("sisa", "approx", "cluster")
BENCHES = ("command", "deletion.serving", "tofu_full.design")
HEAVY = {"cluster.jobs.ray_jobs"}
TOP_LEVEL = {"pyproject.toml", "README.md", *PACKAGES, "tests", "notebooks"}
MAX_FUNCTION_LINES = 60
MAX_MODULES = 14  # of a folder
FORBIDDEN_WORDS = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
REGISTRIES = ("pypi" + ".org", "pythonhosted" + ".org", "npmjs" + ".org", "crates" + ".io")
MACHINE_PATHS = ("/wo" + "rk/", "/tm" + "p/w/")
PUBLIC_API = [
    *("Answer", "Busy", "ConfigConflict", "EnvironmentFault", "ForgetOutcome", "ForgetPlan"),
    *("IntegrityError", "InvalidInput", "Model", "OnCluster", "Part", "Record", "RejectedRequest"),
    *("RunConfig", "SisaError", "Status", "Terms", "TransientError", "UnknownRecord"),
    *("load_run_file", "open_model"),
    "train_model",
]


@cache
def tracked() -> tuple[Path, ...]:
    """Return the files that git tracks, and new ones that it does not ignore; skip without git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return tuple(path for line in done.stdout.splitlines() if (path := ROOT / line).is_file())


def modules(*packages: str) -> list[Path]:
    return sorted(path for each in packages for path in (ROOT / each).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def test_the_top_level_is_fixed() -> None:
    found = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {each for each in found if not each.startswith(".")} <= TOP_LEVEL
    assert TOP_LEVEL - {"README.md", "notebooks"} <= found


def test_every_module_says_what_it_is_for() -> None:
    every = modules(*PACKAGES, "tests")
    assert [relative(path) for path in every if not ast.get_docstring(parsed(path))] == []


def test_a_folder_that_lists_its_modules_lists_all() -> None:
    missing = set()
    for path in modules(*PACKAGES):
        text = ast.get_docstring(parsed(path)) or ""
        if path.name == "__init__.py" and re.search(r"^\w+ {2,}\w", text, re.MULTILINE):
            held = (each for each in modules(relative(path.parent)) if each.parent == path.parent)
            named = {"__init__", *re.findall(r"\w+", text)}
            missing |= {relative(each) for each in held if each.stem not in named}
    assert missing == set()


def test_what_tests_share_is_in_no_test_module() -> None:
    imported = {relative(path): {*absolute_imports(parsed(path))} for path in modules("tests")}
    tests = {relative(path)[:-3].replace("/", ".") for path in modules("tests") if "/test_" in str(path)}
    assert {path: names & tests for path, names in imported.items() if names & tests} == {}


def test_no_function_is_long() -> None:
    offenders = {}
    for path in modules(*PACKAGES):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_FUNCTION_LINES:
                    offenders[f"{relative(path)}:{node.name}"] = size
    assert offenders == {}


def test_a_folder_is_seen_at_a_glance() -> None:
    files = (path for path in modules(*PACKAGES, "tests") if path.stem != "conftest")
    held = Counter(path.parent for path in files)
    assert {relative(folder): count for folder, count in held.items() if count > MAX_MODULES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_one_name_is_one_thing(package: str) -> None:
    """No public name is defined at the top level of two modules of one house.

    alembic gives the names in revisions.
    """
    defined: dict[str, list[str]] = {}
    for path in modules(package):
        if path.parent.name == "versions":
            continue
        for name in set(public_names(parsed(path))):
            defined.setdefault(name, []).append(relative(path))
    assert {name: paths for name, paths in defined.items() if len(paths) > 1} == {}


def public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = [node.name]
        else:
            targets = getattr(node, "targets", None) or [getattr(node, "target", ast.Pass())]
            names = (each for target in targets for each in ast.walk(target))
            found = [e.id for e in names if isinstance(e, ast.Name) and isinstance(e.ctx, ast.Store)]
        yield from (name for name in found if not name.startswith("_"))


def test_a_name_in_a_tuple_is_seen() -> None:
    code = "A, (B, *C) = made[D] = 1, (2, 3)\nE: int = 4\n_F = G = 5\ndef H(): x = 6"
    assert list(public_names(ast.parse(code))) == ["A", "B", "C", "E", "G", "H"]


def test_no_module_has_a_name_that_says_nothing() -> None:
    offenders = [
        relative(path)
        for path in modules(*PACKAGES, "tests")
        if FORBIDDEN_WORDS & set(path.stem.removeprefix("test_").split("_"))
    ]
    assert offenders == []


def test_packages_are_imported_from_here() -> None:
    """PyPI has distributions of these names: what is imported must be what lies here."""
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert Path(str(spec.origin)) == ROOT / package / "__init__.py"


def test_the_public_api_is_pinned() -> None:
    assert sorted(sisa.__all__) == PUBLIC_API
    assert all(getattr(sisa, name) is not None for name in PUBLIC_API)


MAPS = ("sisa/README.md", "cluster/README.md", "cluster/serve/README.md")
FOLLOWED = {
    found
    for each in MAPS
    for found in re.findall(r"`(\S+\.py)`: `([\w.]+)`", (ROOT / each).read_text("utf-8"))
}


@pytest.mark.parametrize(("path", "name"), sorted(FOLLOWED))
def test_every_function_that_a_map_names_is_there(path: str, name: str) -> None:
    body = ast.parse((ROOT / path).read_text("utf-8")).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        (found,) = (each for each in body if isinstance(each, kinds) and each.name == part)
        body = found.body


def text_files() -> Iterator[tuple[str, str]]:
    for path in tracked():
        try:
            yield relative(path), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def test_no_registry_and_no_machine_is_named() -> None:
    """Registries are reached through their clients, and a path of one machine is wrong on the next."""
    words = (*REGISTRIES, *MACHINE_PATHS)
    offenders = [f"{name}: {word}" for name, text in text_files() for word in words if word in text]
    assert offenders == []


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the arguments by which a library runs code contained in data; ruff checks the rest."""
    for node in ast.walk(tree):
        for keyword in node.keywords if isinstance(node, ast.Call) else ():
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("allow_pickle", "trust_remote_code") and not off:
                yield keyword.value.lineno, f"{keyword.arg}="


def test_no_data_is_run_as_code() -> None:
    offenders = [
        f"{relative(path)}:{line}: {what}"
        for path in modules(*PACKAGES)
        for line, what in dangers(parsed(path))
    ]
    assert offenders == []


@pytest.mark.parametrize("code", ["np.load(path, allow_pickle=True)", "load(x, trust_remote_code=flag)"])
def test_the_scan_finds_what_it_looks_for(code: str) -> None:
    assert list(dangers(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "eval('1')", "exec(code)"),
        *("import os; os.system('ls')", "import subprocess; subprocess.run('ls', shell=True)"),
        *("import torch; torch.load(path)", "from torch import load"),
        *("import yaml; yaml.load(text)", "import yaml; yaml.unsafe_load(text)"),
    ],
)
def test_ruff_refuses_what_runs_data_as_code(code: str) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    command = [*ruff, "--stdin-filename", "sisa/x.py", "-"]
    found = subprocess.run(command, input=code, text=True, cwd=ROOT, capture_output=True)
    assert re.search(r": (S\d+|TID251) ", found.stdout), found.stdout


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def light_modules() -> list[str]:
    """Return modules that need no torch and no Ray."""
    names = ("core", "planning", "config", "data", "store", "flows", "audit", "evidence", "verifier")
    rooms = [f"sisa/{name}" for name in names]
    rooms += ["approx/benchmarks", "approx/metrics", "cluster/jobs"]
    found = [module_name(path) for path in modules(*rooms)]
    found += ["sisa.model", "sisa.train", "sisa.unlearn"]
    found += [f"sisa.lm.routing.{name}" for name in ("embedder", "route")]
    found += [
        f"sisa.lm.base.{name}" for name in ("model_cache", "numerics", "packages", "tokens", "weights")
    ]
    found += ["cluster.cli.cli", "cluster.cli.jobs", "cluster.render.result"]
    found += ["cluster.render.officer_report", "cluster.serve.service", "cluster.serve.tokens"]
    found += ["cluster.ray.scheduling"]
    found += [f"cluster.observe.{name}" for name in ("curves", "json_log", "ray_metrics", "reporting")]
    found += [f"approx.evaluation.{name}" for name in ("answer_score", "asking", "questions")]
    found += ["approx.evaluation.question_log"]
    found += [f"tests.bench.{name}" for name in BENCHES]
    return [name for name in found if name not in HEAVY]


def modules_with_examples() -> list[str]:
    found = modules(*PACKAGES, "tests/bench")
    return [module_name(path) for path in found if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize(
    "name",
    [
        name if name in light_modules() else pytest.param(name, marks=pytest.mark.torch)
        for name in modules_with_examples()
    ],
)
def test_examples_in_docstrings_hold(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_a_third_of_all_modules_have_examples() -> None:
    assert len(modules_with_examples()) >= len(modules(*PACKAGES)) // 3


def test_the_light_modules_are_light() -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "assert not {'torch', 'ray', 'peft', 'transformers'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *light_modules()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


TORCH = {"torch", "transformers", "peft", "ray"}
ARRAYS = {"numpy", "scipy", "pyarrow", "faiss", "rich", "datasets"}
MODELS = {"sqlalchemy", "pydantic", "yaml", "cryptography", "psutil"}


@pytest.mark.parametrize(
    ("code", "needless"),
    [
        ("import sisa", TORCH | ARRAYS | MODELS | {"click"}),
        ("from cluster.cli.cli import run; run(['--help'])", TORCH | ARRAYS | MODELS),
        ("from cluster.cli.cli import run; run(['forget', '--help'])", TORCH | ARRAYS | MODELS),
        ("import sisa.model", TORCH | ARRAYS),
    ],
)
def test_what_answers_at_once_imports_little(code: str, needless: set[str]) -> None:
    check = "import sys; print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, check=True
    )
    assert needless & {*done.stderr.split()} == set()


VERIFIER_IMPORTS = sys.stdlib_module_names | {"cryptography", "nacl"}
MAX_VERIFIER_LINES = 600  # of code


def test_the_verifier_can_be_read_in_an_hour_and_stands_alone() -> None:
    files = modules("sisa/verifier")
    assert sum(num_code_lines(path) for path in files) < MAX_VERIFIER_LINES
    imported = {name for path in files for name in absolute_imports(parsed(path))}
    foreign = {name for name in imported if name.split(".")[0] not in VERIFIER_IMPORTS}
    assert {name for name in foreign if not f"{name}.".startswith("sisa.verifier.")} == set()


def num_code_lines(path: Path) -> int:
    """Return the number of lines of code: without docstrings, comments and empty lines."""
    source = path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    prose = {line for each in docstrings for line in range(each.lineno, (each.end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return sum(bool(line) and line[0] != "#" and at not in prose for at, line in lines)


def absolute_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_the_console_script_and_python_m_are_one() -> None:
    assert pkgutil.resolve_name(DECLARED["project"]["scripts"]["sisa"]) is entry.main


def test_every_package_is_listed() -> None:
    """A package that is not in `tool.setuptools.packages` is missing from the wheel."""
    listed = DECLARED["tool"]["setuptools"]["packages"]
    found = {relative(path.parent).replace("/", ".") for path in modules(*PACKAGES)}
    assert found == set(listed)


def code_of(notebook: Path) -> ast.Module:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source = "".join(
        line for each in cells if each["cell_type"] == "code" for line in [*each["source"], "\n"]
    )
    return ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.MULTILINE), notebook.name)


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_uses_names_that_exist(notebook: Path) -> None:
    """A renamed function shows here in seconds, and not in minutes when the notebook runs."""
    nodes, known, absent = list(ast.walk(code_of(notebook))), {}, []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
            for each in node.names:
                known[each.asname or each.name] = pkgutil.resolve_name(f"{node.module}.{each.name}")
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
                absent.append(f"{node.value.id}.{node.attr}")
    assert absent == []


IMPORT = re.compile(r"^from ((?:sisa|approx|cluster)[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def test_programs_in_tests_import_what_exists() -> None:
    """A program that a test or a benchmark starts is text, which no type checker reads."""
    texts = [
        (path, node.value)
        for path in modules("tests")
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    absent = []
    for path, text in texts:
        for module, names in IMPORT.findall(text):
            for name in names.split(", "):
                try:
                    pkgutil.resolve_name(f"{module}.{name}")
                except (ImportError, AttributeError):
                    absent.append(f"{relative(path)}: {module}.{name}")
    assert absent == []
