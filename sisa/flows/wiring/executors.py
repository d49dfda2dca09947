"""Find what computes, by name: executors that train, patchers, and the probe of the base.

Those that use Ray or are approximate belong to upper packages (`upper_houses.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sisa.config.config import RunConfig
from sisa.core import ports
from sisa.core.domain import BaseFiles, Chain
from sisa.core.errors import InvalidInput
from sisa.core.events import Report, silent
from sisa.flows.chains import SerialExecutor, Site
from sisa.flows.wiring import upper_houses
from sisa.store import areas
from sisa.store.checkpoints import FileCheckpoints
from sisa.store.hidden_states import FileHiddenStates
from sisa.store.records import FileRecords

OpenExecutor = Callable[[Site, Mapping[str, Any]], ports.Executor]
# of the base, and of the files of the patches on it, lowest first
OpenProbe = Callable[[BaseFiles, RunConfig, Sequence[Mapping[str, bytes]]], ports.Probe]


def open_serial(site: Site, options: Mapping[str, Any]) -> ports.Executor:
    """Return an executor that trains chains in this process."""
    return SerialExecutor(open_trainer(site), *open_stores(site), options.get("lanes", 1))


def open_trainer(site: Site) -> ports.Trainer:
    """Return the trainer on a site's base, under the patches to train over. Raise IntegrityError."""
    from sisa.lm.train.trainer import LoraTrainer

    store = FileCheckpoints(site.patches_at, site.keyring, areas.PATCHES)
    patches = [store.load(key, manifest) for key, manifest in site.patches]
    hidden_states = FileHiddenStates(site.hidden_states_at, site.keyring)
    return LoraTrainer(
        site.base,
        site.threads,
        patches,
        site.precision,
        hidden_states=hidden_states if site.state_bytes else None,
        state_bytes=site.state_bytes,
    )


def open_stores(site: Site) -> tuple[FileRecords, FileCheckpoints]:
    """Return the stores of a site: slices to read, checkpoints to write."""
    records = FileRecords(site.records_at, site.keyring)
    return records, FileCheckpoints(site.checkpoints_at, site.keyring, site.area)


@dataclass(frozen=True, slots=True)
class OnCluster:
    """An OpenExecutor: an executor by its name, at another address than the run file's."""

    name: str
    address: str

    def __call__(self, site: Site, options: Mapping[str, Any]) -> ports.Executor:
        return find_executor(self.name)(site, {**options, "address": self.address})


@dataclass(frozen=True, slots=True)
class _Auto:
    """An executor that trains on Ray, or a single chain in this process unless a cluster is named.

    Starting Ray takes longer than most shards of a deletion.
    """

    site: Site
    options: Mapping[str, Any]

    def run(self, chains: Sequence[Chain], report: Report, on_stage: ports.OnStage = silent) -> None:
        here = len(chains) == 1 and self.options.get("address") is None
        found = find_executor("serial" if here else "ray")(self.site, self.options)
        found.run(chains, report, on_stage)


def check_executor(executor: str | OpenExecutor) -> None:
    """Raise InvalidInput if no executor has this name. Nothing is loaded, since Ray takes seconds."""
    names = ["auto", "serial", *upper_houses.EXECUTORS]
    name = executor.name if isinstance(executor, OnCluster) else executor
    if isinstance(name, str) and name not in names:
        raise InvalidInput("unknown executor", expected=" or ".join(names), got=name)


def find_executor(executor: str | OpenExecutor) -> OpenExecutor:
    """Return an executor by its name, or the given one. Raise InvalidInput for an unknown name."""
    check_executor(executor)
    if not isinstance(executor, str):
        return executor
    if executor == "auto":
        return _Auto
    if executor == "serial":
        return open_serial
    found: OpenExecutor = upper_houses.load(upper_houses.EXECUTORS[executor])
    return found


def open_patcher(
    executor: str | OpenExecutor, site: ports.PatchSite, config: RunConfig
) -> ports.Patcher:
    """Return a patcher where an executor trains; an executor object counts as `serial`."""
    if isinstance(executor, OnCluster):
        cluster = config.cluster.model_copy(update={"address": executor.address})
        return open_patcher(executor.name, site, config.model_copy(update={"cluster": cluster}))
    name = executor if isinstance(executor, str) else "serial"
    if name == "auto":
        name = "ray" if config.cluster.address else "serial"
    if name not in upper_houses.PATCHERS:
        raise InvalidInput(
            "no executor of this name makes patches",
            expected=" or ".join(upper_houses.PATCHERS),
            got=name,
            next_step="name another executor",
        )
    found: ports.Patcher = upper_houses.load(upper_houses.PATCHERS[name])(site, config)
    return found


def find_probe() -> OpenProbe:
    """Return the function that opens the probe of the base."""
    found: OpenProbe = upper_houses.load(upper_houses.PROBE)
    return found
