"""The READMEs are true: commands run in order, lists are complete, links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.cli.cli import cli, run
from cluster.cli.quickstart import Story
from sisa.data.samples import make_people, to_jsonl
from tests.fakes.benchmarks import write_made_up

ROOT = Path(__file__).resolve().parents[3]
HOUSES = ("sisa", "approx", "cluster")
FOLDERS = (*HOUSES, "tests", "notebooks")
READMES = [path for top in FOLDERS for path in sorted((ROOT / top).rglob("README.md"))]
MAX_FRONT_LINES = 250


def words(path: str = "README.md") -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def blocks(kind: str, path: str = "README.md") -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", words(path), re.S | re.M)


def rooms(house: str) -> list[str]:
    folders = {path.parent.relative_to(ROOT / house) for path in (ROOT / house).rglob("*.py")}
    return sorted(each.as_posix() for each in folders if each != Path())


def test_the_front_page_is_short() -> None:
    assert len(words().splitlines()) <= MAX_FRONT_LINES


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *READMES], ids=lambda each: each.relative_to(ROOT).as_posix()
)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    lost = []
    text = path.read_text(encoding="utf-8")
    for place, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        target = path.parent / place if place else path
        if "://" in place or not (place or anchor):
            continue
        if not target.exists() or (anchor and anchor not in headings(target)):
            lost.append((place, anchor))
    assert lost == []


def test_the_map_of_the_tests_names_files_that_are_there() -> None:
    named = re.findall(r"`(?:tests/)?([\w*/]+\.py)`", words("tests/README.md"))
    assert len(named) > 50
    assert [each for each in named if not any((ROOT / "tests").rglob(each))] == []


def headings(path: Path) -> set[str]:
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in found}


@pytest.mark.parametrize("house", HOUSES)
def test_every_room_is_on_the_map(house: str) -> None:
    text = words(f"{house}/README.md")
    deep = [each for each in rooms(house) if f"| `{each}/` |" not in text]
    assert [each for each in deep if any((ROOT / house / each).glob("[!_]*.py"))] == []


def test_ci_runs_the_second_command_word_for_word() -> None:
    install_and_run, install_and_test = (block.strip() for block in blocks("console")[:2])
    assert install_and_run.endswith("sisa quickstart")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == install_and_test


def test_the_front_page_shows_the_quickstart_as_it_ends() -> None:
    (shown,) = blocks("text")
    labels = [line[:10] for line in Story().summary()]
    assert labels == [line[:10] for line in shown.splitlines()]
    assert "equal, byte for byte" in shown


def examples() -> list[str]:
    (block,) = (each for each in blocks("console", "cluster/README.md") if each.startswith("sisa init"))
    return block.strip().splitlines()


def test_the_daily_commands_are_among_the_examples() -> None:
    (block,) = (each for each in blocks("console") if each.startswith("sisa init"))
    known = [shlex.split(line, comments=True) for line in examples()]
    daily = [shlex.split(line, comments=True) for line in block.strip().splitlines()]
    assert [each for each in daily if each not in known] == []


def test_every_command_has_an_example() -> None:
    shown = {shlex.split(line)[1] for line in examples()} | {"quickstart", "add", "eval", "rebuild"}
    assert shown == set(cli.commands)


@pytest.mark.torch
@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_run_one_after_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    smallest_base: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in examples():
        assert run(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
        if line.startswith("sisa init"):
            _shrink(tmp_path / "my-model" / "run.yaml", smallest_base)
    rows = make_people(22, 5)[-10:]
    (tmp_path / "new.jsonl").write_text(to_jsonl(rows))
    assert run(["add", "-m", "my-model/model", "new.jsonl", "--json"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.rindex("\n{") :])["added"] == len(rows)
    write_made_up(tmp_path / "tofu")
    evaluation = ["eval", "tofu", "-m", "my-model/model", "--data", "tofu", "--split", "forget01"]
    assert run([*evaluation, "--max-new-tokens", "4"]) == 0


def _shrink(run_file: Path, base: Path) -> None:
    """Let the README's commands use a base of a few kilobytes, and correct one of its records."""
    rows = [json.loads(line) for line in (run_file.parent / "people.jsonl").read_text().splitlines()]
    corrected = [{**row, "completion": "Corrected."} for row in rows if row["id"] == "p006-q1"]
    (run_file.parent / "corrected.jsonl").write_text(to_jsonl(corrected))
    chosen = yaml.safe_load(run_file.read_text())
    chosen |= {"base_model": str(base), "num_epochs": 1, "cluster": {"num_workers": 1}}
    run_file.write_text(yaml.safe_dump(chosen))


@pytest.mark.torch
def test_the_python_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "people.jsonl").write_text(to_jsonl(make_people(6, 3)))
    (tmp_path / "run.yaml").write_text(
        f"base_model: {tiny_base}\n"
        "datasets: [{path: people.jsonl}]\noutput_dir: model\nnum_epochs: 1\n"
    )
    (code,) = (block for block in blocks("python") if "import sisa" in block)
    serial = code.replace('train_model("run.yaml")', 'train_model("run.yaml", executor="serial")')
    assert serial != code
    exec(compile(serial, "README.md", "exec"), {})  # noqa: S102 - our own README
