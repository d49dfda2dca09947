"""Prove by a probe task that a node trains the driver's bits, before it trains.

    probe on the node: fingerprint, digest of the self-test, has it the base? -> Proof -> may it train?

The driver's own node is the reference, so it is probed as soon as another one is. A node that
does not show the jobs' fingerprint *and* the digest that the self-test has on the driver's node is
refused, as is one whose probe fails. A probe whose worker is lost is no answer, and may be asked again.
A proof is kept for a node's life, which its id names.

>>> reference = Proof("f1", "d1", has_base=True)
>>> refusal(Proof("f1", "d1", has_base=False), reference, frozenset({"f1"}))
''
>>> refusal(Proof("f1", "d2", has_base=False), reference, frozenset({"f1"})).partition(",")[0]
'its self-test gave d2'
"""

from __future__ import annotations

from collections.abc import Callable
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
from sisa.core.errors import EnvironmentFault
from sisa.core.precision import DEFAULT_PRECISION, Precision

LOST = (
    WorkerCrashedError,
    NodeDiedError,
    LocalRayletDiedError,
    OutOfMemoryError,
    TaskUnschedulableError,
)
PROVE_S = 600.0  # a probe imports torch, perhaps on a busy node

Remote = Callable[..., Any]  # (function, node, **options) -> a task there, in the workers' environment


@dataclass(frozen=True, slots=True)
class Proof:
    """What a node showed: its fingerprint, the digest of its self-test, whether it has the base."""

    fingerprint: str
    digest: str
    has_base: bool


def prove(threads: int, base_dir: Path, manifest: BaseManifest, precision: Precision) -> Proof:
    """Return what this node shows, after some seconds of training."""
    from sisa.lm.base.numerics import fingerprint, require_device
    from sisa.lm.base.packages import cache_dir
    from sisa.lm.train.self_test import trained_digests

    require_device(precision)
    (digest,) = trained_digests(threads, times=1, precision=precision)
    has_base = find_base(base_dir, cache_dir(), manifest) is not None
    return Proof(fingerprint(threads, precision), digest, has_base)


Prove = Callable[[int, Path, BaseManifest, Precision], Proof]


@dataclass(frozen=True, slots=True)
class Terms:
    """What nodes must show. Without a `manifest` only the driver's node may train.

    `prove` is a module's function, so that it can travel."""

    threads: int
    fingerprints: frozenset[str]
    base_dir: Path
    manifest: BaseManifest | None
    prove: Prove = prove
    precision: Precision = DEFAULT_PRECISION
    num_gpus: float = 0  # of the probe, as of a worker


def refusal(proof: Proof, reference: Proof, fingerprints: frozenset[str]) -> str:
    """Return why a node may not train; empty if it may."""
    if why := _other_fingerprint(proof, fingerprints):
        return why
    if proof.digest != reference.digest:
        return (
            f"its self-test gave {proof.digest[:12]}, and {reference.digest[:12]} on the driver's node, "
            "under one fingerprint (`sisa doctor --numerics` shows it)"
        )
    return ""


def _other_fingerprint(proof: Proof, fingerprints: frozenset[str]) -> str:
    for wanted in sorted(fingerprints - {proof.fingerprint}):
        return (
            f"its numerics fingerprint is {proof.fingerprint[:12]}, not {wanted[:12]} (another "
            "processor, other package versions or other kernel settings)"
        )
    return ""


_kept: dict[tuple[str, Terms], Proof] = {}


class Proofs:
    """Asks nodes for proofs, and knows the reference."""

    def __init__(self, origin: str, terms: Terms, remote: Remote) -> None:
        self._origin, self._terms, self._remote = origin, terms, remote
        self._asked: dict[str, Any] = {}
        self._judged: set[str] = set()

    def ask(self, node: str) -> None:
        for each in (self._origin, node):
            if each not in self._asked:
                self._asked[each] = self._probe(each)

    def wait(self) -> None:
        """Until all have answered, or PROVE_S have passed."""
        under_way = [each for each in self._asked.values() if not isinstance(each, Proof)]
        if under_way:
            ray.wait(under_way, num_returns=len(under_way), timeout=PROVE_S)

    def forget(self, node: str) -> None:
        """It is lost."""
        self._asked.pop(node, None)

    @property
    def pending(self) -> bool:
        return bool(self._asked.keys() - self._judged - {self._origin})

    def judge(self) -> list[tuple[str, Proof | None, str]]:
        """Each node that has answered since: its proof, or why it is refused; neither of a lost one.

        Raises EnvironmentFault when the driver's own node can't be probed, or shows other numerics than
        the driver."""
        if not self.pending:
            return []
        reference = self._answer(self._origin)
        if isinstance(reference, str):
            raise EnvironmentFault(
                "the driver's node can't be probed for its numerics",
                got=reference,
                next_step="see whether `sisa doctor --numerics` runs there, or use `--executor serial`",
            )
        if reference and (why := _other_fingerprint(reference, self._terms.fingerprints)):
            raise EnvironmentFault(
                "workers on the driver's node would train other bits than the driver",
                got=why,
                next_step="start Ray there with the driver's kernel settings (MKL_CBWR, "
                "ATEN_CPU_CAPABILITY and the like) and package versions",
            )
        found: list[tuple[str, Proof | None, str]] = []
        for node in self._asked.keys() - self._judged - {self._origin}:
            proof = self._answer(node) if reference else None
            if proof is None:
                continue
            if proof == "":
                self.forget(node)
                found.append((node, None, ""))
                continue
            self._judged.add(node)
            if isinstance(proof, str):
                found.append((node, None, proof))
            elif reference:
                found.append((node, proof, refusal(proof, reference, self._terms.fingerprints)))
        return found

    def _probe(self, node: str) -> Any:
        if (node, self._terms) in _kept:
            return _kept[node, self._terms]
        probe = self._remote(self._terms.prove, node, num_cpus=0, num_gpus=self._terms.num_gpus)
        terms = self._terms
        return probe.remote(terms.threads, terms.base_dir, terms.manifest, terms.precision)

    def _answer(self, node: str) -> Proof | str | None:
        """Return what a node showed, or why it did not (empty if it is lost); None while it is at
        it."""
        asked = self._asked[node]
        if isinstance(asked, Proof):
            return asked
        if not ray.wait([asked], timeout=0)[0]:
            return None
        try:
            proof: Proof = ray.get(asked)
        except LOST:
            return ""
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            return f"its probe failed: {type(cause).__name__}"
        self._asked[node] = _kept[node, self._terms] = proof
        return proof
