"""What evidence adds to a deletion at 1,000,000 records: certificate, log and tree of records.

    python -m tests.bench.scale.membership --out tests/bench/scale/membership.json

The store is that of `rollback.py`, with a trainer that costs nothing. The tree of its records is built,
and single records are deleted without evidence, then others with it: a draft before the commit; after
the heads advanced, a certificate, signed and logged, and the new tree of records. The nodes that a
deletion rewrites are counted by comparing the whole table before and after, so unlike seconds they don't
depend on the machine's load. The keys are files.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from sisa.config.config import RunConfig, SigningBlock
from sisa.config.sources import DatasetSource
from sisa.evidence.hook import EvidenceHook
from sisa.evidence.keys.keys import create_keys
from sisa.evidence.keys.vrf_key import VrfKey
from sisa.evidence.log.log import Log
from sisa.evidence.membership import Membership
from sisa.flows.wiring.keys import evidence_keys_dir
from sisa.flows.wiring.wiring import EVIDENCE
from sisa.store.areas import LOG
from sisa.store.blobs.local_blobs import LocalBlobs
from sisa.verifier.certificate import CERTIFICATES
from sisa.verifier.vrf import verify_output
from tests.bench.command import arguments, machine, markdown, write
from tests.bench.scale.rollback import (
    SEED,
    WARM_UP,
    Deletion,
    Scale,
    Store,
    Watch,
    clean_heads,
    delete,
    percentiles,
    record_name,
    watched_context,
)

MODEL = "0f" * 16
NUM_TIMED = 500  # labels and proofs


def nodes(path: Path) -> dict[str, bytes]:
    """Return the stored nodes of the tree, and its root, by their place."""
    with closing(sqlite3.connect(path)) as db:
        return dict(db.execute("SELECT prefix, hash FROM nodes"))


def processor_seconds(key: VrfKey) -> dict[str, float]:
    """Return the seconds of one core that a label, a proof of it and its verification take."""
    ids = [record_name(number).encode() for number in range(NUM_TIMED)]
    at = [time.process_time()]
    labels = [key.output(each) for each in ids]
    at.append(time.process_time())
    proofs = [key.prove(each) for each in ids]
    at.append(time.process_time())
    verified = [verify_output(key.public, *each) for each in zip(ids, proofs, strict=True)]
    at.append(time.process_time())
    assert verified == labels
    label, proof, verification = ((end - start) / NUM_TIMED for start, end in itertools.pairwise(at))
    return {"label": round(label, 6), "proof": round(proof, 6), "verification": round(verification, 6)}


def seconds(deletions: Sequence[Deletion]) -> dict[str, Any]:
    return {
        "clean_heads_seconds": percentiles([each.clean_s for each in deletions]),
        "of_which_processor_seconds": percentiles([each.cpu_s for each in deletions]),
        "to_the_end_seconds": percentiles([each.end_s for each in deletions]),
    }


def measure(folder: Path, scale: Scale, num_deletions: int) -> dict[str, Any]:
    """Build a store and its tree, delete records without and with evidence, and summarise."""
    store = Store(folder / "model", scale)
    store.build()
    signing = SigningBlock(keys=folder / "keys")
    config = RunConfig(datasets=(DatasetSource(path="a"),), output_dir=store.folder, signing=signing)
    keys, path = create_keys(evidence_keys_dir(config, MODEL), MODEL), store.folder / EVIDENCE
    hook = EvidenceHook(store.folder, config, MODEL)

    started, cpu = time.perf_counter(), time.process_time()
    with closing(store.ledger()) as ledger:
        hook.complete(watched_context(store, ledger, Watch(lambda: False), {}, [hook]))
    built = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - cpu}

    chosen = random.Random(SEED).sample(range(scale.num_records), 2 * (WARM_UP + num_deletions))
    names = [record_name(number) for number in chosen]
    half = len(names) // 2
    plain = [delete(store, each, "benchmark") for each in names[:half]][WARM_UP:]
    certified, rewritten, paths = [], [], []
    for number, each in enumerate(names[half:]):
        before = nodes(path)
        done = delete(store, each, "benchmark", [hook])
        after = nodes(path)
        proof = Membership(path, keys.vrf_secret).prove(each)
        assert "shard" not in (proof["leaf"] or {})
        if number >= WARM_UP:
            certified.append(done)
            rewritten.append(sum(after.get(at) != before.get(at) for at in before.keys() | after.keys()))
            paths.append(len(proof["path"]))
    log = Log(LocalBlobs(store.folder / LOG), keys)
    kinds = [each.kind for each in hook.tables.logged(log)]
    assert sum(kind in CERTIFICATES for kind in kinds) == len(names) - half
    ratio = [mean(each.clean_s for each in some) for some in (certified, plain)]
    return {
        "machine": machine(),
        "libraries": {name: version(name) for name in ("pynacl", "sqlalchemy", "securesystemslib")},
        "load_average": round(os.getloadavg()[0], 1),  # above the number of CPUs: times are too long
        "records": scale.num_records,
        "processor_seconds_each": processor_seconds(VrfKey(keys.vrf_secret)),
        "first_tree": {name: round(value, 1) for name, value in built.items()},
        "evidence_bytes": path.stat().st_size,
        "stored_nodes": len(nodes(path)),
        "deletions": num_deletions,
        "without_evidence": seconds(plain),
        "with_evidence": seconds(certified),
        "clean_heads_with_over_without": round(ratio[0] / ratio[1], 2),
        "nodes_rewritten": percentiles(rewritten),
        "path_of_a_proof": percentiles(paths),
    }


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what evidence adds to a deletion, and what its tree of records costs."""
    without, with_ = found["without_evidence"], found["with_evidence"]
    each, first, nodes = found["processor_seconds_each"], found["first_tree"], found["nodes_rewritten"]
    records, processor = f"{found['records']:,} records", "of_which_processor_seconds"
    lines = [
        (f"from a request to clean heads, {records}, without evidence", clean_heads(without)),
        (
            f"the same with evidence: {found['clean_heads_with_over_without']} times",
            clean_heads(with_),
        ),
        (
            "of which processor time, p50, without and with",
            ", ".join(f"{part[processor]['p50']:.2f} s" for part in (without, with_)),
        ),
        (
            "to the end (certificate signed and logged), training faked, p50, without and with",
            ", ".join(f"{part['to_the_end_seconds']['p50']:.2f} s" for part in (without, with_)),
        ),
        (
            "nodes of the tree that a deletion rewrites, p50 and most",
            f"{nodes['p50']:.0f}, {nodes['max']} of {found['stored_nodes']:,}",
        ),
        ("labels that a core computes", f"{1 / each['label']:,.0f} in a second"),
        (
            f"the first tree of {records}, with all labels, on {found['machine']['cpus']} cores",
            f"{first['seconds']:.0f} s; {first['processor_seconds']:.0f} s of processor time",
        ),
        (
            "a label's proof, and its verification, in processor time",
            ", ".join(f"{each[name] * 1000:.2f} ms" for name in ("proof", "verification")),
        ),
        ("`evidence.sqlite`", f"{found['evidence_bytes'] / 1e6:.0f} MB"),
    ]
    yield from markdown(("what", "measured"), lines)


def main() -> None:
    given = arguments(
        __doc__,
        out=Path("membership.json"),
        records=1_000_000,
        deletions=30,
        folder={"type": Path, "help": "where the store is written; it takes 3 GB"},
    )
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        found = measure(Path(name), Scale(given.records), given.deletions)
    write(given.out, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
