"""Keep the nodes of a run: which may train, with how many workers, and which joined or were lost.

The driver's own node may always train. Every other node, including one that joins later, must first
prove that it trains the same bits (`proofs.py`). A node that fails the proof never gets a task; a notice
says why. A lost node loses its slots.

Losing the head is fatal: Ray keeps its tables in the head's memory, and an external Redis is not
assumed.

CPUs that other jobs of the cluster use count as free: a task waits for the node that it was given. On a
local Ray (one node, no address), nodes that join later are not used.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.ray.proofs import NodeTerms, Proof, Proofs, Remote
from cluster.ray.scheduling import Placement, WorkerSlots
from cluster.ray.session import Session
from cluster.ray.shared_base import BLOCK_BYTES
from sisa.core.errors import EnvironmentFault, Problem
from sisa.core.events import Notice, Report

LOOK_EVERY_S = 2.0
NO_NODE_S = 60.0  # how long a run without any slot waits for a node before it gives up
HEAD_LOST_S, HEAD_ANSWERS_S = 15.0, 2.0


@dataclass(frozen=True, slots=True)
class _Node:
    """Describe a live node: its name for people, its slots and the size of its object store."""

    name: str
    num_slots: int
    store_bytes: int


class Nodes:
    """Track which nodes may train and how many workers each of them takes."""

    def __init__(
        self,
        session: Session,
        report: Report,
        placement: Placement,
        remote: Remote,
        terms: NodeTerms | None,
    ) -> None:
        """Create a tracker. With `terms` None, every node may take tasks."""
        self.slots = WorkerSlots()
        self._session, self._report = session, report
        self._placement, self._terms = placement, terms
        self._origin: str = ray.get_runtime_context().get_node_id()
        self._proofs = Proofs(self._origin, terms, remote) if terms and terms.manifest else None
        self._alive: dict[str, _Node] = {}
        self._refused: dict[str, str] = {}
        self._looked = self._head_answered = self._had_slots = time.monotonic()

    def open(self) -> None:
        """Admit the nodes that are present. Raise EnvironmentFault if none of them can do any work."""
        is_one_lost = True
        while is_one_lost and not self.slots.total and time.monotonic() - self._had_slots < NO_NODE_S:
            self._update(within_s=NO_NODE_S)
            if self._proofs is not None:
                self._proofs.wait()
            is_one_lost = self._judge(must_carry=True)
            if is_one_lost and not self.slots.total:
                time.sleep(LOOK_EVERY_S)  # a node that died a moment ago still counts as alive
        if not self.slots.total:
            self._raise_none()

    def look(self, at_once: bool = False) -> None:
        """Update the list of nodes. Raise EnvironmentFault if the head or every node is lost."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S and not at_once:
            return
        self._looked = now
        if not self._head_answers(now):
            return  # any call to the head would block
        self._update()
        self._judge(must_carry=False)
        if self.slots.total or (self._proofs is not None and self._proofs.pending):
            self._had_slots = now
        elif now - self._had_slots > NO_NODE_S:
            self._raise_none()

    def name_of(self, node: str) -> str:
        return self._alive[node].name if node in self._alive else node[:8]

    def _update(self, within_s: float = HEAD_ANSWERS_S) -> None:
        """Drop lost nodes; admit new ones, or ask them for a proof."""
        listed = _listed(within_s)
        if listed is None:
            return  # the next call of `look` asks again
        alive = {node["NodeID"]: node for node in listed if node["Alive"]}
        for node in self._alive.keys() - alive.keys():
            name = self._alive.pop(node).name
            if self._proofs is not None:
                self._proofs.forget(node)
            if node in self.slots:
                self.slots.leave(node)
                self._report(Notice(f"node {name} is lost; places for {self.slots.total} workers left"))
        for node in alive.keys() - self._alive.keys():
            resources = alive[node]["Resources"]
            found = self._alive[node] = _Node(
                f"{alive[node]['NodeManagerAddress']} ({node[:8]})",
                self._placement.num_slots(resources),
                int(resources.get("object_store_memory", 0)),
            )
            if not found.num_slots:
                continue
            if self._terms is None or node == self._origin:
                self.slots.join(node, found.num_slots)
            elif self._proofs is not None:
                self._proofs.ask(node)

    def _judge(self, must_carry: bool) -> bool:
        """Admit or refuse the nodes that have answered; return whether one was lost before its answer.

        A lost node is asked again when it is next seen. With `must_carry`, raise EnvironmentFault if the
        base can't be carried to a node; without, refuse that node.
        """
        is_one_lost = False
        for node, answer in self._proofs.judge() if self._proofs is not None else ():
            if node not in self._alive:
                continue
            if answer is None:
                is_one_lost = True
                del self._alive[node]
                continue
            if isinstance(answer, Proof):
                why = "" if answer.has_base else self._cannot_carry(node, must_carry)
            else:
                why = answer
            if why:
                self._refused[node] = why
                self._report(Notice(f"node {self._alive[node].name} never trains for this model: {why}"))
            else:
                self.slots.join(node, self._alive[node].num_slots)
        return is_one_lost

    def _cannot_carry(self, node: str, must_carry: bool) -> str:
        """Return why the base can't be carried to a node; empty if it can."""
        manifest = self._terms.manifest if self._terms else None
        needed = sum(file.num_bytes for file in manifest.files) if manifest else 0
        for each, least in ((self._origin, needed), (node, min(needed, 2 * BLOCK_BYTES))):
            name, held = self._alive[each].name, self._alive[each].store_bytes
            if held >= least:
                continue
            if not must_carry:
                return f"it lacks the base, and the object store of {name} is too small to carry it"
            raise EnvironmentFault(
                f"node {self._alive[node].name} lacks the base model, and the object store is too small "
                "to carry it there",
                where=f"node {name}",
                expected=f"an object store of {least} bytes or more",
                got=f"{held} bytes",
                next_step="start that node with a larger `--object-store-memory`, or put the base on "
                "each node, under the driver's path",
            )
        return ""

    def _head_answers(self, now: float) -> bool:
        if self._session.private_dir is not None:
            return True  # our own head ends with this process
        address = ray.get_runtime_context().gcs_address
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_ANSWERS_S).close()
            self._head_answered = time.monotonic()
            return True
        if now - self._head_answered > HEAD_LOST_S:
            raise EnvironmentFault(
                "the head node of the Ray cluster is lost",
                where=address,
                expected="a head that answers",
                got=f"no answer for {now - self._head_answered:.0f} s",
                next_step="restart the cluster and run the command again; finished work is kept",
            )
        return False

    def _raise_none(self) -> None:
        problems = [
            Problem(f"node {each.name}", self._refused.get(node, "too few CPUs or GPUs for one worker"))
            for node, each in self._alive.items()
        ]
        raise EnvironmentFault(
            "no node of the Ray cluster may train",
            where=self._session.address or "the Ray of this process",
            expected=f"{self._placement.num_cpus} CPUs and {self._placement.num_gpus:g} GPUs on a node "
            "that trains the driver's bits",
            problems=problems,
            next_step="use nodes of one processor model with the same package versions as the driver's, "
            "at least `threads_per_shard` CPUs and, with device cuda, `cluster.num_gpus` GPUs",
        )


def _listed(within_s: float) -> list[dict[str, Any]] | None:
    """Return Ray's nodes, or None if the head does not answer in time.

    The call runs in a thread of its own, since a call to a lost head does not return.
    """
    answer: list[list[dict[str, Any]]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answer.append(ray.nodes())

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(within_s)
    return answer[0] if answer else None
