"""Patches, the vault and unfinished runs on disk, as every command on a model directory sees them."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from sisa.audit.doctor import diagnose
from sisa.audit.findings import examine
from sisa.audit.garbage import ORPHAN, UNKNOWN_FILE, list_garbage, remove_garbage
from sisa.audit.repair import repair_opened
from sisa.audit.residue import Scan, scan_residue
from sisa.audit.verify import verify
from sisa.core.checkpoint_files import ADAPTER_FILE
from sisa.core.patches import Patch, active, wanted
from sisa.flows.patches.patching import Wish, make_wanted, revert_patches, want
from sisa.flows.reconcile import reconcile
from sisa.flows.reconfigure import reseal_model
from sisa.store.areas import PATCHES, RUNS, VAULT
from sisa.store.blobs.files import TEMPORARY_PREFIX, write_atomic
from sisa.store.blobs.keyring import FileKeyring, is_sealed
from tests.fakes.patches import encode
from tests.fakes.ports import changed, fake_record
from tests.models.confessing import NAME, NUM_RECORDS, build, context_of, delete, record

FORGET, OTHER = fake_record(NUM_RECORDS + 5), fake_record(NUM_RECORDS + 6)
KEPT = 2  # a record of the model, in the patch's retain set
pytestmark = pytest.mark.usefixtures("own_places")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home of a plain model and its keys.

    The model has a patch, the texts with which it may have to be made again, and a wish.
    """
    home = tmp_path_factory.mktemp("patched") / "home"
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(home))
        build(home / "model")
        with context_of(home / "model") as context:
            want(context, Wish({"method": "npo"}, [FORGET], [record(KEPT)], "asked"))
            make_wanted(context)
            want(context, Wish({"method": "npo"}, [OTHER], None, "asked"))
            context.stores.ledger.scrub()
    return home


@pytest.fixture
def model(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(shutil.copytree(built, tmp_path / "home")))
    return tmp_path / "home" / "model"


def keyring_of(model: Path) -> FileKeyring:
    return FileKeyring(model.parent / "sisa" / "keyrings" / NAME)


def scan(model: Path, *also: Path) -> Scan:
    """Scan for ids alone, since the fake's adapters confess texts."""
    with context_of(model) as context:
        return scan_residue(context, model, also=also, ids=[FORGET.id, OTHER.id])


def kinds(model: Path) -> dict[str, str]:
    return {each.kind: each.repair for each in diagnose(model).findings}


def patches(model: Path) -> list[Patch]:
    with context_of(model) as context:
        return context.stores.ledger.patches()


def vault_files(model: Path) -> list[Path]:
    return sorted((model / VAULT).iterdir())


def test_a_patched_model_is_healthy_and_clean(model: Path) -> None:
    found = diagnose(model)
    assert (found.findings, found.healthy) == ((), True)
    scanned = scan(model)
    assert scanned.residue == ()
    assert (scanned.scanned["patches"], scanned.scanned["kept_by_consent"]) == (1, 3)
    with context_of(model) as context:
        assert list_garbage(context, model) == ()
        checked = verify(context, [], None)
    assert (checked.ok, checked.findings) == (True, ())


def test_the_vault_of_a_plain_model_is_sealed(model: Path) -> None:
    (patch_dir,) = (model / PATCHES).iterdir()
    assert not any(is_sealed(path.read_bytes()) for path in patch_dir.iterdir())
    assert len(vault_files(model)) == 3
    for path in vault_files(model):
        assert is_sealed(path.read_bytes())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keyring_of(model).held(VAULT) == {path.name for path in vault_files(model)}


def test_a_form_follows_the_run_file_and_the_vaults_does_not(model: Path) -> None:
    for seals in (True, False):
        with context_of(model) as context:
            reseal_model(changed(context, keyring=FileKeyring(keyring_of(model).root, seals)))
        (patch_dir,) = (model / PATCHES).iterdir()
        assert {is_sealed(path.read_bytes()) for path in patch_dir.iterdir()} == {seals}
        assert all(is_sealed(path.read_bytes()) for path in vault_files(model))
    assert diagnose(model).healthy


def test_a_damaged_patch_is_given_up_and_wanted_again(model: Path) -> None:
    (served,) = active(patches(model))
    (model / PATCHES / served.key / ADAPTER_FILE).write_bytes(b"{}")
    assert kinds(model) == {"patch": "patches"}
    assert [each.kind for each in scan(model).residue][:1] == ["damaged"]
    with context_of(model) as context:
        assert not verify(context, [], None).ok
        repair_opened(context, model)
        assert all(each.severity != "error" for each in examine(context, model))
        assert wanted(context.stores.ledger.patches())[0].job == served.job
        make_wanted(context)
    assert len(active(patches(model))) == 2
    assert diagnose(model).healthy


def test_a_surplus_file_in_a_patch_is_no_damage(model: Path) -> None:
    (served,) = active(patches(model))
    write_atomic(model / PATCHES / served.key / "notes.txt", FORGET.text.encode())
    assert kinds(model) == {"unknown": "sweep"}
    with context_of(model) as context:
        assert len(remove_garbage(context, model)) == 1
    assert diagnose(model).healthy


def test_a_set_whose_key_is_lost_is_given_up_with_the_wish(model: Path) -> None:
    (wish,) = wanted(patches(model))
    keyring_of(model).destroy(VAULT, wish.job.forget)
    assert kinds(model) == {"vault": "patches"}
    with context_of(model) as context:
        repair_opened(context, model)
        assert wanted(context.stores.ledger.patches()) == []
    assert diagnose(model).healthy
    assert len(vault_files(model)) == 2


def test_a_set_that_lies_there_plain_is_found(model: Path) -> None:
    (wish,) = wanted(patches(model))
    (model / VAULT / wish.job.forget[0]).write_bytes(encode([OTHER]))
    assert kinds(model) == {"vault": "patches"}
    found = {each.kind for each in scan(model).residue}
    assert {"damaged", "string"} <= found


def test_what_no_commit_knows_is_reported_and_swept(model: Path) -> None:
    keyring = keyring_of(model)
    for room in (VAULT, RUNS):
        keyring.seal(room, "unknown", "", b"")
        keyring.seal(room, f"{TEMPORARY_PREFIX}key", "", b"")
        write_atomic(model / room / f"{TEMPORARY_PREFIX}left", encode([FORGET]))
    (model / VAULT / "unknown").write_bytes(keyring.seal(VAULT, "unknown", "", encode([FORGET])))
    (model / PATCHES / f"{TEMPORARY_PREFIX}left").mkdir()
    with context_of(model) as context:
        reasons = [each.reason for each in list_garbage(context, model)]
        assert reasons.count(ORPHAN) == 3
        assert reasons.count(UNKNOWN_FILE) == 1
        assert len(reasons) == 7
    assert {each.kind for each in scan(model).residue} == {"string", "unknown_file"}
    with context_of(model) as context:
        reconcile(context)
    assert diagnose(model).healthy
    assert scan(model).clean
    assert keyring.held(RUNS) == frozenset()


def test_a_copy_of_a_patch_that_is_served_no_more_is_residue(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model / PATCHES, tmp_path / "copy")
    assert scan(model, tmp_path / "copy").clean
    with context_of(model) as context:
        revert_patches(context, everything=True)
    assert list((model / PATCHES).iterdir()) == vault_files(model) == []
    found = scan(model, tmp_path / "copy").residue
    assert [each.kind for each in found] == ["stale_patch"]


def test_a_deletion_makes_the_patch_again_on_disk(model: Path) -> None:
    (old,) = active(patches(model))
    delete(model, KEPT)
    new, upon = active(patches(model))  # the wish lay upon it, and is made with it
    assert (new.job.forget, upon.job.beneath) == (old.job.forget, (new.key,))
    assert (new.job.retain, vault_files(model)) == ("written", [])
    assert sorted(path.name for path in (model / PATCHES).iterdir()) == sorted([new.key, upon.key])
    assert diagnose(model).healthy
    assert scan(model).clean
