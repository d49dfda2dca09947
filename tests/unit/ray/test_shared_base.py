"""Sending a base: the files arrive whole and checked, or nothing is left; no Ray is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.ray.shared_base import (
    BaseManifest,
    Block,
    cached_base,
    holds_base,
    list_base,
    read_blocks,
    write_base,
)
from sisa.core.domain import BaseFiles
from sisa.core.errors import EnvironmentFault, IntegrityError

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 40, "merges.txt": b""}


@pytest.fixture
def base_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    for name, data in FILES.items():
        (directory / name).write_bytes(data)
    (directory / ".cache").mkdir()
    (directory / ".gitattributes").write_text("not a part of the model")
    return directory


@pytest.fixture
def manifest(base_dir: Path) -> BaseManifest:
    return list_base(BaseFiles(base_dir, "d1"))


class Source:
    """Provide blocks of a directory, and count how often each file was read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[str] = []

    def __call__(self, name: str) -> Iterable[Block]:
        self.asked.append(name)
        return read_blocks(self.directory / name, block_bytes=1000)


def test_lists_the_files_that_make_the_base(manifest: BaseManifest) -> None:
    assert [file.name for file in manifest.files] == sorted(FILES)
    assert [file.num_bytes for file in manifest.files] == [2, 0, 10_240]


@pytest.mark.parametrize("missing", [True, False])
def test_no_base_to_list(tmp_path: Path, missing: bool) -> None:
    if not missing:
        (tmp_path / "gone").mkdir()
    with pytest.raises(EnvironmentFault):
        list_base(BaseFiles(tmp_path / "gone", "d1"))


def test_blocks_are_the_file(base_dir: Path) -> None:
    blocks = list(read_blocks(base_dir / "model.safetensors", block_bytes=1000))
    assert b"".join(block.tobytes() for block in blocks) == FILES["model.safetensors"]
    assert {type(block).__name__ for block in blocks} == {"ndarray"}
    assert list(read_blocks(base_dir / "merges.txt")) == []


def test_a_carried_base_is_the_base(base_dir: Path, manifest: BaseManifest, tmp_path: Path) -> None:
    carried = write_base(tmp_path / "cache", manifest, Source(base_dir))
    assert carried == cached_base(tmp_path / "cache", "d1")
    assert {path.name: path.read_bytes() for path in carried.iterdir()} == FILES
    assert holds_base(carried, manifest)


def test_a_held_base_is_not_carried_again(
    base_dir: Path, manifest: BaseManifest, tmp_path: Path
) -> None:
    write_base(tmp_path, manifest, Source(base_dir))
    source = Source(base_dir)
    write_base(tmp_path, manifest, source)
    assert source.asked == []


@pytest.mark.parametrize("data", [b"", b"x" * 10_240])
def test_a_copy_with_other_bytes_is_replaced(
    base_dir: Path, manifest: BaseManifest, tmp_path: Path, data: bytes
) -> None:
    carried = write_base(tmp_path, manifest, Source(base_dir))
    (carried / "model.safetensors").write_bytes(data)
    assert not holds_base(carried, manifest)
    write_base(tmp_path, manifest, Source(base_dir))
    assert holds_base(carried, manifest)


def test_a_changed_arrival_is_refused_and_leaves_nothing(
    base_dir: Path, manifest: BaseManifest, tmp_path: Path
) -> None:
    (base_dir / "model.safetensors").write_bytes(b"y" * 10_240)
    with pytest.raises(IntegrityError) as caught:
        write_base(tmp_path / "cache", manifest, Source(base_dir))
    assert caught.value.where == "model.safetensors"
    assert [path.name for path in (tmp_path / "cache" / "base").iterdir()] == [".d1.lock"]


def test_a_cache_that_cannot_be_written(base_dir: Path, manifest: BaseManifest, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(EnvironmentFault) as caught:
        write_base(tmp_path / "cache", manifest, Source(base_dir))
    assert "SISA_CACHE" in caught.value.next_step


def test_of_two_workers_on_a_node_one_writes(
    base_dir: Path, manifest: BaseManifest, tmp_path: Path
) -> None:
    source = Source(base_dir)
    threads = [threading.Thread(target=write_base, args=(tmp_path, manifest, source)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(source.asked) == sorted(FILES)
