"""A user's own `cluster.py`, and other packages of our names, are found before anything is imported."""

from __future__ import annotations

import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sisa.config.config import RunConfig
from sisa.core.errors import EnvironmentFault
from sisa.evidence.hook import EvidenceHook
from sisa.flows.wiring import upper_houses
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.flows.wiring.upper_houses import ROOT, check_upper_houses
from sisa.flows.wiring.wiring import EVIDENCE, evidence_hooks

FOREIGN = "raise SystemExit('a foreign module was imported')\n"


def sisa(*arguments: str, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sisa", *arguments],
        cwd=cwd,
        env={"PYTHONPATH": ":".join(map(str, path)), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["cluster.py", "approx/__init__.py"])
@pytest.mark.parametrize("where", ["cwd", "PYTHONPATH"])
def test_a_foreign_module_is_named_at_once(name: str, where: str, tmp_path: Path) -> None:
    foreign, other = tmp_path / "mine" / name, tmp_path / "other"
    other.mkdir()
    foreign.parent.mkdir(parents=True)
    foreign.write_text(FOREIGN)
    on_path = [tmp_path / "mine"] if where == "PYTHONPATH" else []
    cwd = tmp_path / "mine" if where == "cwd" else other
    done = sisa("train", "run.yaml", "--json", cwd=cwd, path=[*on_path, ROOT])
    fault = json.loads(done.stdout)["error"]
    assert (done.returncode, fault["type"]) == (6, "EnvironmentFault")
    assert fault["where"] == str(foreign)
    assert str(ROOT) in fault["expected"]
    assert "rename" in fault["next_step"]
    assert f"where: {foreign}" in done.stderr


def test_python_m_sisa_is_the_command(tmp_path: Path) -> None:
    done = sisa("nothing", cwd=tmp_path, path=[ROOT])
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'nothing'" in done.stderr


def test_every_name_can_be_loaded() -> None:
    names = [upper_houses.COMMAND, upper_houses.PROBE]
    for each in (upper_houses.EXECUTORS, upper_houses.PATCHERS, upper_houses.BASE_TRAINERS):
        names += each.values()
    for name in names:
        module, _, attribute = name.partition(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert f"def {attribute}(" in source or f"class {attribute}(" in source, name
    assert upper_houses.load(upper_houses.COMMAND) is pkgutil.resolve_name(upper_houses.COMMAND)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return another installation, without the modules that this process has loaded."""
    for name in upper_houses.UPPER_HOUSES:
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / name / "__init__.py", tmp_path / name)
        for held in [each for each in sys.modules if each.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, held)
    monkeypatch.setattr(upper_houses, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_distribution_that_wrote_over_ours_is_found(installed: Path) -> None:
    check_upper_houses()
    (installed / "cluster" / "__init__.py").write_text('"""Clustering algorithms."""\n')
    with pytest.raises(EnvironmentFault, match="hides `cluster`") as caught:
        check_upper_houses()
    assert "pip uninstall cluster" in caught.value.next_step


def test_another_search_path_may_lack_ours_and_not_hide_it(tmp_path: Path) -> None:
    check_upper_houses([str(tmp_path), str(ROOT)])
    check_upper_houses([str(tmp_path)])
    (tmp_path / "cluster.py").write_text(FOREIGN)
    with pytest.raises(EnvironmentFault) as caught:
        check_upper_houses([str(tmp_path), str(ROOT)])
    assert caught.value.where == str(tmp_path / "cluster.py")


def test_the_hook_of_certificates_is_loaded_for_models_with_evidence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    settings = {"datasets": [{"path": "rows.jsonl"}], "output_dir": "model"}
    config, model = RunConfig.model_validate(settings), "0f" * 16
    assert evidence_hooks(tmp_path, config, model) == ()
    evidence_keys_dir(config, model).mkdir(parents=True)
    assert [type(each) for each in evidence_hooks(tmp_path, config, model)] == [EvidenceHook]
    evidence_keys_dir(config, model).rmdir()
    (tmp_path / EVIDENCE).touch()  # keys that are missing must not go unnoticed
    assert [type(each) for each in evidence_hooks(tmp_path, config, model)] == [EvidenceHook]
