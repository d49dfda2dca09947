"""Test that a C2SP implementation of others reads our logs, and we read theirs.

`tlog-scales` is written by an operator of a public witness: reader, writer, proofs, signatures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from tlog_scales.backend import LocalBackend
from tlog_scales.reader import TilesReader
from tlog_scales.signing import PlainEd25519Signer, Vkey
from tlog_scales.tlog import InclusionProof
from tlog_scales.writer import TilesWriter

from sisa.evidence.log.cosigning import cosign
from sisa.evidence.log.published import log_reader
from sisa.evidence.log.tiles import Tiles
from sisa.verifier import merkle, note
from tests.models.written_log import TYPE, Place, entry, fill, some_cosigner_key, statement


@pytest.mark.parametrize("size", [1, 2, 255, 256, 300, 513])
def test_another_reader_accepts_our_logs(tmp_path: Path, size: int) -> None:
    place = Place(tmp_path)
    if size > 1:
        fill(place, size - 1)
    place.log.append(statement(size - 1), TYPE)
    private, vkey = some_cosigner_key("witness.example/w1")
    place.log.add_cosignatures(cosign(place.read, place.vkey, private, tmp_path / "state")[2], [vkey])
    reader = TilesReader(LocalBackend(place.at))
    checkpoint = reader.get_checkpoint()
    for key in (place.vkey, vkey):
        checkpoint.verify(Vkey.from_string(key))
    id_, stranger = int.from_bytes(place.log.key.id), note.parse_vkey(vkey).public
    with pytest.raises(InvalidSignature):
        checkpoint.verify(Vkey(place.log.key.name, id_, 1, stranger))
    assert (checkpoint.size, checkpoint.root_hash) == (size, reader.calculate_root_hash())
    ours, now = Tiles(place.read, size), place.log.checkpoint
    for index in {0, size // 2, size - 1}:
        assert reader.get_entry(index) == entry(index)
        _, path, _ = note.parse_proof(place.log.proof(index))
        InclusionProof(index, size, path).check(merkle.leaf_hash(entry(index)), now.root)
        assert path == reader.get_inclusion_proof(index, size).node_hashes
    for before in {1, size // 2, size - 1} - {0}:
        theirs = reader.get_consistency_proof(before, size)
        assert theirs.node_hashes == ours.consistency(before)
        theirs.check(reader.mth(0, before), now.root)


@pytest.mark.parametrize("sizes", [[1], [3, 5], [200, 300], [256], [600, 700]])
def test_we_accept_the_logs_of_another_writer(tmp_path: Path, sizes: list[int]) -> None:
    origin, signer = "example.com/log", PlainEd25519Signer("example.com/log", b"s" * 32)
    writer = TilesWriter.create(tmp_path / "log", origin)
    (tmp_path / "log" / "tile" / "entries").mkdir(parents=True)
    (tmp_path / "log" / "tile" / "0").mkdir()
    (tmp_path / "log" / "tile" / "1").mkdir()
    read, seen = log_reader(str(tmp_path / "log")), []
    for size in sizes:
        for number in range(writer.size, size):
            writer.add_leaf(entry(number))
        writer.commit([signer])
        seen.append(note.open_checkpoint(read("checkpoint"), signer.vkey.serialize()))
        assert note.read_log(read, seen[-1]) == [entry(number) for number in range(size)]
    for before in seen:
        Tiles(read, sizes[-1]).check_follows(before, seen[-1])
