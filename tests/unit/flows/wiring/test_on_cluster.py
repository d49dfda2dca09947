"""`--address`: another cluster than the run file's, for one call, wherever something is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli import cli
from sisa.config.runfile import parse_run_file
from sisa.core.domain import BaseFiles, Chain
from sisa.core.errors import InvalidInput
from sisa.core.events import silent
from sisa.flows.chains import Site
from sisa.flows.wiring import executors, scratch_base, upper_houses
from sisa.flows.wiring.executors import OnCluster, check_executor, find_executor, open_patcher
from sisa.store.blobs.local_blobs import LocalBlobs
from tests.fakes.keyring import PLAIN

RUN_FILE = "{datasets: [{path: owner/people}], output_dir: model, cluster: {address: 'old:1'}}"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the options with which executors, patchers and trainers of bases are opened."""
    opened: list[Any] = []

    def load(name: str) -> Callable[..., None]:
        return lambda *arguments: opened.append((name, *arguments))

    monkeypatch.setattr(upper_houses, "load", load)
    return opened


def test_executors_patchers_and_bases_get_the_address(seen: list[Any], tmp_path: Path) -> None:
    there, here = OnCluster("ray", "new:2"), LocalBlobs(tmp_path)
    site = Site(here, here, BaseFiles(tmp_path, "b"), 1, PLAIN)
    config = parse_run_file(RUN_FILE, "run.yaml")
    options: Mapping[str, Any] = config.cluster.model_dump(mode="json")
    find_executor(there)(site, options)
    open_patcher(there, site, config)  # type: ignore[arg-type]
    scratch_base.find_base_trainer(there)(None, options, lambda _: None)  # type: ignore[arg-type]
    executor, patcher, base = seen
    assert (executor[0], patcher[0], base[0]) == (
        upper_houses.EXECUTORS["ray"],
        upper_houses.PATCHERS["ray"],
        upper_houses.BASE_TRAINERS["ray"],
    )
    assert executor[2] == {**options, "address": "new:2"}
    assert patcher[2].cluster.address == "new:2"
    assert base[2] == {**options, "address": "new:2"}
    assert config.cluster.address == options["address"] == "old:1"


def test_auto_makes_patches_and_bases_on_the_named_cluster(seen: list[Any]) -> None:
    there, config = OnCluster("auto", "new:2"), parse_run_file(RUN_FILE, "run.yaml")
    open_patcher(there, None, config)  # type: ignore[arg-type]
    scratch_base.find_base_trainer(there)(None, {}, lambda _: None)  # type: ignore[arg-type]
    (made, _, given), (trained, _, options, _) = seen
    assert (made, given.cluster.address) == (upper_houses.PATCHERS["ray"], "new:2")
    assert (trained, options) == (upper_houses.BASE_TRAINERS["ray"], {"address": "new:2"})


@pytest.mark.parametrize(
    ("num_chains", "address", "expected"),
    [(1, None, "serial"), (2, None, "ray"), (1, "old:1", "ray"), (2, "old:1", "ray")],
)
def test_a_single_chain_is_trained_in_this_process(
    num_chains: int, address: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here, ran = LocalBlobs(tmp_path), []

    def find(name: str) -> Any:
        return lambda *_: SimpleNamespace(run=lambda chains, *_: ran.append((name, len(chains))))

    opened = find_executor("auto")(
        Site(here, here, BaseFiles(tmp_path, "b"), 1, PLAIN), {"address": address}
    )
    monkeypatch.setattr(executors, "find_executor", find)
    opened.run([Chain(shard, (), None, ()) for shard in range(num_chains)], silent)
    assert ran == [(expected, num_chains)]


def test_an_unknown_name_is_refused_before_anything() -> None:
    with pytest.raises(InvalidInput, match="unknown executor"):
        check_executor(OnCluster("none", "new:2"))


@pytest.mark.parametrize(
    "arguments", [["--address", "http://h:8265"], ["--address", "h:1", "--executor", "serial"]]
)
def test_what_is_no_address_of_a_cluster(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", "run.yaml", *arguments]) == 2
    assert "error: --address" in capsys.readouterr().err
