"""The README's words hold: its commands run in order, its lists are complete, CI runs its test line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.cli.cli import cli, run
from sisa.config.config import keys
from sisa.data.samples import make_people, to_jsonl
from tests.fake_evaluated import write_made_up

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.S | re.M)


def test_ci_runs_the_second_command_word_for_word() -> None:
    install_and_run, install_and_test = (block.strip() for block in blocks("console")[:2])
    assert install_and_run.endswith("sisa quickstart")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1] == install_and_test


def test_every_key_of_the_run_file_is_explained() -> None:
    for key, info in keys().items():
        assert f"| `{key}` |" in README
        assert str(info.description) in README


def test_every_module_has_its_line_in_the_layout() -> None:
    tree = re.search(r"^```\n(sisa/.*?)^```$", README, re.S | re.M)
    assert tree is not None
    listed = {line.split()[0] for line in tree[1].splitlines()}
    tracked = subprocess.run(
        ["git", "ls-files", "sisa", "approx", "cluster"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {Path(each).name for each in tracked.stdout.split() if each.endswith(".py")}
    assert names - listed <= {"__init__.py"}


def examples() -> list[str]:
    (block,) = (each for each in blocks("console") if each.startswith("sisa init"))
    return block.strip().splitlines()


def test_every_command_has_an_example() -> None:
    shown = {shlex.split(line)[1] for line in examples()} | {"quickstart", "add", "eval"}
    assert shown == set(cli.commands)


@pytest.mark.torch
@pytest.mark.ray
@pytest.mark.slow
def test_the_examples_run_one_after_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_base: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for line in examples():
        assert run(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
        if line.startswith("sisa init"):
            _shrink(tmp_path / "my-model" / "run.yaml", tiny_base)
    rows = make_people(22, 5)[-10:]
    (tmp_path / "new.jsonl").write_text(to_jsonl(rows))
    assert run(["add", "-m", "my-model/model", "new.jsonl", "--json"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.rindex("\n{") :])["added"] == len(rows)
    write_made_up(tmp_path / "tofu")
    evaluation = ["eval", "tofu", "-m", "my-model/model", "--data", "tofu", "--split", "forget01"]
    assert run([*evaluation, "--max-new-tokens", "4"]) == 0


def _shrink(run_file: Path, base: Path) -> None:
    """The README's commands on a base of a few kilobytes."""
    chosen = yaml.safe_load(run_file.read_text())
    chosen |= {"base_model": str(base), "num_epochs": 1}
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
