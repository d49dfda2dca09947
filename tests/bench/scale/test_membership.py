"""The benchmark of evidence, on 300 records: what it counts, and that every deletion is certified."""

from __future__ import annotations

from pathlib import Path

from tests.bench.scale.membership import measure
from tests.bench.scale.rollback import Scale


def test_a_deletion_with_evidence_rewrites_few_nodes(tmp_path: Path) -> None:
    found = measure(tmp_path, Scale(300, num_shards=4, num_slices=3, dimension=16), num_deletions=2)
    assert found["stored_nodes"] > 10
    assert 0 < found["nodes_rewritten"]["p50"] <= found["nodes_rewritten"]["max"] <= 12
    assert found["path_of_a_proof"]["max"] >= 5
    for name in ("with_evidence", "without_evidence"):
        assert 0 < found[name]["clean_heads_seconds"]["p50"] < found[name]["to_the_end_seconds"]["max"]
