"""Prove with a probe task that a node trains the driver's bits, before it trains.

    probe on the node: fingerprint, digest of the self-test, is the base there? -> Proof -> may it train?

The driver's own node is the reference; it is probed together with the first other node. A probe whose
worker is lost may be repeated. A proof is kept as long as this process runs, by the id of the node.

>>> reference = Proof("f1", "d1", has_base=True)
>>> refusal(Proof("f1", "d1", has_base=False), reference, frozenset({"f1"}))
''
>>> refusal(Proof("f1", "d2", has_base=False), reference, frozenset({"f1"})).partition(",")[0]
'its self-test gave d2'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from cluster.ray.shared_base import BaseManifest, find_base
from sisa.core.domain import DEFAULT_PRECISION, Precision
from sisa.core.errors import EnvironmentFault

LOST = (
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    OutOfMemoryError,
    TaskUnschedulableError,
)
PROVE_S = 600.0  # a probe imports torch, perhaps on a busy node

Remote = Callable[..., Any]  # (function, node, **options) -> a task on that node, in the workers' setup


@dataclass(frozen=True, slots=True)
class Proof:
    """Hold a probe's result: a node's fingerprint, its self-test's digest, whether it has the base."""

    fingerprint: str
    digest: str
    has_base: bool


def prove(threads: int, base_dir: Path, manifest: BaseManifest, precision: Precision) -> Proof:
    """Return this node's proof. It trains for some seconds."""
    from sisa.lm.base.cuda_device import require_device
    from sisa.lm.base.model_cache import cache_dir
    from sisa.lm.base.numerics import fingerprint
    from sisa.lm.train.self_test import trained_digests

    require_device(precision)
    (digest,) = trained_digests(threads, times=1, precision=precision)
    has_base = find_base(base_dir, cache_dir(), manifest) is not None
    return Proof(fingerprint(threads, precision), digest, has_base)


Prove = Callable[[int, Path, BaseManifest, Precision], Proof]


@dataclass(frozen=True, slots=True)
class NodeTerms:
    """State what a node must prove. Without a `manifest`, only the driver's node may train.

    `prove` is a function of a module, so that it can be pickled.
    """

    threads: int
    fingerprints: frozenset[str]
    base_dir: Path
    manifest: BaseManifest | None
    prove: Prove = prove
    precision: Precision = DEFAULT_PRECISION


def refusal(proof: Proof, reference: Proof, fingerprints: frozenset[str]) -> str:
    """Return why a node may not train; empty if it may."""
    for wanted in sorted(fingerprints - {proof.fingerprint}):
        return (
            f"its numerics fingerprint is {proof.fingerprint[:12]}, not {wanted[:12]} (another "
            "processor, other package versions or other kernel settings)"
        )
    if proof.digest != reference.digest:
        return (
            f"its self-test gave {proof.digest[:12]}, and {reference.digest[:12]} on the driver's node, "
            "under one fingerprint (`sisa doctor --numerics` shows it)"
        )
    return ""


_kept: dict[tuple[str, NodeTerms], Proof] = {}


class Proofs:
    """Ask nodes for proofs and compare them with the driver's node."""

    def __init__(self, origin: str, terms: NodeTerms, remote: Remote) -> None:
        self._origin, self._terms, self._remote = origin, terms, remote
        self._asked: dict[str, Any] = {}
        self._judged: set[str] = set()

    def ask(self, node: str) -> None:
        """Start the probe of a node, and of the driver's node, unless they have been asked."""
        terms = self._terms
        for each in {self._origin, node} - self._asked.keys():
            probe = self._remote(terms.prove, each, num_cpus=0)  # and the GPUs of a worker
            self._asked[each] = _kept.get((each, terms)) or probe.remote(
                terms.threads, terms.base_dir, terms.manifest, terms.precision
            )

    def wait(self) -> None:
        """Wait until all probes have answered, or until PROVE_S seconds have passed."""
        under_way = [each for each in self._asked.values() if not isinstance(each, Proof)]
        if under_way:
            ray.wait(under_way, num_returns=len(under_way), timeout=PROVE_S)

    def forget(self, node: str) -> None:
        """Forget the probe of a lost node."""
        self._asked.pop(node, None)

    @property
    def pending(self) -> bool:
        return bool(self._asked.keys() - self._judged - {self._origin})

    def judge(self) -> Iterator[tuple[str, Proof | str | None]]:
        """Yield each node that has answered since the last call, with its proof or why it is refused.

        A lost node comes with None, and may be asked again. Raise EnvironmentFault if the driver's own
        node can't be probed, or if its numerics differ from the driver's.
        """
        if not self.pending or not self._has_answered(self._origin):
            return
        reference = self._answer(self._origin)
        if not isinstance(reference, Proof):
            raise EnvironmentFault(
                "the driver's node can't be probed for its numerics",
                got=reference or "the probe's worker is lost",
                next_step="see whether `sisa doctor --numerics` runs there, or use `--executor serial`",
            )
        if why := refusal(reference, reference, self._terms.fingerprints):
            raise EnvironmentFault(
                "workers on the driver's node would train other bits than the driver",
                got=why,
                next_step="start Ray there with the driver's kernel settings (MKL_CBWR, "
                "ATEN_CPU_CAPABILITY and the like) and package versions",
            )
        for node in self._asked.keys() - self._judged - {self._origin}:
            if not self._has_answered(node):
                continue
            answer = self._answer(node)
            if answer is None:
                self.forget(node)
            else:
                self._judged.add(node)
            if isinstance(answer, Proof):
                answer = refusal(answer, reference, self._terms.fingerprints) or answer
            yield node, answer

    def _has_answered(self, node: str) -> bool:
        asked = self._asked[node]
        return isinstance(asked, Proof) or bool(ray.wait([asked], timeout=0)[0])

    def _answer(self, node: str) -> Proof | str | None:
        """Return the proof of a node that has answered, or why it has none; None if it is lost."""
        asked = self._asked[node]
        if isinstance(asked, Proof):
            return asked
        try:
            proof: Proof = ray.get(asked)
        except LOST:
            return None
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            return f"its probe failed: {type(cause).__name__}"
        self._asked[node] = _kept[node, self._terms] = proof
        return proof
