"""Test the contract of ExportStore over the fake and directories.

An export is in a directory of the owner's choice. Only written files are erased, and only while they are
unchanged, because the path comes from a ledger that may be damaged or forged.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from sisa.core.checkpoint_files import ADAPTER_FILE, CONFIG_FILE, MANIFEST_FILE
from sisa.core.digest import sha256_hex
from sisa.core.domain import Export
from sisa.core.errors import EnvironmentFault
from sisa.core.ports import ExportStore
from sisa.store.exports import CARD, SIGNATURE, DirectoryExports
from tests.fakes.ports import FakeExports

CONTENT = {ADAPTER_FILE: b"adapter", CONFIG_FILE: b"{}"}


def export(path: Path | str, state: str = "tainted") -> Export:
    found = Export(str(path), 0, (0, 1), 2, "key", sha256_hex(CONTENT[ADAPTER_FILE]), "2026-01-01")
    return replace(found, state=state)  # type: ignore[arg-type]


@pytest.fixture(params=["fake", "directories"])
def store(request: pytest.FixtureRequest) -> ExportStore:
    return FakeExports() if request.param == "fake" else DirectoryExports()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path.resolve() / "out" / "shard-00000"


def test_what_was_written_is_held_until_it_is_erased(store: ExportStore, place: Path) -> None:
    assert store.standing(export(place)) == "gone"
    store.write(str(place), CONTENT)
    assert store.standing(export(place)) == "held"
    assert store.erase(export(place))
    assert store.standing(export(place)) == "gone"


def test_a_second_export_stays(store: ExportStore, place: Path) -> None:
    store.write(str(place), CONTENT)
    store.write(str(place.with_name("other")), CONTENT)
    assert store.erase(export(place))
    assert store.standing(export(place.with_name("other"))) == "held"


def test_what_is_gone_was_erased_only_if_that_was_begun(store: ExportStore, place: Path) -> None:
    assert not store.erase(export(place))
    assert store.erase(export(place, "erasing"))


def test_what_was_changed_is_left_alone(store: ExportStore, place: Path) -> None:
    store.write(str(place), {**CONTENT, ADAPTER_FILE: b"another"})
    assert store.standing(export(place)) == "changed"
    for state in ("tainted", "erasing"):
        assert not store.erase(export(place, state))
        assert store.standing(export(place)) == "changed"


@pytest.fixture
def directories() -> DirectoryExports:
    return DirectoryExports()


def test_the_directory_goes_when_it_is_empty(directories: DirectoryExports, place: Path) -> None:
    directories.write(str(place), {**CONTENT, CARD: b"# a card", SIGNATURE: b"{}"})
    assert directories.erase(export(place))
    assert place.parent.is_dir()
    assert not place.exists()


def test_other_files_stay(directories: DirectoryExports, place: Path) -> None:
    directories.write(str(place), {**CONTENT, "NOTES.md": b"mine"})
    (place / "folder").mkdir()
    (place / "folder" / ADAPTER_FILE).write_bytes(CONTENT[ADAPTER_FILE])
    assert directories.erase(export(place))
    assert sorted(os.listdir(place)) == ["NOTES.md", "folder"]
    assert (place / "folder" / ADAPTER_FILE).exists()


@pytest.mark.parametrize("left", [[CONFIG_FILE], [ADAPTER_FILE], [ADAPTER_FILE, CONFIG_FILE], []])
def test_an_erasure_that_was_cut_short_is_finished(
    directories: DirectoryExports, place: Path, left: list[str]
) -> None:
    directories.write(str(place), {name: CONTENT[name] for name in left})
    assert directories.erase(export(place, "erasing"))
    assert not place.exists()


def test_a_moved_adapter_is_not_taken_for_an_erased_one(
    directories: DirectoryExports, place: Path
) -> None:
    directories.write(str(place), CONTENT)
    (place / ADAPTER_FILE).rename(place.parent / "mine")
    assert not directories.erase(export(place))
    assert (place / CONFIG_FILE).exists()


def test_no_link_is_followed(directories: DirectoryExports, place: Path, tmp_path: Path) -> None:
    """Neither in the path, nor at its end, nor in place of the files."""
    directories.write(str(place), CONTENT)
    link = tmp_path / "link"
    link.symlink_to(place)
    above = tmp_path / "above"
    above.symlink_to(place.parent)
    files = tmp_path / "files"
    files.mkdir()
    for name in CONTENT:
        (files / name).symlink_to(place / name)
    for path in (link, above / place.name, files):
        assert not directories.erase(export(path))
        assert directories.standing(export(path)) in ("gone", "changed")
    assert {name: (place / name).read_bytes() for name in CONTENT} == CONTENT


def test_a_linked_configuration_stays(
    directories: DirectoryExports, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    directories.write(str(place), {ADAPTER_FILE: CONTENT[ADAPTER_FILE]})
    (place / CONFIG_FILE).symlink_to(tmp_path / "precious")
    assert directories.erase(export(place))
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert os.listdir(place) == [CONFIG_FILE]


@pytest.mark.parametrize("name", [ADAPTER_FILE, CONFIG_FILE])
def test_a_directory_or_a_pipe_of_that_name_stays(
    directories: DirectoryExports, place: Path, name: str
) -> None:
    for make in (os.mkdir, os.mkfifo):
        rest = {each: data for each, data in CONTENT.items() if each != name}
        directories.write(str(place), rest)
        make(place / name)
        assert directories.erase(export(place)) is (name == CONFIG_FILE)
        assert (place / name).exists()
        (os.rmdir if make is os.mkdir else os.unlink)(place / name)
        for each in rest:
            (place / each).unlink(missing_ok=True)
        place.rmdir()


@pytest.mark.parametrize(
    "path", ["", "/", "relative", "/a/../b", "/a//b", "/a/./b", "/a/", "/nul\0", "//", "/.."]
)
def test_odd_paths_lead_nowhere(directories: DirectoryExports, path: str) -> None:
    assert directories.standing(export(path)) == "gone"
    assert not directories.erase(export(path))


def test_a_path_with_dots_does_not_lead_to_an_export(directories: DirectoryExports, place: Path) -> None:
    directories.write(str(place), CONTENT)
    for path in (f"{place}/../{place.name}", f"{place}/", f"{place.parent}//{place.name}"):
        assert not directories.erase(export(path))
    assert directories.standing(export(place)) == "held"


def test_a_checkpoint_is_no_export(directories: DirectoryExports, place: Path) -> None:
    directories.write(str(place), {**CONTENT, MANIFEST_FILE: b"{}"})
    assert not directories.erase(export(place))
    assert not directories.erase(export(place, "erasing"))
    assert sorted(os.listdir(place)) == sorted([*CONTENT, MANIFEST_FILE])


def test_a_disk_that_refuses_is_an_environment_fault(
    directories: DirectoryExports, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    directories.write(str(place), CONTENT)
    monkeypatch.setattr(os, "unlink", refuses)
    with pytest.raises(EnvironmentFault):
        directories.erase(export(place))
    assert directories.standing(export(place)) == "held"
