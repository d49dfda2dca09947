"""Make a patch in a Ray worker: the same maker, the same bytes, with progress on the driver.

A task carries paths, digests and an order, never text. The worker reads the vault itself, so all
nodes must see the vault, its keyring and the patches. A worker that dies is started again and
continues from the state that its run had saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ray

from approx.patches.patch_maker import PatchMaker
from cluster.ray.executor import carrier, leased, lent_keys, manifest_of
from cluster.ray.proofs import NodeTerms
from cluster.ray.scheduling import Placement
from cluster.ray.session import connect
from cluster.ray.tasks import run_tasks
from cluster.ray.worker import NeedsBase, base_on_this_node
from sisa.config.config import RunConfig
from sisa.core.checkpoint_files import CHECKPOINT_FILES
from sisa.core.errors import EnvironmentFault
from sisa.core.events import Report
from sisa.core.ports import PatchMade, PatchOrder, PatchSite
from sisa.lm.base.numerics import fingerprint
from sisa.store.areas import PATCHES, RUNS
from sisa.store.blobs.local_blobs import LocalBlobs


@dataclass(frozen=True, slots=True)
class PatchTask(NeedsBase):
    """Hold what travels to a worker."""

    site: PatchSite
    order: PatchOrder


@dataclass
class RayPatcher(PatchMaker):
    """Check orders on the driver, since that needs no weights, and make patches in a Ray worker."""

    config: RunConfig

    def make(self, order: PatchOrder, report: Report) -> PatchMade:
        """Make a patch. Raise as the Protocol, and EnvironmentFault if Ray or a machine fails."""
        site, cluster = self.site, self.config.cluster
        session = connect(cluster.address, site.threads)
        origin = ray.get_runtime_context().get_node_id()
        manifest = manifest_of(site.base, cluster.address)
        with _lent(site, order.job.key) as there:
            (made,) = run_tasks(
                [PatchTask(there, order, manifest=manifest, origin=origin)],
                make_remotely,
                report,
                session=session,
                placement=Placement(site.threads),
                label=lambda _task: "the patch",
                max_retries=cluster.max_retries,
                stall_limit_s=cluster.stall_limit_s,
                make_ready=carrier(site.base.directory, report),
                # This machine's fingerprint; the maker checks the one in the job.
                terms=NodeTerms(
                    site.threads, frozenset({fingerprint(site.threads)}), site.base.directory, manifest
                ),
            )
        return made


@contextlib.contextmanager
def _lent(site: PatchSite, key: str) -> Iterator[PatchSite]:
    """Yield a site with keys and areas lent to the worker, and accept the patch at the end.

    The saved state of an unfinished run is sealed under the run's key, and is unreadable once that key
    is destroyed. See `executor.lent`.
    """
    files = [f"{key}/{name}" for name in CHECKPOINT_FILES]
    with (
        lent_keys(site.patches_keyring, PATCHES, [key], site.patches_at) as keyring,
        lent_keys(site.vault_keyring, RUNS, [key], LocalBlobs(site.runs_dir)) as of_vault,
        leased(site.patches_at, files) as (patches, accept),
    ):
        yield replace(site, patches_at=patches, patches_keyring=keyring, vault_keyring=of_vault)
        accept(key)


def make_remotely(task: PatchTask, report: Report) -> PatchMade:
    """Make a patch in this worker.

    Raise the errors of `PatchMaker.make`, Unready if the node lacks the base, and EnvironmentFault if
    the node does not see the model directory.
    """
    site = task.site
    if not site.vault_dir.is_dir():
        raise EnvironmentFault(
            "the model directory is not visible on a worker's node",
            where=str(site.vault_dir),
            next_step="put the model directory and the vault's keyring on a file system that all nodes "
            "share, or use `--executor serial`",
        )
    base = base_on_this_node(task, site.base)
    return PatchMaker(replace(site, base=base)).make(task.order, report)
