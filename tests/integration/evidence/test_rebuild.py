"""A second party trains a certificate's shards again, from the remaining records, without the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from sisa.config.runfile import load_run_file
from sisa.core.errors import InvalidInput
from sisa.core.events import silent
from sisa.data.reader import read_like
from sisa.evidence.rebuild import NOT_GIVEN, CertifiedHead, Rebuild, rebuild_shards
from sisa.planning.plan import jobs
from tests.models.tiny_model import PEOPLE, Row, Tiny, ids_of, of_people, without, write_rows

pytestmark = pytest.mark.torch
ELSEWHERE = "f" * 64  # the fingerprint of another machine


def certified(tiny: Tiny, *shards: int) -> list[CertifiedHead]:
    """Return what a certificate says of served heads."""
    with tiny.open()._context() as context:
        held = {each.key: each for each in context.stores.ledger.checkpoints()}
        heads = {head.shard: held[str(head.key)] for head in context.stores.ledger.heads()}
    return [
        CertifiedHead(shard, heads[shard].adapter_sha256, heads[shard].key, heads[shard].fingerprint)
        for shard in shards
    ]


def rebuilt(tiny: Tiny, heads: Sequence[CertifiedHead], rows: Sequence[Row], at: Path) -> Rebuild:
    """Rebuild with nothing of the operator's but run file, key and records."""
    at.mkdir(exist_ok=True)
    shutil.copy(tiny.run_file, at)
    shutil.copy(tiny.folder / "shared.key", at / "partition.key")
    config = load_run_file(at / "run.yaml", NOT_GIVEN)
    records = read_like(config, write_rows(at / "remaining.jsonl", rows))
    return rebuild_shards(heads, config, records, at / "partition.key", at / "work", "serial", silent)


def test_a_second_party_rebuilds_the_certified_bytes(tiny: Tiny, tmp_path: Path) -> None:
    tiny.open().forget(subject="p006")
    (head,), rows, at = certified(tiny, 1), without(PEOPLE, ids_of(of_people("p006"))), tmp_path / "b"
    found = rebuilt(tiny, [head], rows, at)
    assert (found.verdict, found.num_records) == ("equal", 4)  # p004 and p010: one shard alone
    assert found.shards[0].rebuilt == head.adapter_sha256

    served_another = replace(head, adapter_sha256="0" * 64)
    assert rebuilt(tiny, [head, served_another], rows, at).verdict == "differs"
    key = made_elsewhere(tiny, head)
    assert key != head.key
    elsewhere = replace(head, adapter_sha256="0" * 64, key=key, fingerprint=ELSEWHERE)
    assert rebuilt(tiny, [elsewhere], rows, at).verdict == "same procedure, other bits"
    assert rebuilt(tiny, [replace(elsewhere, key=head.key)], rows, at).verdict == "other procedure"
    others = certified(tiny, 0, 2)
    with pytest.raises(InvalidInput, match="none of the records") as refused:
        rebuilt(tiny, others, of_people("p004"), tmp_path / "c")
    assert refused.value.where == "shard 0, shard 2"


def made_elsewhere(tiny: Tiny, head: CertifiedHead) -> str:
    """Return the key of the same job under another fingerprint."""
    with tiny.open()._context() as context:
        slices = context.stores.ledger.slices(head.shard)
        return jobs(head.shard, slices, context.recipe, ELSEWHERE)[-1].key


def test_records_that_do_not_remain_show(tiny: Tiny, tmp_path: Path) -> None:
    heads = certified(tiny, 1)  # of a model that has forgotten nobody
    found = rebuilt(tiny, heads, without(PEOPLE, ids_of(of_people("p006"))), tmp_path / "b")
    assert found.verdict == "other procedure"
    assert found.shards[0].same_numerics
