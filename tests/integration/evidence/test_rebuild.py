"""A second party trains a certificate's shards again, from the remaining records, without the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from sisa.config.runfile import load_run_file
from sisa.core.errors import InvalidInput
from sisa.core.events import silent
from sisa.data.reader import read_like
from sisa.evidence.issuing import served_by
from sisa.evidence.keys.model_keys import keys_of, start_evidence
from sisa.evidence.open_evidence import certificate_file
from sisa.evidence.rebuild import NOT_GIVEN, Rebuild, rebuild_shards
from sisa.evidence.statements import Served
from sisa.planning.plan import jobs
from tests.models.tiny_model import PEOPLE, Row, Tiny, command, ids_of, of_people, without, write_rows

pytestmark = pytest.mark.torch
ELSEWHERE = "f" * 64  # the fingerprint of another machine


def certified(tiny: Tiny, *shards: int) -> list[Served]:
    """Return what a certificate says of served adapters."""
    with tiny.open().context() as context:
        return [each for each in served_by(context.stores.ledger) if each.shard in shards]


def rebuilt(tiny: Tiny, heads: Sequence[Served], rows: Sequence[Row], at: Path) -> Rebuild:
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
    assert found.shards[0].rebuilt == head.sha256

    served_another = replace(head, sha256="0" * 64)
    assert rebuilt(tiny, [head, served_another], rows, at).verdict == "differs"
    key = made_elsewhere(tiny, head)
    assert key != head.key
    elsewhere = replace(head, sha256="0" * 64, key=key, fingerprint=ELSEWHERE)
    assert rebuilt(tiny, [elsewhere], rows, at).verdict == "same procedure, other bits"
    assert rebuilt(tiny, [replace(elsewhere, key=head.key)], rows, at).verdict == "other procedure"
    others = certified(tiny, 0, 2)
    with pytest.raises(InvalidInput, match="none of the records") as refused:
        rebuilt(tiny, others, of_people("p004"), tmp_path / "c")
    assert refused.value.where == "shard 0, shard 2"


def made_elsewhere(tiny: Tiny, head: Served) -> str:
    """Return the key of the same job under another fingerprint."""
    with tiny.open().context() as context:
        slices = context.stores.ledger.slices(head.shard)
        return jobs(head.shard, slices, context.recipe, ELSEWHERE)[-1].key


def test_a_signed_rebuild_is_logged_beside_the_certificate(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.open()
    start_evidence(model)
    request = model.forget(subject="p006").request
    assert request is not None
    second = tmp_path / "second"
    second.mkdir()
    files = {
        "certificate.json": certificate_file(model, request.request_id),
        "keys.json": keys_of(model).public_file,
        "run.yaml": tiny.run_file.read_bytes(),
        "partition.key": (tiny.folder / "shared.key").read_bytes(),
        "mine.pem": Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ),
    }
    for name, data in files.items():
        (second / name).write_bytes(data)
    write_rows(second / "remaining.jsonl", without(PEOPLE, ids_of(of_people("p006"))))
    given = ["rebuild", second / "certificate.json", "--key", second / "keys.json", "--run"]
    given += [second / "run.yaml", "--records", second / "remaining.jsonl"]
    given += ["--partition-key", second / "partition.key", "--executor", "serial"]
    given += ["-o", second / "rebuild.json", "--sign-with"]
    refused = command(capsys, *given, second / "keys.json")  # before anything is trained
    assert (refused.code, refused.error["expected"]) == (2, "an Ed25519 private key in PEM")
    done = command(capsys, *given, second / "mine.pem")
    assert (done.code, done.json["verdict"]) == (0, "equal")
    assert (done.json["num_given"], done.json["num_certified"]) == (22, 22)
    public = Path(done.json["public_key"])

    add = ["log", "add-rebuild", "-m", tiny.directory, second / "rebuild.json", "--public-key"]
    entry = command(capsys, *add, public)
    assert entry.json["entry"] == 1
    other = Ed25519PrivateKey.generate().public_key()
    (second / "other.pem").write_bytes(
        other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    assert command(capsys, *add, second / "other.pem").code == 4
    found = command(capsys, "audit", "-m", tiny.directory, "--sample", 0, "--executor", "serial")
    assert (found.code, found.json["passed"], found.json["entry"]) == (0, True, 2)


def test_records_that_do_not_remain_show(tiny: Tiny, tmp_path: Path) -> None:
    heads = certified(tiny, 1)  # of a model that has forgotten nobody
    found = rebuilt(tiny, heads, without(PEOPLE, ids_of(of_people("p006"))), tmp_path / "b")
    assert found.verdict == "other procedure"
    assert found.shards[0].same_numerics
