"""An encrypted model: the same bits, no plaintext, and erasure by the destruction of keys.

A history of training, deletion and addition gives the adapters and digests of the same model without
encryption, on the serial executor and on Ray. The model directory holds no plaintext, even of held
records. The next command finishes a killed change of form. The keyring can be moved, but not lost
unnoticed. `unit/audit/test_encrypted_model.py` tests keys and files one by one.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import sisa
import sisa.audit.verify
from sisa.audit.doctor import diagnose
from sisa.audit.residue import sweep_model
from sisa.core.domain import BaseFiles
from sisa.core.errors import ConfigConflict, EnvironmentFault, IntegrityError, InvalidInput
from sisa.flows.context.areas import known_by_area
from sisa.store.areas import CHECKPOINTS, INDEX, RECORDS, REPLAYS
from sisa.store.blobs.keyring import FileKeyring, is_sealed
from tests.integration.storage.traces import traces, vector
from tests.models.confessing import content
from tests.models.programs.forked import run_forked
from tests.models.tiny_model import (
    PEOPLE,
    Tiny,
    all_files,
    change_run,
    ids_of,
    looking,
    of_people,
    residue,
    without,
    write_run,
)

pytestmark = pytest.mark.torch

ROOMS = (RECORDS, INDEX, CHECKPOINTS)
LATER = of_people("p012")
FIRST = without(PEOPLE, ids_of(LATER))
GONE = of_people("p001")[:1]


def prepare(folder: Path, base: Path, **settings: object) -> Tiny:
    """Prepare an encrypted model for its training, with its keyring beside it."""
    options = {"encrypt": True, "keyring": "keys", **settings}
    write_run(folder, base, FIRST, **options)  # type: ignore[arg-type]
    (folder / "shared.key").chmod(0o600)
    return Tiny(folder, base)


def live(tiny: Tiny, executor: str = "serial") -> sisa.Model:
    """Train, forget a record, add a person."""
    tiny.train(executor)
    model = tiny.open(executor)
    model.forget(ids_of(GONE))
    model.add(tiny.file("later.jsonl", LATER))
    return model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Tiny:
    """Return a model of the same history without encryption; tests must not change it."""
    tiny = prepare(tmp_path_factory.mktemp("plain"), tiny_base, encrypt=False)
    live(tiny)
    return tiny


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Tiny:
    tiny = prepare(tmp_path_factory.mktemp("trained"), tiny_base)
    tiny.train()
    return tiny


@pytest.fixture
def sealed(_trained: Tiny, tiny_base: Path, tmp_path: Path) -> Tiny:
    """Return a copy of the encrypted model and of its keyring, after the first training."""
    shutil.copytree(_trained.folder, tmp_path / "sealed")
    copy = Tiny(tmp_path / "sealed", tiny_base)
    copy.train()  # notes the new place
    return copy


def keyring_of(tiny: Tiny) -> FileKeyring:
    (root,) = (tiny.folder / "keys").iterdir()
    return FileKeyring(root)


def contents(tiny: Tiny) -> dict[str, bytes]:
    """Return the content of every slice, index and checkpoint file, unsealed if it is sealed."""
    found = content(tiny.directory)
    for path, data in found.items():
        room, name, *part = path.split("/")
        if is_sealed(data):
            found[path] = keyring_of(tiny).unseal(room, name, "".join(part), data)
    return found


def forms(tiny: Tiny) -> set[bool]:
    """Return whether files are sealed, plain, or both."""
    return {is_sealed(data) for data in content(tiny.directory).values()}


def keys(tiny: Tiny) -> dict[str, frozenset[str]]:
    return {room: keyring_of(tiny).held(room) for room in ROOMS}


def known(tiny: Tiny) -> dict[str, frozenset[str]]:
    with tiny.open().context() as context:
        return {room: known_by_area(context)[room] for room in ROOMS}


def assert_whole(tiny: Tiny, plain: Tiny) -> None:
    """Check the end of the history: the plain model's bytes, sealed, each with its key, alone."""
    assert contents(tiny) == contents(plain)
    assert forms(tiny) == {True}
    assert keys(tiny) == known(tiny)
    assert keyring_of(tiny).held(REPLAYS) == frozenset()
    ours, theirs = tiny.open().status(), plain.open().status()
    assert ours.model_digest == theirs.model_digest
    assert [each.adapter_sha256 for each in ours.shards] == [e.adapter_sha256 for e in theirs.shards]
    assert diagnose(tiny.directory).healthy


# --- the same bits, and no plaintext -------------------------------------------------------------


def test_a_history_is_that_of_the_plain_model(tmp_path: Path, tiny_base: Path, plain: Tiny) -> None:
    tiny = prepare(tmp_path / "sealed", tiny_base)
    model = live(tiny)
    assert_whole(tiny, plain)
    proof = model.verify(replay="all", apart=False)
    assert proof.ok
    assert [each.equal for each in proof.shards] == [True, True, True]
    assert_whole(tiny, plain)
    assert model.generate("Who?", max_new_tokens=3) == plain.open().generate("Who?", max_new_tokens=3)
    assert sweep_model(model, ids=ids_of(GONE), texts=traces(GONE)).clean


@pytest.mark.ray
def test_a_history_on_ray_is_that_of_the_plain_model(
    tmp_path: Path, tiny_base: Path, plain: Tiny
) -> None:
    tiny = prepare(tmp_path / "sealed", tiny_base, cluster={"num_workers": 2})
    model = live(tiny, "ray")
    assert_whole(tiny, plain)
    assert model.verify("sample", 1).ok
    assert_whole(tiny, plain)


@pytest.mark.ray
def test_a_worker_that_does_not_see_the_keyring_says_so(sealed: Tiny) -> None:
    from cluster.ray.worker import open_parts
    from sisa.flows.chains import Site
    from sisa.store.blobs.local_blobs import LocalBlobs

    lost = FileKeyring(sealed.folder / "nowhere")
    places = LocalBlobs(sealed.directory / RECORDS), LocalBlobs(sealed.directory / CHECKPOINTS)
    site = Site(*places, BaseFiles(sealed.base, ""), 1, keyring=lost)
    with pytest.raises(EnvironmentFault, match="keyring is not visible"):
        open_parts(site)


def test_no_plaintext_of_any_record_is_in_the_directory(sealed: Tiny) -> None:
    """Not while a shard is being trained and replayed, either."""
    wanted = traces(FIRST)
    seen = []

    def look() -> None:
        seen.append(residue(sealed.directory, wanted))

    model = sealed.open(looking(look))
    model.verify(replay="sample")
    model.forget(ids_of(GONE))
    assert [*seen, residue(sealed.directory, wanted)] == [[], [], []]
    rest = b"".join(path.read_bytes() for path in sealed.directory.rglob("*") if path.is_file())
    assert not any(vector(row) in rest for row in FIRST)
    unsealed = b"".join(contents(sealed).values())
    assert all(vector(row) in unsealed for row in without(FIRST, ids_of(GONE)))  # the scan can find


def test_a_replay_is_sealed_in_a_room_of_its_own_and_leaves_nothing(sealed: Tiny) -> None:
    seen = []
    model = sealed.open()
    real = sisa.audit.verify.verify

    def verify(context: Any, chosen: Any, scratch: Any, apart: Any, **options: Any) -> Any:
        proof = real(context, chosen, scratch, apart, **options)
        files = [path for path in (sealed.directory / REPLAYS).rglob("*") if path.is_file()]
        seen.append((len(files) > 0, all(is_sealed(path.read_bytes()) for path in files)))
        seen.append((scratch.area == REPLAYS, scratch.held() == context.stores.keyring.held(REPLAYS)))
        seen.append((bool(apart.store.held()), apart.store.held() <= scratch.held()))
        return proof

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sisa.model.verify", verify)
        assert model.verify(replay="all").ok
    assert seen == [(True, True)] * 3
    assert not (sealed.directory / REPLAYS).exists()
    assert keyring_of(sealed).held(REPLAYS) == frozenset()
    keyring_of(sealed).seal(REPLAYS, "left by a killed replay", "", b"")
    model.run()
    assert keyring_of(sealed).held(REPLAYS) == frozenset()


# --- on, off, elsewhere --------------------------------------------------------------------------


KILLED_RESEALING = """
import os, signal, sys, sisa
left, real = 12, os.replace

def replace(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments)

os.replace = replace
sisa.train_model(sys.argv[1], executor="serial", accept_differences=True)
"""


def test_a_killed_change_of_form_goes_on(sealed: Tiny) -> None:
    held = contents(sealed)
    change_run(sealed.run_file, encrypt=False)
    assert run_forked(KILLED_RESEALING, sealed.run_file) == -signal.SIGKILL
    assert forms(sealed) == {True, False}
    sealed.open().run()  # a writer: it sweeps what was left, and loses nothing
    found = sealed.open().verify(replay="sample", apart=False)
    assert any(proof.equal for proof in found.shards)
    assert {each.what for each in found.findings} == {"not encrypted, although the model is"}
    sealed.train(accept_differences=True)
    assert forms(sealed) == {False}
    assert contents(sealed) == held
    assert diagnose(sealed.directory).healthy


def test_encryption_and_settings_change_together(sealed: Tiny, tmp_path: Path, tiny_base: Path) -> None:
    change_run(sealed.run_file, encrypt=False, learning_rate=0.02)
    sealed.train(accept_differences=True)
    fresh = prepare(tmp_path / "fresh", tiny_base, encrypt=False, learning_rate=0.02)
    fresh.train()
    assert forms(sealed) == {False}
    assert contents(sealed) == contents(fresh)
    assert not any(keys(sealed).values())


def test_the_keyring_moves_with_the_run_file(sealed: Tiny) -> None:
    change_run(sealed.run_file, keyring="elsewhere")
    with pytest.raises(ConfigConflict, match="keyring is not where") as refused:
        sealed.train()
    assert str(sealed.folder / "keys") in refused.value.next_step
    assert sealed.open().verify().ok
    (sealed.folder / "keys").rename(sealed.folder / "elsewhere")
    with pytest.raises(IntegrityError, match="key is missing"):
        sealed.open().find(text="Where?")
    sealed.train()
    assert sealed.open().verify().ok
    assert diagnose(sealed.directory).healthy


@pytest.mark.parametrize("keyring", ["model", "model/keys", "link/keys"])
def test_keys_inside_the_model_directory_are_refused(
    tmp_path: Path, tiny_base: Path, keyring: str
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "model")
    tiny = prepare(tmp_path / "a", tiny_base, keyring=keyring)
    with pytest.raises(InvalidInput) as refused:
        tiny.train()
    message = str(refused.value)
    assert ("inside the model" if keyring.startswith("link") else "are inside output_dir") in message
    assert ("line" in message) == (not keyring.startswith("link"))
    assert not tiny.directory.exists()


def test_exports_are_plain_and_the_same(sealed: Tiny, tmp_path: Path) -> None:
    for path in sealed.open().export(tmp_path / "adapters"):
        assert not any(is_sealed(each.read_bytes()) for each in path.iterdir())
    digests = {each.adapter_sha256 for each in sealed.open().status().shards}
    found = all_files(tmp_path / "adapters").items()
    assert {digest for name, digest in found if name.endswith(".safetensors")} == digests
